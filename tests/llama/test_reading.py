"""The compiled parts of a reading against ggml, the general path and float64; and one token against the general batch."""

from __future__ import annotations

import platform

import gguf
import numpy as np
import pytest

from convert.gguf_file import encode_matrix
from convert.sae_gguf import read_sae_gguf, write_sae_gguf
from pipeline.llama import encoder as module
from pipeline.llama import reading
from pipeline.llama.encoder import GgmlEncoder
from pipeline.llama.ggml_graph import Affine, Backend
from pipeline.llama.hooks import HookPoint
from pipeline.llama.reading import Kernels, decoder_of, kernels
from pipeline.llama.session import Hook
from sae.encoders import NumpyEncoder
from sae.errors import LlamaError, ShapeError
from sae.native.build import build, processor
from sae.runtime import encode, select
from tests.interventions.tiny import prompt, session

from .test_encoder import K, check_support, oracle, sae, stored_matrix


@pytest.fixture(scope="module", params=["native", "x86-64-v3", "x86-64"])
def native(request) -> Kernels:
    """As this processor has it, and as one with AVX2 alone and one without anything would."""
    if request.param == "native":
        found = kernels()
        assert found is not None, "the machine's compiler should build reading.c"
        return found
    if platform.machine() != "x86_64" or (request.param == "x86-64-v3" and "avx2" not in processor()):
        pytest.skip("another processor")
    flags = (*reading._COMMON, f"-march={request.param}", "-fopenmp", "-Werror=implicit-function-declaration")
    return Kernels(build("reading_of_another", reading.SOURCES, [flags], headers=reading.HEADERS))


@pytest.mark.parametrize(("D", "F"), [(32, 104), (96, 640), (160, 257), (512, 300), (71, 65)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "within"), [("Q8_0", 1e-2), ("Q4_0", 1e-2), ("F32", 1e-6), ("F16", 1e-3), ("BF16", 1e-2)]
)
def test_the_product_is_ggmls_up_to_the_order_of_sums(native, D, F, threads, dtype, within):
    if not native.has_affine(dtype, F):
        pytest.skip("this processor lacks the instructions, or ggml leaves the matrix as it is: ggml computes it")
    if D % 32 and dtype in ("Q8_0", "Q4_0"):
        pytest.skip("rows in blocks of 32")
    rng = np.random.default_rng(D)
    stored, rounded_FD = stored_matrix(rng.standard_normal((F, D)).astype(np.float32), dtype)
    b_F = rng.standard_normal(F).astype(np.float32)
    affine = Affine(Backend(n_threads=1), int(gguf.GGMLQuantizationType[dtype]), stored.raw, D, b_F)
    for scale in (1e-3, 1.0, 3e4 if dtype in ("Q8_0", "Q4_0") else 1e3):  # beyond 65504 F16 is for the general path
        u_D = (scale * rng.standard_normal(D)).astype(np.float32)
        u_D[:32] = 0 if scale == 1.0 and D > 32 else u_D[:32]  # a block of zeros
        pre_F = np.full(F, np.nan, np.float32)
        native.affine(dtype, affine.weight_address, u_D, b_F, pre_F, threads)
        ggmls_F = affine.pre_acts(u_D[None])[0]
        largest = np.abs(ggmls_F).max()
        np.testing.assert_allclose(pre_F, ggmls_F, rtol=0, atol=1e-6 * largest)
        exact_F = rounded_FD.astype(np.float64) @ u_D + b_F
        assert np.linalg.norm(pre_F - exact_F) < within * np.linalg.norm(exact_F)


def test_the_smallest_byte_of_a_file_is_multiplied_as_any(native):
    if not native.has_affine("Q8_0", 64):
        pytest.skip("this processor lacks the instructions")
    D, F = 128, 64
    rng = np.random.default_rng(5)
    blocks = np.zeros((F, D // 32, 34), np.uint8)
    blocks[:, :, :2] = np.full((F, D // 32, 1), 0.01, np.float16).view(np.uint8)
    blocks[:, :, 2:] = (
        np.where(rng.random((F, D // 32, 32)) < 0.5, -128, rng.choice([127, 0, -1])).astype(np.int8).view(np.uint8)
    )
    rows_FD = gguf.quants.dequantize(blocks.reshape(F, -1), gguf.GGMLQuantizationType.Q8_0).astype(np.float64)
    u_D = rng.choice([-127.0, 127.0, 64.0, 0.0], D).astype(np.float32)  # exact in eight bits, scale 1
    u_D[::32] = 127
    pre_F = np.empty(F, np.float32)
    native.affine("Q8_0", blocks.ctypes.data, u_D, np.zeros(F, np.float32), pre_F, 1)
    np.testing.assert_allclose(pre_F, rows_FD @ u_D, rtol=1e-5, atol=1e-2)


def test_a_type_without_a_product_is_said(native):
    assert not native.has_affine("Q4_1", 64)
    assert not native.has_affine("Q8_K", 64)


@pytest.mark.parametrize("k", [1, 7, 640])
def test_the_largest_are_the_general_paths_ties_and_silent_rows_too(native, k):
    rng = np.random.default_rng(k)
    w = sae(rng)[0]
    pre_NF = rng.standard_normal((9, w.num_latents)).astype(np.float32)
    pre_NF[1] = np.round(pre_NF[1])  # ties
    pre_NF[2] = -np.abs(pre_NF[2])  # nothing fires
    pre_NF[3] = 0.5
    pre_NF[4, 5:] = 0.0
    import dataclasses

    expected = select(dataclasses.replace(w, k=k), pre_NF)
    for threads in (1, 2):
        found = native.largest(pre_NF, k, threads)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0"])
def test_the_error_of_the_reconstruction_is_that_of_float64(native, tmp_path, dtype):
    rng = np.random.default_rng(3)
    w = sae(rng)[0]
    path = write_sae_gguf(tmp_path / "sae.gguf", w, encoder_type="F32", decoder_type=dtype)
    file, whole = read_sae_gguf(path, stored=True), read_sae_gguf(path)
    x_ND = (w.b_dec_D + 2 * rng.standard_normal((6, w.d_in))).astype(np.float32)
    idx_NK, vals_NK = encode(whole, x_ND)
    idx_NK[0], vals_NK[0] = 0, 0  # nothing fired
    W_FD = whole.W_dec_FD.astype(np.float64)
    x_hat_ND = np.einsum("nk,nkd->nd", vals_NK.astype(np.float64), W_FD[idx_NK]) + whole.b_dec_D
    expected_N = ((x_ND - x_hat_ND) ** 2).sum(axis=1)
    decoder = decoder_of(file.W_dec_FD, file.b_dec_D)
    assert decoder is not None
    np.testing.assert_allclose(native.squared_error(decoder, x_ND, idx_NK, vals_NK), expected_N, rtol=1e-5)
    np.testing.assert_allclose(NumpyEncoder(file).squared_error(x_ND, idx_NK, vals_NK), expected_N, rtol=1e-5)
    floats = decoder_of(whole.W_dec_FD, whole.b_dec_D)
    assert floats is not None
    np.testing.assert_allclose(native.squared_error(floats, x_ND, idx_NK, vals_NK), expected_N, rtol=1e-5)


def test_bfloat16_rows_are_read_exactly(native):
    raw, kind = np.arange(4 * 64, dtype=np.uint16).reshape(4, 64) + 0x3F00, gguf.GGMLQuantizationType.BF16
    from pipeline.llama.reading import Decoder

    W_FD = gguf.quants.dequantize(raw.view(np.uint8), kind)
    decoder = Decoder(W_FD, raw.view(np.uint8), int(kind), np.zeros(64, np.float32))
    error_N = native.squared_error(
        decoder, np.zeros((1, 64), np.float32), np.array([[2]], np.int32), np.array([[1.0]], np.float32)
    )
    assert error_N[0] == pytest.approx((W_FD[2].astype(np.float64) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("rows", [1, 30])
def test_readings_with_and_without_the_compiled_parts_are_the_same(monkeypatch, dtype, rows):
    rng = np.random.default_rng(11)
    w, stored = sae(rng, dtype)
    x_ND = (w.b_dec_D + 2 * rng.standard_normal((rows, w.d_in))).astype(np.float32)
    ours = GgmlEncoder(w, n_threads=2, stored=stored)
    monkeypatch.setattr(module, "kernels", lambda: None)
    general = GgmlEncoder(w, n_threads=2, stored=stored)
    assert general.selects_on_device
    assert not ours.selects_on_device
    (idx_NK, vals_NK), (their_idx_NK, their_vals_NK) = ours.encode(x_ND), general.encode(x_ND)
    np.testing.assert_array_equal(idx_NK, their_idx_NK)
    np.testing.assert_allclose(vals_NK, their_vals_NK, rtol=2e-6)
    check_support(oracle(w, x_ND), idx_NK, vals_NK, K, 1e-2)
    errors = (e.squared_error(x_ND, idx_NK, vals_NK) for e in (ours, general, NumpyEncoder(w)))
    ours_N, general_N, numpy_N = errors
    np.testing.assert_allclose(ours_N, numpy_N, rtol=1e-5)
    np.testing.assert_array_equal(general_N, numpy_N)


def test_one_token_decodes_as_through_the_general_batch_bit_for_bit(monkeypatch):
    tokens = prompt()[:12]
    runs = []
    for general in (False, True):
        s = session(n_seq_max=2, kv_unified=False, n_ctx=64)
        if general:
            monkeypatch.setattr(s._token, "take", lambda *args: None)
        seen, logits = [], []

        def read(rows, seen=seen):
            seen.append((rows.values_ND.copy(), rows.seq_N.copy(), rows.pos_N.copy(), rows.index_N.copy()))

        hooks = [Hook(HookPoint.parse("blocks.1.hook_resid_post"), read=read)]
        for i, token in enumerate(tokens):
            for seq in (1, 0):
                found = s.decode(np.array([token + seq]), np.array([seq]), np.array([i]), hooks=hooks, logits="last")
                logits.append(found.copy())
        runs.append((seen, logits, s.n_past))
    (seen, logits, past), (their_seen, their_logits, their_past) = runs
    for ours, theirs in zip(seen, their_seen, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(logits, their_logits)
    np.testing.assert_array_equal(past, their_past)


@pytest.mark.parametrize(
    ("token", "seq", "pos", "error", "said"),
    [
        (-1, 0, 0, ShapeError, "vocabulary"),
        (10**6, 0, 0, ShapeError, "vocabulary"),
        (5, 1, 0, ShapeError, "sequence id"),
        (5, 0, 3, ShapeError, "positions"),
        (5, 0, 1.5, ShapeError, "integers"),
    ],
)
def test_one_token_that_does_not_fit_is_refused_by_the_general_path(token, seq, pos, error, said):
    s = session()
    with pytest.raises(error, match=said):
        s.decode(np.array([token]), np.array([seq]), np.array([pos]), logits="last")
    full = session(n_ctx=256)
    for i in range(full.n_ctx_seq):
        full.decode(np.array([5]), np.array([0]), np.array([i]))
    with pytest.raises(LlamaError, match="the context holds"):
        full.decode(np.array([5]), np.array([0]), np.array([full.n_ctx_seq]))


def test_a_type_that_reading_does_not_know_goes_through_numpy(native):
    assert decoder_of(encode_matrix("w", np.ones((2, 32), np.float32), "F32")[0], np.zeros(32, np.float32)) is not None
    from sae.rows import RowMatrix

    class Other(RowMatrix):
        shape, type_name = (2, 32), "Q4_0"

        def rows(self, index):
            return np.ones((2, 32), np.float32)[index]

        def pieces(self):
            yield np.zeros(36, np.uint8)

    assert decoder_of(Other(), np.zeros(32, np.float32)) is None
