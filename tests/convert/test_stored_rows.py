"""Matrices of a GGUF kept in their file's type: rows, pieces, refusals, and the memory it saves."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import gguf
import numpy as np
import pytest

from convert.gguf_file import read_gguf
from convert.keys import MATRIX_TYPES
from convert.sae_gguf import read_sae_gguf, write_sae_gguf
from convert.stored_rows import StoredRows
from pipeline.interventions.base import sae_digest
from pipeline.interventions.clamp import Clamp
from pipeline.interventions.steer import Steer
from pipeline.llama.hooks import HookPoint
from sae import rows as rows_module
from sae.errors import FormatError
from sae.runtime import decode, encode

from .test_sae_gguf import random_sae

POINT = HookPoint.parse("blocks.1.hook_resid_post")


@pytest.fixture(params=MATRIX_TYPES)
def files(request, tmp_path):
    """The same file read both ways."""
    sae = random_sae(d_in=64, num_latents=96, k=5)
    path = write_sae_gguf(tmp_path / "sae.gguf", sae, encoder_type=request.param, decoder_type=request.param)
    return read_sae_gguf(path, stored=True), read_sae_gguf(path)


def test_rows_are_those_of_the_whole_matrix(files):
    stored, whole = files
    assert isinstance(stored.W_enc_FD, StoredRows)
    for name in ("W_enc_FD", "W_dec_FD"):
        mine, all_of_it = getattr(stored, name), getattr(whole, name)
        assert mine.shape == all_of_it.shape
        for index in (7, [3, 9, 3], slice(2, 40, 3), np.array([[1, 2, 3], [95, 0, 95]]), np.zeros(0, int)):
            found = mine[index]
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, all_of_it[index])
        np.testing.assert_array_equal(np.asarray(mine), all_of_it)
        np.testing.assert_array_equal(np.concatenate([piece.copy() for piece in mine.pieces()]), mine.raw_FB.ravel())


def test_the_equations_run_on_stored_matrices(files, monkeypatch):
    stored, whole = files
    x_ND = (2 * np.random.default_rng(0).standard_normal((20, 64))).astype(np.float32)
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 7 * 4 * 64)  # several blocks and a rest
    (idx, vals), (their_idx, their_vals) = encode(stored, x_ND), encode(whole, x_ND)
    np.testing.assert_array_equal(idx, their_idx)
    np.testing.assert_allclose(vals, their_vals, rtol=1e-5)
    np.testing.assert_array_equal(decode(stored, idx, vals), decode(whole, idx, vals))
    for kind, word in ((Steer, "coeffs"), (Clamp, "values")):
        changes = [
            kind(point=POINT, weights=w, latents=(3, 8), **{word: (2.0, -1.0)}).change(
                x_ND, np.zeros(20), np.arange(20)
            )
            for w in (stored, whole)
        ]
        np.testing.assert_allclose(*changes, rtol=1e-4, atol=1e-5)


def test_the_digest_names_the_bytes(files, tmp_path):
    stored, _ = files
    other = write_sae_gguf(tmp_path / "b.gguf", random_sae(d_in=64, num_latents=96, k=5, seed=1))
    same = read_sae_gguf(stored.W_enc_FD.path, stored=True)
    assert sae_digest(stored) == sae_digest(same) != sae_digest(read_sae_gguf(other, stored=True))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_values_that_are_not_finite_are_found_in_every_type(tmp_path, kind):
    qtype = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    raw = np.ascontiguousarray(gguf.quants.quantize(rng.standard_normal((6, 64)).astype(np.float32), qtype))
    raw = raw.view(np.uint8).reshape(6, -1)
    found = 0
    for trial in range(150):
        damaged = raw.copy()
        if trial:
            damaged.reshape(-1)[rng.integers(raw.size, size=2)] = rng.choice([0x7C, 0xFC, 0x7F, 0xFF, 0x80], 2)
        path = tmp_path / "raw"
        path.write_bytes(b"head" + damaged.tobytes())
        rows = StoredRows(path, 4, damaged.reshape(-1), kind, (6, 64))
        with np.errstate(invalid="ignore", over="ignore"):
            expected = bool(np.isfinite(gguf.quants.dequantize(damaged, qtype)).all())
            assert rows.is_finite() == expected
        found += not expected
    assert found > 0
    assert StoredRows(path, 4, raw.reshape(-1), kind, (6, 64)).shape == (6, 64)


def test_a_file_of_values_that_are_not_finite_or_that_shrinks_is_refused(tmp_path):
    path = write_sae_gguf(tmp_path / "sae.gguf", random_sae(d_in=64, num_latents=96), encoder_type="F16")
    start = read_gguf(path).tensors["sae.0.enc.weight"].start
    data = bytearray(path.read_bytes())
    data[start + 1] = 0x7C
    data[start] = 0
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(FormatError, match="weight holds values that are not finite"):
        read_sae_gguf(tmp_path / "bad.gguf", stored=True)
    rows = read_sae_gguf(path, stored=True).W_enc_FD
    short = dataclasses.replace(read_sae_gguf(path, stored=True)).W_enc_FD
    assert isinstance(short, StoredRows)
    short.path = tmp_path / "short"
    short.path.write_bytes(path.read_bytes()[: start + 100])
    with pytest.raises(FormatError, match="became shorter"):
        list(short.pieces())
    assert sum(piece.size for piece in rows.pieces()) == rows.raw_FB.size


PROGRAM = """
import sys
import numpy as np
from pathlib import Path
from convert.sae_gguf import read_sae_gguf
from pipeline.llama.encoder import GgmlEncoder
from pipeline.readout import Reader
from pipeline.llama.session import Rows
from tests.convert.test_sae_gguf import random_sae
from tests.peak_memory import peak_kib

def read(weights, encoder):
    reader = Reader(weights, encoder=encoder)
    x_ND = np.random.default_rng(0).standard_normal((4, weights.d_in)).astype(np.float32)
    reader._read(Rows(x_ND, np.zeros(4, int), np.arange(4)))
    return reader.take(0, [0, 1, 2, 3])

small = random_sae(d_in=512, num_latents=64)
read(small, GgmlEncoder(small, n_threads=1))
before = peak_kib()
weights = read_sae_gguf(sys.argv[1], stored=sys.argv[2] == "stored")
assert read(weights, GgmlEncoder(weights, n_threads=1))[0].l0
print((peak_kib() - before) * 1024 / Path(sys.argv[1]).stat().st_size)
"""


def test_reading_a_q8_0_file_takes_about_the_memory_of_its_bytes(tmp_path):
    sae = random_sae(d_in=512, num_latents=16384, k=8)
    path = write_sae_gguf(tmp_path / "sae.gguf", sae, encoder_type="Q8_0", decoder_type="Q8_0")
    shares = {}
    for way in ("stored", "whole"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path), way], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        shares[way] = float(done.stdout)
    bounds = 18 / 68  # of the file: 18/32 byte for each weight of the encoder, 34/32 for each of both matrices
    assert shares["stored"] < 1.3 + bounds < 3 < shares["whole"], shares
