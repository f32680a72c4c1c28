"""One row in one compiled call against the parts it is made of, numpy and float64; and rows copied without Python."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading

import numpy as np
import pytest

from pipeline.generate import generate
from pipeline.interventions.clamp import Clamp
from pipeline.llama import reading
from pipeline.llama.encoder import GgmlEncoder
from pipeline.llama.hooks import HookPoint
from pipeline.llama.reading import Kernels, decoder_of, kernels
from pipeline.llama.session import Hook
from pipeline.readout import Reader
from sae.encoders import PAIR, Encoder, NumpyEncoder
from sae.errors import LlamaError, ShapeError
from sae.native.build import build
from sae.runtime import encoder_input, select
from tests.interventions.test_transcoders import INSIDE, MID, OUT, transcoder
from tests.interventions.tiny import prompt, sae_at, session, tiny

from .test_encoder import ROUNDING, D, F, check_support, oracle, sae

OWN = [dtype for dtype in ROUNDING if dtype not in ("Q5_1", "Q4_1")]  # those are multiplied by ggml alone
VARIANTS = {
    "topk": {},
    "b_dec kept": {"b_dec_subtracted": False},
    "threshold": {"variant": "threshold", "threshold_F": np.linspace(0.5, 2.0, F)},
    "silent": {"variant": "threshold", "threshold_F": np.full(F, 1e9)},
    "few fire": {"b_enc_F": np.full(F, -4.0)},
    "all latents": {"k": F},
}


def rows_of(w, count=5):
    return (w.b_dec_D + 2 * np.random.default_rng(count).standard_normal((count, w.d_in))).astype(np.float32)


@pytest.fixture(autouse=True)
def products():
    found = kernels()
    if found is None or not found.has_affine("Q8_0", F):
        pytest.skip("this processor lacks the instructions of the compiled products")


def chosen(encoder, w, x_1D, threads):
    """The product with every latent, and the general path's choice."""
    kernel, pre_1F = kernels(), np.empty((1, w.num_latents), np.float32)
    assert kernel is not None
    u_D, address = encoder_input(w, x_1D)[0].copy(), encoder._affine.weight_address
    kernel.affine(encoder.dtype, address, u_D, w.b_enc_F, pre_1F[0], threads)
    return select(w, pre_1F)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", OWN)
def test_a_row_in_one_call_is_the_encoding_and_the_error_bit_for_bit(dtype, variant, threads):
    w, stored = sae(np.random.default_rng(11), dtype)
    w = dataclasses.replace(w, **VARIANTS[variant])
    encoder = GgmlEncoder(w, n_threads=threads, stored=stored)
    row = encoder.row_reading()
    assert row is not None
    for x_1D in rows_of(w)[:, None]:
        row.x_D[:] = x_1D[0]
        found = row.read(F)
        assert found is not None
        idx_NK, vals_NK = chosen(encoder, w, x_1D, threads)
        for ours, theirs in zip(encoder.encode(x_1D), (idx_NK, vals_NK), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        fired = int(np.count_nonzero(vals_NK))
        pairs = np.frombuffer(found[0], [("latent", np.int32), ("value", np.float32)])
        assert found[1] == fired
        np.testing.assert_array_equal(pairs["latent"], idx_NK[0, :fired])
        np.testing.assert_array_equal(pairs["value"], vals_NK[0, :fired])
        assert found[2] == encoder.squared_error(x_1D, idx_NK, vals_NK)[0]
        assert found[2] == pytest.approx(NumpyEncoder(w).squared_error(x_1D, idx_NK, vals_NK)[0], rel=1e-5)
        if w.variant == "topk":
            idx_1K, vals_1K = (np.pad(pairs[name], (0, w.k - fired))[None] for name in ("latent", "value"))
            check_support(oracle(w, x_1D), idx_1K, vals_1K, w.k, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ["Q5_1", "Q4_1"])
def test_types_without_a_product_of_our_own_are_read_by_ggml(dtype):
    w, stored = sae(np.random.default_rng(11), dtype)
    assert GgmlEncoder(w, n_threads=1, stored=stored).row_reading() is None


def test_equal_values_go_to_the_lower_latents_whatever_the_number_of_threads():
    w = sae(np.random.default_rng(2))[0]
    w = dataclasses.replace(w, W_enc_FD=np.repeat(w.W_enc_FD[:8], F // 8, axis=0), b_enc_F=np.zeros(F))
    x_1D = rows_of(w, 1)
    expected = select(w, (x_1D - w.b_dec_D) @ w.W_enc_FD.T)
    for threads in (1, 2, 3):
        row = GgmlEncoder(w, n_threads=threads).row_reading()
        assert row is not None
        row.x_D[:] = x_1D[0]
        found = row.read(3)
        assert found is not None
        assert [latent for latent, _ in PAIR.iter_unpack(found[0])] == expected[0][0, :3].tolist()


@pytest.mark.parametrize("value", [1e5, np.nan, np.inf])
def test_a_row_that_the_type_cannot_hold_is_left_to_the_general_path(value):
    w, stored = sae(np.random.default_rng(3), "F16")
    row = GgmlEncoder(w, n_threads=2, stored=stored).row_reading()
    assert row is not None
    row.x_D[:] = rows_of(w, 1)[0]
    row.x_D[4] = value
    assert row.read(3) is None


@pytest.mark.parametrize(
    "changes",
    [{"variant": "groupmax", "k": 16}, {"norm_mode": "layer", "norm_eps": 1e-5, "norm_correction": 1}],
    ids=["groupmax", "layer norm"],
)
def test_other_saes_have_no_such_call(changes):
    w = dataclasses.replace(sae(np.random.default_rng(7))[0], **changes)
    assert GgmlEncoder(w, n_threads=1).row_reading() is None
    assert NumpyEncoder(w).row_reading() is None


def test_a_q4_0_matrix_that_ggml_leaves_as_it_is_has_none():
    w, stored = sae(np.random.default_rng(5), "Q4_0")
    cut = dataclasses.replace(
        w, W_enc_FD=w.W_enc_FD[:639], W_dec_FD=w.W_dec_FD[:639], b_enc_F=w.b_enc_F[:639]
    )  # fmt: skip
    raw = stored.raw.reshape(F, -1)[:639].reshape(-1)
    encoder = GgmlEncoder(cut, n_threads=1, stored=dataclasses.replace(stored, shape=(639, D), raw=raw))
    assert encoder.row_reading() is None
    x_1D = rows_of(cut, 1)
    check_support(oracle(cut, x_1D), *encoder.encode(x_1D), cut.k, ROUNDING["Q4_0"])


class Counted(Reader):
    """Counts how often Python is handed rows."""

    calls = 0

    def _read(self, rows):
        type(self).calls += 1
        super()._read(rows)

    def _read_input(self, rows):
        type(self).calls += 1
        super()._read_input(rows)


def readings(saes, *, general, interventions=(), max_tokens=8):
    """Of a generation, with the calls of `_read`; `general`: without the compiled call."""
    Counted.calls = 0
    readers = [Counted(w, top=4, encoder=GgmlEncoder(w, n_threads=1)) for w in saes]
    if general:
        for reader in readers:
            reader._place = reader._input_place = None
    stream = generate(
        session(), tiny()[0], prompt(), readers=readers, interventions=interventions, max_tokens=max_tokens
    )
    return list(stream), Counted.calls


def test_a_generation_reads_the_same_with_and_without_python_in_between():
    saes = [sae_at(block, seed=block) for block in (0, 1, 1, 3)]  # two at one tensor, one in the last block
    ours, our_calls = readings(saes, general=False)
    theirs, their_calls = readings(saes, general=True)
    made = [event for event in ours if event.phase == "response" and event.readings]
    assert len(made) > 4
    assert our_calls == len(saes), "Python sees the prompt"
    assert their_calls >= len(saes) * (1 + len(made))
    for a, b in zip(ours, theirs, strict=True):
        assert a.to_json() == b.to_json()


@pytest.mark.parametrize(("reads", "writes"), [(MID, OUT), (INSIDE, OUT)])
def test_transcoders_are_read_the_same_with_and_without_python_in_between(reads, writes):
    w = transcoder(reads, writes)
    assert GgmlEncoder(w, n_threads=1).row_reading() is not None
    saes = [w, sae_at(1, seed=1), transcoder(reads, writes, k=3)]
    ours, our_calls = readings(saes, general=False)
    theirs, their_calls = readings(saes, general=True)
    made = [event for event in ours if event.phase == "response" and event.readings]
    assert len(made) > 4
    assert our_calls == 5, "Python sees the prompt, of a transcoder at two points"
    assert their_calls >= 5 * (1 + len(made))
    for a, b in zip(ours, theirs, strict=True):
        for mine, general in zip(a.readings, b.readings, strict=True):
            assert mine.latents == general.latents
            assert (mine.hook, mine.hook_out, mine.l0) == (general.hook, general.hook_out, general.l0)
            assert mine.fvu == pytest.approx(general.fvu, rel=1e-5)
    assert {(r.hook, r.hook_out) for r in made[0].readings} == {(reads, writes), (saes[1].hook, "")}


def test_a_transcoder_with_a_skip_matrix_is_read_by_python():
    w = transcoder(skip=True)
    assert GgmlEncoder(w, n_threads=1).row_reading() is None
    assert [a.to_json() for a in readings([w], general=False)[0]] == [
        a.to_json() for a in readings([w], general=True)[0]
    ]


def test_a_transcoders_row_that_the_type_cannot_hold_takes_the_general_way(monkeypatch):
    w = transcoder()
    expected = readings([w], general=True)[0]
    monkeypatch.setattr(reading.CompiledRow, "found", lambda self, top: None)
    found = readings([w], general=False)[0]
    for a, b in zip(found, expected, strict=True):
        assert a.to_json() == b.to_json()


def test_with_an_edit_the_rows_go_through_python():
    w = sae_at(1, seed=1)
    clamp = Clamp(point=HookPoint.parse("blocks.0.hook_resid_post"), weights=sae_at(0), latents=(3,), values=(4.0,))
    ours, our_calls = readings([w], general=False, interventions=[clamp])
    theirs, their_calls = readings([w], general=True, interventions=[clamp])
    assert our_calls == their_calls > 4
    assert [a.to_json() for a in ours] == [b.to_json() for b in theirs]


def decode(s, token, pos, hooks):
    return s.decode(np.array([token]), np.array([0]), np.array([pos]), hooks=hooks, logits="last")


def test_rows_not_yet_taken_are_kept():
    w, s = sae_at(1), session()
    reader, general = (Reader(w, encoder=GgmlEncoder(w, n_threads=1)) for _ in range(2))
    general._place = None
    hooks = [reader.hook()], [general.hook()]
    taken = []
    for own, chosen in zip((reader, general), hooks, strict=True):
        s.clear()
        for pos, token in enumerate(prompt()[:5].tolist()):
            decode(s, token, pos, chosen)
        taken.append(own.take(0, [3, 1, 4]))
        decode(s, 7, 5, chosen)
        assert own.take(0, []) == []
        decode(s, 8, 6, chosen)
        with pytest.raises(KeyError):
            own.take(0, [5])
    for ours, theirs in zip(*taken, strict=True):
        assert ours.latents == theirs.latents
        assert ours.fvu == pytest.approx(theirs.fvu, rel=1e-12)


def test_an_sae_of_another_width_is_refused_as_ever():
    w, s = sae(np.random.default_rng(0))[0], session()  # 96 wide, the model 64
    reader = Reader(dataclasses.replace(w, hook="blocks.1.hook_resid_post"), encoder=GgmlEncoder(w, n_threads=1))
    decode(s, 5, 0, [reader.hook()])
    with pytest.raises(ShapeError, match=r"\(rows, 96\)"):
        reader.take(0, [0])


@pytest.mark.parametrize("field", ["op", "width", "name"])
def test_a_graph_that_is_not_the_one_looked_at_is_an_error_and_the_session_goes_on(field):
    w, s = sae_at(1), session()
    reader = Reader(w, encoder=GgmlEncoder(w, n_threads=1))
    hooks = [reader.hook()]
    logits = decode(s, 5, 0, hooks)
    assert len(reader.take(0, [0])) == 1
    assert s._rows is not None
    right = s._rows._reads
    wrong = type(right[0]).from_buffer_copy(right[0])
    setattr(wrong, field, 32 if field == "width" else b"another")
    s._rows._reads = [wrong]
    with pytest.raises(LlamaError, match=r"the graph changed: llama\.cpp gave no row of 'blocks\.1\.hook_resid_post'"):
        decode(s, 6, 1, hooks)
    s._rows._reads = right
    assert s.n_past[0] == 0
    np.testing.assert_array_equal(decode(s, 5, 0, hooks), logits)


def test_ctrl_c_while_a_row_is_read_comes_out_and_the_session_goes_on():
    w, s = sae_at(1), session()
    reader = Reader(w, encoder=GgmlEncoder(w, n_threads=1))
    hooks = [reader.hook()]
    decode(s, 5, 0, hooks)
    reader.take(0, [0])
    timer = threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()

    def on() -> None:
        for pos in range(1, 200):
            decode(s, 6, pos, hooks)
            reader.take(0, [pos])

    with pytest.raises(KeyboardInterrupt):
        on()
    timer.join()
    s.clear()
    reader.take(0, [])
    decode(s, 5, 0, hooks)
    assert len(reader.take(0, [0])) == 1


def test_a_point_seen_both_ways_has_the_same_values():
    s = session()
    point = HookPoint.parse("blocks.2.hook_resid_mid")
    w = dataclasses.replace(sae_at(1), hook=str(point))
    reader, seen = Reader(w, encoder=GgmlEncoder(w, n_threads=1)), []
    decode(s, 5, 0, [reader.hook()])
    assert reader._place is not None
    assert reader._place.held == (0, 0)
    s.clear()
    decode(s, 5, 0, [Hook(point, read=lambda rows: seen.append(rows.values_ND.copy()))])
    assert reader._row is not None
    np.testing.assert_array_equal(reader._row.x_D, seen[0][0])


def test_without_the_processors_own_instructions_the_parts_are_the_same():
    plain = Kernels(build("reading-plain", reading.SOURCES, [reading._COMMON], headers=reading.HEADERS))
    if plain.has_affine("F32", F):
        pytest.skip("the compiler's default processor has the instructions")
    own = kernels()
    assert own is not None
    w = sae(np.random.default_rng(4))[0]
    x_ND = rows_of(w)
    pre_NF = ((x_ND - w.b_dec_D) @ w.W_enc_FD.T + w.b_enc_F).astype(np.float32)
    found, expected = plain.largest(pre_NF, w.k, 1), own.largest(pre_NF, w.k, 1)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    decoder = decoder_of(w.W_dec_FD, w.b_dec_D)
    assert decoder is not None
    errors = [kernel.squared_error(decoder, x_ND, *found) for kernel in (plain, own)]
    np.testing.assert_allclose(*errors, rtol=1e-6)
    encoder: Encoder = GgmlEncoder(w, n_threads=1)
    encoder._native = plain  # type: ignore[attr-defined]
    encoder._one_row = False  # type: ignore[attr-defined]
    assert encoder.row_reading() is None
    np.testing.assert_array_equal(encoder.encode(x_ND)[0], found[0])
