"""The ggml encoder against a float64 oracle and the numpy path: every type, every variant, one row and many."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import gguf
import numpy as np
import pytest

from convert.gguf_file import encode_matrix
from convert.sae_gguf import StoredMatrix, read_sae_gguf, read_stored_encoder, write_sae_gguf
from pipeline.generate import generate
from pipeline.interventions.ablate import Ablate
from pipeline.interventions.clamp import Clamp
from pipeline.interventions.replace import Reconstruct
from pipeline.llama import encoder as module
from pipeline.llama.encoder import GgmlEncoder, open_encoder
from pipeline.llama.ggml_graph import Affine, Backend, row_bytes
from pipeline.llama.hooks import HookPoint
from pipeline.readout import Reader
from sae.encoders import NumpyEncoder, encoder_of
from sae.errors import LlamaError, ShapeError
from sae.runtime import encode
from sae.weights import SAEWeights
from tests.interventions.tiny import prompt, residual, sae_at, session, tiny

D, F, K = 96, 640, 12
# ||pre - oracle|| / ||oracle|| against the stored (rounded) weights: what ggml rounds is the row, to half, bfloat16
# or blocks of 8-bit integers
ROUNDING = {"F32": 1e-5, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 1e-2, "Q5_1": 1e-2, "Q4_1": 1e-2, "Q4_0": 1e-2}


def stored_matrix(W_FD, dtype):
    kind = gguf.GGMLQuantizationType[dtype]
    raw = np.ascontiguousarray(gguf.quants.quantize(W_FD, kind)).view(np.uint8)
    rounded_FD = gguf.quants.dequantize(raw.reshape(len(W_FD), -1), kind).reshape(W_FD.shape)
    return StoredMatrix(dtype=dtype, shape=W_FD.shape, raw=raw.reshape(-1)), rounded_FD.astype(np.float32)


def sae(rng, dtype="F32", **changes):
    W_dec_FD = rng.standard_normal((F, D)).astype(np.float32)
    stored, W_enc_FD = stored_matrix(W_dec_FD / np.float32(np.sqrt(D)), dtype)
    b_dec_D = rng.standard_normal(D).astype(np.float32)
    weights = SAEWeights(
        W_enc_FD=W_enc_FD, b_enc_F=0.1 * rng.standard_normal(F), W_dec_FD=W_dec_FD, b_dec_D=b_dec_D, mean_D=b_dec_D,
        variance=1.0, k=K, hook="blocks.0.hook_resid_post", **changes,
    )  # fmt: skip
    return weights, stored


def oracle(w, x_ND):
    """Pre-activations in float64."""
    x_ND = x_ND.astype(np.float64)
    if w.norm_mode == "layer":
        sigma_N1 = x_ND.std(axis=1, keepdims=True, ddof=w.norm_correction)
        x_ND = (x_ND - x_ND.mean(axis=1, keepdims=True)) / (sigma_N1 + w.norm_eps)
    return (x_ND - w.b_dec_D * w.b_dec_subtracted) @ w.W_enc_FD.astype(np.float64).T + w.b_enc_F


def check_support(pre_NF, idx_NK, vals_NK, k, tolerance):
    """The latents chosen are the k largest above zero, up to those within the rounding of the edge; sorted; values."""
    for pre_F, idx_K, vals_K in zip(pre_NF, idx_NK, vals_NK, strict=True):
        margin = 4 * tolerance * np.sqrt((pre_F**2).mean())
        edge = max(np.sort(pre_F)[-k], 0.0)
        chosen = idx_K[vals_K > 0]
        assert len(set(chosen.tolist())) == len(chosen) <= k
        assert (
            set(np.flatnonzero(pre_F > edge + margin))
            <= set(chosen.tolist())
            <= set(np.flatnonzero(pre_F > edge - margin))
        )
        assert (np.diff(vals_K) <= 0).all()
        assert np.abs(vals_K[vals_K > 0] - pre_F[chosen]).max() < margin
        assert not idx_K[vals_K == 0].any()


@pytest.mark.parametrize("rows", [1, 5, 23])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_latents_and_values_are_the_oracles_within_the_types_rounding(dtype, rows):
    rng = np.random.default_rng(rows)
    w, stored = sae(rng, dtype)
    x_ND = (w.b_dec_D + 2 * rng.standard_normal((rows, D))).astype(np.float32)
    encoder = GgmlEncoder(w, n_threads=2, stored=stored)
    encoder._step = 8  # several blocks and a rest
    pre_NF = oracle(w, x_ND)
    check_support(pre_NF, *encoder.encode(x_ND), K, ROUNDING[dtype])
    found_NF = encoder._affine.pre_acts(x_ND - w.b_dec_D)
    assert np.linalg.norm(found_NF - pre_NF) < ROUNDING[dtype] * np.linalg.norm(pre_NF)


def test_another_matrix_would_be_noticed():
    rng = np.random.default_rng(0)
    w, _ = sae(rng, "Q8_0")
    other = GgmlEncoder(w, n_threads=1, stored=sae(rng, "Q8_0")[1])
    x_ND = rng.standard_normal((3, D)).astype(np.float32)
    with pytest.raises(AssertionError):
        check_support(oracle(w, x_ND), *other.encode(x_ND), K, ROUNDING["Q8_0"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"b_dec_subtracted": False},
        {"norm_mode": "layer", "norm_eps": 1e-5, "norm_correction": 1},
        {"variant": "threshold", "threshold_F": np.linspace(0.5, 2.0, F)},
        {"variant": "groupmax", "k": 16},
        {"variant": "threshold", "threshold_F": np.full(F, 1e9)},
        {"k": F},
    ],
    ids=["topk", "b_dec kept", "layer norm", "threshold", "groupmax", "silent", "all latents"],
)
def test_every_variant_is_numpys_in_float32(changes):
    rng = np.random.default_rng(7)
    w = dataclasses.replace(sae(rng)[0], **changes)
    x_ND = (3 * rng.standard_normal((40, D))).astype(np.float32)
    idx_NK, vals_NK = encode(w, x_ND)
    found = GgmlEncoder(w, n_threads=1).encode(x_ND)
    assert found[0].shape == idx_NK.shape
    np.testing.assert_array_equal(found[0], idx_NK)
    np.testing.assert_allclose(found[1], vals_NK, rtol=1e-5, atol=1e-5)


def test_fewer_positive_pre_activations_than_k_leave_empty_slots():
    w = dataclasses.replace(sae(np.random.default_rng(1))[0], b_enc_F=np.full(F, -4.0))
    x_ND = (w.b_dec_D + np.random.default_rng(2).standard_normal((6, D))).astype(np.float32)
    idx_NK, vals_NK = encode(w, x_ND)
    assert ((vals_NK == 0).sum(axis=1) > 0).any()
    found = GgmlEncoder(w, n_threads=1).encode(x_ND)
    np.testing.assert_array_equal(found[0], idx_NK)


def test_rows_a_half_cannot_hold_are_encoded_by_numpy():
    rng = np.random.default_rng(3)
    w, stored = sae(rng, "F16")
    x_ND = rng.standard_normal((2, D)).astype(np.float32)
    x_ND[1, 4] = 1e5
    found = GgmlEncoder(w, n_threads=1, stored=stored).encode(x_ND)
    for ours, numpys in zip(found, encode(w, x_ND), strict=True):
        np.testing.assert_array_equal(ours, numpys)


def test_no_rows_give_no_rows():
    w, _ = sae(np.random.default_rng(0))
    assert GgmlEncoder(w, n_threads=1).encode(np.empty((0, D), np.float32))[0].shape == (0, K)


def test_ever_new_numbers_of_rows_give_the_same_numbers():
    rng = np.random.default_rng(4)
    w, _ = sae(rng)
    encoder = GgmlEncoder(w, n_threads=1)
    x_ND = rng.standard_normal((9, D)).astype(np.float32)
    whole = encoder.encode(x_ND)
    for rows in (1, 2, 3, 4, 5, 1, 2):
        np.testing.assert_array_equal(encoder.encode(x_ND[:rows])[0], whole[0][:rows])
    assert len(encoder._affine._graphs._kept) <= 3


def test_rows_changed_in_place_are_encoded_again():
    rng = np.random.default_rng(5)
    w, _ = sae(rng)
    x_ND = rng.standard_normal((2, D)).astype(np.float32)
    for encoder in (NumpyEncoder(w), GgmlEncoder(w, n_threads=1)):
        first = encoder.encode(x_ND)
        assert encoder.encode(x_ND) is first
        x_ND[0] *= -1
        np.testing.assert_array_equal(encoder.encode(x_ND)[0], encode(w, x_ND)[0])


def test_every_layout_of_the_device_multiplies_alike():
    rng = np.random.default_rng(6)
    backend = Backend(n_threads=2)
    stored, W_FD = stored_matrix(rng.standard_normal((F, D)).astype(np.float32), "Q4_0")
    kind = int(gguf.GGMLQuantizationType.Q4_0)
    x_ND = rng.standard_normal((5, D)).astype(np.float32)
    expected_NF = x_ND.astype(np.float64) @ W_FD.T.astype(np.float64)
    layouts = set()
    for skipped in range(len(backend.buffer_types())):
        backend = Backend(n_threads=2)
        found = backend.buffer_types()[skipped:]
        backend.buffer_types = lambda found=found: found  # type: ignore[method-assign]
        affine = Affine(backend, kind, stored.raw, D, np.zeros(F))
        layouts.add(affine.layout)
        assert np.linalg.norm(affine.pre_acts(x_ND) - expected_NF) < 1e-2 * np.linalg.norm(expected_NF)
    assert "CPU" in layouts


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0"])
def test_a_files_encoder_is_used_in_its_stored_type(dtype, tmp_path):
    rng = np.random.default_rng(8)
    w, _ = sae(rng)
    path = write_sae_gguf(tmp_path / "sae.gguf", w, encoder_type=dtype)
    stored = read_stored_encoder(path)
    assert stored.dtype == dtype
    assert stored.raw.tobytes() == encode_matrix("W", w.W_enc_FD, dtype)[0].tobytes()
    assert stored.raw.nbytes == F * row_bytes(int(gguf.GGMLQuantizationType[dtype]), D)
    x_ND = rng.standard_normal((4, D)).astype(np.float32)
    read = read_sae_gguf(path)
    encoder = GgmlEncoder(read, n_threads=1, stored=stored)
    assert encoder.name.endswith(f":{dtype}")
    check_support(oracle(read, x_ND), *encoder.encode(x_ND), K, ROUNDING[dtype])


def test_what_does_not_fit_is_refused_and_auto_says_why_it_takes_numpy(listen):
    heard = listen(module)
    w, stored = sae(np.random.default_rng(9))
    cut = dataclasses.replace(stored, raw=stored.raw[:-4])
    with pytest.raises(LlamaError, match="expected 640 rows"):
        open_encoder(w, "ggml", n_threads=1, stored=cut)
    with pytest.raises(LlamaError, match="no encoder of type I8"):
        GgmlEncoder(w, n_threads=1, stored=dataclasses.replace(stored, dtype="I8"))
    with pytest.raises(ShapeError, match="the stored encoder is"):
        GgmlEncoder(w, n_threads=1, stored=dataclasses.replace(stored, shape=(F, D + 1)))
    assert open_encoder(w, "auto", n_threads=1, stored=cut) is None
    assert "the encoder runs in numpy, which is slower" in "".join(heard)
    assert open_encoder(w, "numpy", n_threads=1) is None
    with pytest.raises(ShapeError, match="the encoder is of an SAE of 640 latents"):
        encoder_of(sae_at(0), GgmlEncoder(w, n_threads=1))


def test_several_saes_at_several_blocks_read_a_generation_alike():
    model = tiny()[0]
    saes = [sae_at(block, seed=block) for block in (0, 1, 1, 3)]
    encoders = [GgmlEncoder(w, n_threads=1) for w in saes]
    runs = []
    for chosen in ([None] * 4, encoders):
        readers = [Reader(w, top=6, encoder=e) for w, e in zip(saes, chosen, strict=True)]
        clamp = Clamp(
            point=HookPoint.parse(saes[1].hook), weights=saes[1], latents=(3,), values=(4.0,), encoder=chosen[1]
        )
        runs.append(list(generate(session(), model, prompt(), interventions=[clamp], readers=readers, max_tokens=5)))
    numpys, ours = runs
    assert [e.token for e in ours] == [e.token for e in numpys]
    assert sum(len(e.readings) for e in ours) > 40
    for a, b in zip(ours, numpys, strict=True):
        for x, y in zip(a.readings, b.readings, strict=True):
            assert [latent for latent, _ in x.latents] == [latent for latent, _ in y.latents]
            np.testing.assert_allclose([v for _, v in x.latents], [v for _, v in y.latents], rtol=1e-4)
            assert x.fvu == pytest.approx(y.fvu, rel=1e-4)


PROGRAM = """
import os
import numpy as np
from pipeline.llama.encoder import GgmlEncoder
from pipeline.llama.session import Session
from tests.llama.support import tiny
from tests.llama.test_encoder import D, sae

def threads():
    return len(os.listdir("/proc/self/task"))

def encode_with(n_threads):
    for dtype in ("F32", "Q8_0"):
        rng = np.random.default_rng(0)
        w, stored = sae(rng, dtype)
        encoder = GgmlEncoder(w, n_threads=n_threads, stored=stored)
        for rows in (23, 1):
            encoder.encode(rng.standard_normal((rows, D)).astype(np.float32))
        if (row := encoder.row_reading()) is not None:
            row.x_D[:] = 1
            row.read(3)

with Session(tiny()[0], n_ctx=64, n_threads=2) as session:
    session.decode(np.arange(3, 8), np.zeros(5, int), np.arange(5), logits="last")
    counts = [threads()]
    for n_threads in (2, 4):
        encode_with(n_threads)
        counts.append(threads())
    print(*counts, "omp" in open("/proc/self/maps").read())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_the_encoder_computes_on_the_models_own_threads():
    """Many rows, one row, and a row in the compiled call; twice as many threads would be seen."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    *counts, openmp = done.stdout.split()
    if openmp != "True":
        pytest.skip("ggml has no OpenMP here: its threads end with each graph")
    model, same, more = map(int, counts)
    assert same == model
    assert more == model + 2


def test_edits_take_the_encoders_result_and_are_named_by_it():
    w = sae_at(1)
    encoder = GgmlEncoder(w, n_threads=1)
    point = HookPoint.parse(w.hook)
    x_TD = residual(session(), prompt(), w.hook)[1:]
    latents = tuple(int(i) for i in encode(w, x_TD)[0][:, 0][:3])
    places = np.zeros(len(x_TD), np.int64)
    kinds = (
        lambda e: Clamp(point=point, weights=w, latents=tuple(set(latents)), values=(2.0,) * len(set(latents)), encoder=e),
        lambda e: Ablate(point=point, weights=w, latents=tuple(set(latents)), encoder=e),
        lambda e: Reconstruct(point=point, weights=w, encoder=e),
    )  # fmt: skip
    for kind in kinds:
        numpys, ours = kind(None), kind(encoder)
        expected_ND = numpys.change(x_TD, places, places)
        assert np.abs(expected_ND).max() > 0.1
        found_ND = ours.change(x_TD, places, places)
        assert np.linalg.norm(found_ND - expected_ND) < 1e-5 * np.linalg.norm(expected_ND)
        assert ours.key() != numpys.key()
        assert encoder.name in ours.key()
