"""Readings by bounds: the four-bit copy against float64, the bounds themselves, and the same latents to the bit."""

from __future__ import annotations

import ctypes
import dataclasses
import platform

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.llama import reading
from pipeline.llama.encoder import GgmlEncoder
from pipeline.llama.reading import Bounds, CompiledRow, kernels, most_open
from sae.encoders import PAIR
from sae.native.build import OPENMP, build
from sae.weights import SAEWeights

from .test_encoder import stored_matrix

TYPES = ("F32", "F16", "BF16", "Q8_0")
D, F, K = 96, 1024, 8


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    monkeypatch.setattr(reading, "BOUNDS_BYTES", 0)
    found = kernels()
    if found is None or not found.has_affine("Q8_0", F):
        pytest.skip("this processor lacks the instructions of the compiled products")


def sae(W_FD, dtype="F32", **changes):
    """Its encoder in this type, and that as it is stored."""
    stored, W_enc_FD = stored_matrix(W_FD.astype(np.float32), dtype)
    rng = np.random.default_rng(len(W_FD))
    settings = {
        "b_enc_F": 0.1 * rng.standard_normal(len(W_FD)) * np.abs(W_FD).max(),
        "W_dec_FD": rng.standard_normal(W_FD.shape).astype(np.float32),
        "b_dec_D": rng.standard_normal(W_FD.shape[1]).astype(np.float32),
        "mean_D": np.zeros(W_FD.shape[1], np.float32),
        **changes,
    }
    w = SAEWeights(W_enc_FD=W_enc_FD, variance=1.0, k=K, hook="blocks.0.hook_resid_post", **settings)
    return w, stored


def pair(w, stored, threads):
    """The row by bounds, and the row without."""
    encoder = GgmlEncoder(w, n_threads=threads, stored=stored)
    row = encoder.row_reading()
    assert isinstance(row, CompiledRow)
    assert row._bounds_arrays, "it should have bounds"
    del encoder.__dict__["_bounds"]
    reading.BOUNDS_BYTES = 1 << 60
    plain = encoder.row_reading()
    reading.BOUNDS_BYTES = 0
    assert isinstance(plain, CompiledRow)
    assert not plain._bounds_arrays
    return row, plain


def same(row, plain, x_D):
    """Both read this row alike; what they found."""
    for each in (row, plain):
        each.x_D[:] = x_D
    found, expected = row.read(row._c.F), plain.read(plain._c.F)
    assert expected is not None
    assert found == expected
    assert plain.computed == row._c.F
    return expected


def copy_of(bounds: Bounds, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(W_FD as the bounds have it, its steps), float64."""
    latents, width = shape
    groups = bounds.rows.reshape(latents // 8, width // 32, 144)
    step = groups[..., :16].copy().view(np.float16).astype(np.float64)  # (F / 8, D / 32, 8)
    bytes_ = groups[..., 16:].reshape(*groups.shape[:2], 2, 8, 8) ^ 0x88  # half of the block, row, byte
    q = np.stack([bytes_ & 15, bytes_ >> 4], axis=2)  # (.., 16 values, half, row, byte)
    q = q.transpose(0, 4, 1, 2, 3, 5).reshape(latents, width).astype(np.float64)
    step_FD = np.repeat(step.transpose(0, 2, 1).reshape(latents, -1), 32, axis=1)
    return step_FD * (q - 8 - bounds.dither_D.astype(np.float64)), step_FD


def bounds_of(w, dtype, stored):
    kernel = kernels()
    assert kernel is not None
    return kernel.bounds(dtype, stored.raw.ctypes.data, (w.num_latents, w.d_in), 2)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_copy_is_within_half_a_step_whose_error_is_even_and_independent_of_the_weights(dtype):
    rng = np.random.default_rng(1)
    scale_F1 = 10.0 ** rng.uniform(-3, 2, (F, 1))
    w, stored = sae(rng.standard_normal((F, D)) * scale_F1, dtype)
    bounds = bounds_of(w, dtype, stored)
    copy_FD, step_FD = copy_of(bounds, (F, D))
    W_FD = np.asarray(w.W_enc_FD, np.float64)
    largest = np.abs(W_FD).reshape(F, -1, 32).max(axis=2)
    assert (step_FD[:, ::32] >= largest / 7 * (1 - 1e-6)).all()
    assert (step_FD[:, ::32] <= largest / 7 * (1 + 1e-3) + 6e-8).all()
    error_FD = (W_FD - copy_FD) / step_FD
    assert np.abs(error_FD).max() <= 0.5 + 1e-4
    assert error_FD.mean() == pytest.approx(0, abs=0.02)
    assert error_FD.var() == pytest.approx(1 / 12, rel=0.05)
    assert abs(np.corrcoef(error_FD.reshape(-1), (W_FD / step_FD).reshape(-1))[0, 1]) < 0.05
    np.testing.assert_allclose(bounds.norm_F, np.linalg.norm(W_FD, axis=1), rtol=3e-5)


@pytest.mark.parametrize("processor", ["native", "x86-64-v3"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["normal", "one large", "few", "one magnitude"])
def test_the_bounds_are_the_formulas_and_hold(dtype, kind, processor):
    """Float64 for the same formula, and the exact pre-activations below it."""
    rng = np.random.default_rng(3)
    w, stored = sae(rng.standard_normal((F, D)), dtype, b_dec_D=np.zeros(D), b_enc_F=np.zeros(F))
    bounds = bounds_of(w, dtype, stored)
    if processor != "native" and platform.machine() != "x86_64":
        pytest.skip("another processor")
    flags = (*reading._COMMON, f"-march={processor}", *OPENMP)
    library = ctypes.CDLL(str(build("reading_bounds", reading.SOURCES, [flags], headers=reading.HEADERS)))
    u_D = rng.standard_normal(D).astype(np.float32)
    if kind == "one large":
        u_D[7] = 200
    if kind == "few":
        u_D[5:] = 0
    if kind == "one magnitude":
        u_D = np.sign(u_D)
    size, P, code = ctypes.c_int64, ctypes.c_void_p, reading._KINDS[dtype]
    kernel = kernels()
    assert kernel is not None
    room = np.zeros(kernel.bounds_input_bytes(D) // 4 + 1, np.float32)
    approx_F, upper_F = np.empty(F, np.float32), np.empty(F, np.float32)
    library.ggscope_round_for_bounds(
        code, P(u_D.ctypes.data), size(D), P(bounds.dither_D.ctypes.data), P(room.ctypes.data)
    )
    zero_F = np.zeros(F, np.float32)
    places = [P(array.ctypes.data) for array in (room, zero_F)]
    library.ggscope_upper_bounds(
        P(bounds.rows.ctypes.data), P(bounds.norm_F.ctypes.data), size(D), *places, size(0), size(F),
        P(approx_F.ctypes.data), P(upper_F.ctypes.data),
    )  # fmt: skip
    blocks = u_D.reshape(-1, 32).astype(np.float64)
    q = np.rint(blocks / np.maximum(np.abs(blocks).max(axis=1, keepdims=True), 1e-30) * 127)
    scale = (np.abs(blocks).max(axis=1) / 127).astype(np.float16).astype(np.float64)[:, None]
    taken_D = (q * scale).reshape(-1)
    copy_FD, step_FD = copy_of(bounds, (F, D))
    np.testing.assert_allclose(approx_F, copy_FD @ taken_D, atol=1e-3 * np.abs(u_D).max())
    spread_F = np.linalg.norm(step_FD * taken_D, axis=1)
    rest = 0.0 if dtype == "Q8_0" else np.linalg.norm(u_D - taken_D)
    expected_F = copy_FD @ taken_D + (2.15 + 3e-8 * D**1.5) * spread_F + rest * np.linalg.norm(w.W_enc_FD, axis=1)
    np.testing.assert_allclose(upper_F, expected_F, atol=2e-3 * np.abs(u_D).max())
    exact_F = np.asarray(w.W_enc_FD, np.float64) @ (taken_D if dtype == "Q8_0" else u_D.astype(np.float64))
    assert (exact_F <= upper_F).all()
    gap_F = (np.asarray(w.W_enc_FD, np.float64) - copy_FD) @ taken_D / spread_F
    assert np.abs(gap_F).max() < 2.15
    if kind != "one large":  # there nearly all of the error is one weight's
        assert gap_F.std() == pytest.approx(np.sqrt(1 / 12), rel=0.15)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("variant", ["topk", "threshold"])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_latents_and_error_to_the_bit_with_few_products(dtype, variant, threads):
    rng = np.random.default_rng(5)
    W_FD = rng.standard_normal((F, D)) / np.sqrt(D)
    changes = {"variant": "threshold", "threshold_F": np.full(F, 3.0)} if variant == "threshold" else {}
    w, stored = sae(W_FD, dtype, **changes)
    row, plain = pair(w, stored, threads)
    computed = []
    for _ in range(20):
        same(row, plain, w.b_dec_D + 1.5 * rng.standard_normal(D))
        computed.append(row.computed)
    assert np.median(computed) < F / 4
    strong_D = w.b_dec_D + 40 * np.asarray(w.W_enc_FD)[17]  # a row that is nearly one latent
    pairs = list(PAIR.iter_unpack(same(row, plain, strong_D)[0]))
    assert pairs[0][0] == 17


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_that_leave_all_in_question_are_multiplied_whole_and_the_bounds_rest(dtype):
    rng = np.random.default_rng(6)
    w, stored = sae(rng.standard_normal((F, D)), dtype, b_enc_F=np.full(F, 0.5), b_dec_D=np.zeros(D))
    row, plain = pair(w, stored, 2)
    zero_D, pauses = np.zeros(D), []
    for _ in range(12):  # every pre-activation is the bias: ties
        idx = [latent for latent, _ in PAIR.iter_unpack(same(row, plain, zero_D)[0])]
        assert idx == list(range(K))
        pauses.append(row._c.bounds.pause)
        assert row.computed == F
    assert pauses == [1, 0, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2]
    row._c.bounds.pause = 0
    same(row, plain, 3 * rng.standard_normal(D))
    assert row.computed < F / 2
    assert row._c.bounds.pauses == 0


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0"])
def test_weights_of_odd_sizes(dtype):
    rng = np.random.default_rng(7)
    W_FD = rng.standard_normal((F, D))
    W_FD[8:16] = 0
    W_FD[16:24, 32:64] = 0
    W_FD[24:32] *= 1e-7  # less than the least step
    W_FD[32:40] = W_FD[0]  # equal latents
    W_FD[40:48, 5] = 300  # one weight decides its block's step
    w, stored = sae(W_FD, dtype, b_enc_F=np.zeros(F))
    row, plain = pair(w, stored, 2)
    for scale in (1e-6, 1e-2, 1.0, 100.0):
        row._c.bounds.pause = 0
        same(row, plain, w.b_dec_D + scale * rng.standard_normal(D))
    assert row.computed < F


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(("weight", "value"), [(1.0, 1e-26), (1e-24, 1e-6), (1e-15, 1e-20)])
def test_numbers_whose_squares_float32_loses(dtype, weight, value):
    rng = np.random.default_rng(11)
    W_FD = weight * rng.standard_normal((F, D))
    W_FD[8:16] = 0
    nothing = {"b_enc_F": np.zeros(F), "b_dec_D": np.zeros(D)}
    w, stored = sae(W_FD, dtype, variant="threshold", threshold_F=np.zeros(F), **nothing)
    row, plain = pair(w, stored, 2)
    assert len(same(row, plain, value * rng.standard_normal(D))[0]) > F * PAIR.size / 4
    w, stored = sae(W_FD, dtype, **nothing)
    row, plain = pair(dataclasses.replace(w, k=1), stored, 1)
    for _ in range(20):
        row._c.bounds.pause = 0
        same(row, plain, value * rng.standard_normal(D))


def test_q8_0_with_scales_that_are_too_large_for_its_whole_numbers():
    """Of such latents the whole product is its own rounding; no quantising writes them."""
    rng = np.random.default_rng(12)
    latents, width = 256, 4096
    w, stored = sae(rng.standard_normal((latents, width)), "Q8_0", b_enc_F=np.zeros(latents), b_dec_D=np.zeros(width),
                    variant="threshold", threshold_F=np.zeros(latents))  # fmt: skip
    stored.raw.reshape(latents, -1, 34)[8:, :, 2:] = 0
    row, plain = pair(w, stored, 1)
    for _ in range(20):
        row._c.bounds.pause = 0
        same(row, plain, np.abs(rng.standard_normal(width)))


def test_wide_rows_whose_sums_round_one_way():
    """The product of 2^20 equal terms is off by more than the four bits are."""
    width, latents = 1 << 20, 32
    weight_F1 = np.abs(np.random.default_rng(13).standard_normal((latents, 1)))
    w, stored = sae(
        np.repeat(weight_F1, width, axis=1), b_enc_F=np.zeros(latents), b_dec_D=np.zeros(width),
        W_dec_FD=np.zeros((latents, width), np.float32), variant="threshold", threshold_F=np.zeros(latents),
    )  # fmt: skip
    row, plain = pair(w, stored, 1)
    assert w.threshold_F is not None
    x_D = np.full(width, 1.37)
    exact_F = np.zeros(latents, np.float32)
    for latent, value in PAIR.iter_unpack(same(row, plain, x_D)[0]):
        exact_F[latent] = value
    for first in range(0, latents, 4):  # few at a time, or all are multiplied anyway
        w.threshold_F[:] = np.finfo(np.float32).max
        w.threshold_F[first : first + 4] = np.nextafter(exact_F[first : first + 4], np.float32(0))
        row._c.bounds.pause = 0
        assert same(row, plain, x_D)[1] == 4


def test_weights_that_four_bits_cannot_bound_have_no_bounds():
    W_FD = np.random.default_rng(8).standard_normal((F, D)).astype(np.float32)
    w, stored = sae(W_FD)
    assert bounds_of(w, "F32", stored) is not None
    for value in (1e6, np.nan, np.inf):  # seven steps of 65504 at most
        stored.raw.view(np.float32)[100] = value
        assert bounds_of(w, "F32", stored) is None
    kernel = kernels()
    assert kernel is not None
    for dtype, shape in (("Q4_0", (F, D)), ("F32", (F - 1, D)), ("F32", (F, D - 1)), ("Q5_1", (F, D))):
        assert kernel.bounds(dtype, stored.raw.ctypes.data, shape, 1) is None


def test_bounds_are_for_encoders_that_gain_by_them(monkeypatch):
    w, _ = sae(np.random.default_rng(9).standard_normal((F, D)))
    assert most_open("F32", w, 2) == int(F * (1 - 18 / 128) / 2)
    assert most_open("Q8_0", w, 2) == int(F * (1 - 18 / 34) / 2)
    assert most_open("Q4_0", w, 2) == most_open("Q5_1", w, 2) == 0
    assert most_open("Q8_0", dataclasses.replace(w, k=64), 2) == 0
    monkeypatch.setattr(reading, "BOUNDS_BYTES", 4 * F * D + 1)
    assert most_open("F32", w, 2) == 0
    assert GgmlEncoder(w, n_threads=1)._bounds is None


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(TYPES), threads=st.integers(1, 3),
    width=st.sampled_from([32, 64, 160]), latents=st.sampled_from([64, 200, 1000]), k=st.sampled_from([1, 3, 6]),
    spread=st.sampled_from([0.0, 0.5, 2.0]), sparse=st.booleans(), threshold=st.booleans(),
)  # fmt: skip
def test_any_encoder_and_row_are_read_alike(seed, dtype, threads, width, latents, k, spread, sparse, threshold):
    """Rows and columns of very different sizes, rows along latents, thresholds at the edge."""
    rng = np.random.default_rng(seed)
    W_FD = rng.standard_normal((latents, width)) * np.exp(spread * rng.standard_normal((latents, 1)))
    W_FD *= np.exp(spread * rng.standard_normal(width))
    if sparse:
        W_FD *= rng.random((latents, width)) < 0.1
    W_FD = np.clip(W_FD, -6e4, 6e4)  # what F16 holds
    changes = {"variant": "threshold", "threshold_F": np.abs(rng.standard_normal(latents))} if threshold else {}
    w, stored = sae(W_FD, dtype, **changes)
    w = dataclasses.replace(w, k=k)
    if not most_open(dtype, w, threads):
        return
    row, plain = pair(w, stored, threads)
    for latent in rng.integers(0, latents, 4):
        x_D = w.b_dec_D + rng.standard_normal(width) * np.exp(spread * rng.standard_normal(width))
        x_D += rng.choice([0, 1, 10]) * np.asarray(w.W_enc_FD)[latent]
        same(row, plain, np.clip(x_D, -6e4, 6e4))


def test_a_copy_of_the_types_rows_is_read_as_gguf_writes_them():
    """The oracle of this file's own copy: gguf's Q8_0 decoded by gguf."""
    rng = np.random.default_rng(10)
    w, stored = sae(rng.standard_normal((F, D)), "Q8_0")
    rows_FB = stored.raw.reshape(F, -1)
    decoded_FD = gguf.quants.dequantize(rows_FB, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(decoded_FD, w.W_enc_FD)
    copy_FD, step_FD = copy_of(bounds_of(w, "Q8_0", stored), (F, D))
    assert (np.abs(copy_FD - decoded_FD) <= step_FD * 0.5001).all()
