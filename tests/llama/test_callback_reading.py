"""A generated token's row is read inside llama.cpp's callback: once, this token's, and of memory that stays."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from pipeline.llama import reading
from pipeline.llama.encoder import GgmlEncoder
from pipeline.llama.reading import kernels
from pipeline.readout import Reader
from tests.interventions.test_transcoders import transcoder
from tests.interventions.tiny import sae_at, session

from .test_row_reading import decode


@pytest.fixture(autouse=True)
def products():
    found = kernels()
    if found is None or not found.has_affine("F32", 8):
        pytest.skip("this processor lacks the instructions of the compiled products")


def test_an_input_that_is_computed_after_the_output_is_this_tokens_too():
    w, s = transcoder("blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"), session()
    taken = []
    for general in (False, True):
        s.clear()
        reader = Reader(w, encoder=GgmlEncoder(w, n_threads=1))
        if general:
            reader._place = reader._input_place = None
        hooks = [reader.hook(), reader.input_hook()]
        for pos, token in enumerate((5, 9, 7)):
            decode(s, token, pos, hooks)
            taken += reader.take(0, [pos])
    for ours, theirs in zip(taken[:3], taken[3:], strict=True):
        assert ours.latents == theirs.latents
        assert ours.fvu == pytest.approx(theirs.fvu, rel=1e-5)
    assert taken[0].latents != taken[1].latents


def test_a_transcoder_is_read_once_when_both_rows_are_there():
    w, s, heard = transcoder(), session(), []
    reader = Reader(w, encoder=GgmlEncoder(w, n_threads=1))
    places = reader._place, reader._input_place
    assert all(place is not None and place.call[0] for place in places)

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def heard_of(argument):
        heard.append(argument)
        return 0

    for place in places:
        place.call = ctypes.cast(heard_of, ctypes.c_void_p).value, 4242
    hooks = [reader.hook(), reader.input_hook()]
    for pos in range(3):
        decode(s, 5, pos, hooks)
        for place in places:
            place.held = None
    assert heard == [4242] * 3


def test_a_row_is_read_in_the_callback_and_only_there(monkeypatch):
    w, s = sae_at(1), session()
    reader = Reader(w, encoder=GgmlEncoder(w, n_threads=1))
    monkeypatch.setattr(reading.CompiledRow, "read", lambda self, top: pytest.fail("read once more"))
    hooks = [reader.hook()]
    for pos, token in enumerate((5, 9, 5)):
        decode(s, token, pos, hooks)
        row = reader._row
        assert isinstance(row, reading.CompiledRow)
        own = row._arrays["found"].copy()
        assert reading._FOUND.unpack_from(own)[1] > 0, "it is there before anybody asks"
        (found,) = reader.take(0, [pos])
        general = Reader(w, encoder=GgmlEncoder(w, n_threads=1))
        general._rows[0, pos] = row.x_D.copy()
        assert general.take(0, [pos])[0].to_dict() == found.to_dict()


def test_a_row_that_was_not_taken_does_not_stand_for_a_later_one_at_its_place():
    w, s = sae_at(1), session()
    reader, fresh = (Reader(w, encoder=GgmlEncoder(w, n_threads=1)) for _ in range(2))
    hooks = [reader.hook()]
    decode(s, 5, 0, hooks)
    s.clear()
    decode(s, 9, 0, hooks)
    (found,) = reader.take(0, [0])
    s.clear()
    decode(s, 9, 0, [fresh.hook()])
    assert found.latents == fresh.take(0, [0])[0].latents


def test_a_transcoder_hooked_at_its_output_alone_gives_no_reading():
    w, s = transcoder(), session()
    reader = Reader(w, encoder=GgmlEncoder(w, n_threads=1))
    for pos in range(2):
        decode(s, 5, pos, [reader.hook()])
        with pytest.raises(KeyError):
            reader.take(0, [pos])


def test_a_process_that_ends_while_a_thread_reads_ends_well():
    lines = (
        "import threading, time, numpy as np",
        "from pipeline.llama.encoder import GgmlEncoder",
        "from sae.weights import SAEWeights",
        "W_FD = np.random.default_rng(0).standard_normal((300_000, 96), np.float32)",
        "zeros_D = np.zeros(96, np.float32)",
        "w = SAEWeights(W_enc_FD=W_FD, b_enc_F=np.zeros(300_000), W_dec_FD=W_FD, b_dec_D=zeros_D, mean_D=zeros_D,",
        "               variance=1.0, k=8, hook='blocks.0.hook_resid_post')",
        "row = GgmlEncoder(w, n_threads=1).row_reading()",
        "row.x_D[:] = 1",
        "def on():",
        "    while True: row.read(3)",
        "threading.Thread(target=on, daemon=True).start()",
        "time.sleep(0.3)",
    )
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False).returncode == 0
