from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.encoders import NumpyEncoder
from sae.errors import ConfigError, ShapeError
from sae.metrics import ReconstructionMetrics
from sae.runtime import decode, encode, latent_values
from sae.untrained import untrained_weights

from .toy import Toy, random_weights


def dense_oracle(w, x_ND):
    """a_NF in float64: every latent, sorted by value then index, the first k kept."""
    shift_D = w.b_dec_D if w.b_dec_subtracted else 0
    pre_NF = (x_ND.astype(np.float64) - shift_D) @ w.W_enc_FD.astype(np.float64).T + w.b_enc_F
    if w.threshold_F is not None:
        return np.where(pre_NF > w.threshold_F, pre_NF, 0)
    acts_NF = np.maximum(pre_NF, 0)
    for row in acts_NF:
        row[np.argsort(-row, kind="stable")[w.k :]] = 0
    return acts_NF


def dense(w, idx_NK, vals_NK):
    out_NF = np.zeros((len(idx_NK), w.num_latents))
    np.add.at(out_NF, (np.arange(len(idx_NK))[:, None], idx_NK), vals_NK)
    return out_NF


def assert_encodes(w, x_ND):
    expected_NF = dense_oracle(w, x_ND)
    idx_NK, vals_NK = encode(w, x_ND)
    assert (idx_NK.dtype, vals_NK.dtype) == (np.int32, np.float32)
    assert np.array_equal(dense(w, idx_NK, vals_NK) > 0, expected_NF > 0)
    np.testing.assert_allclose(dense(w, idx_NK, vals_NK), expected_NF, rtol=2e-5, atol=1e-5)
    assert (np.diff(vals_NK, axis=1) <= 0).all()
    assert (idx_NK[vals_NK == 0] == 0).all()
    x_hat_ND = expected_NF @ w.W_dec_FD.astype(np.float64) + w.b_dec_D
    np.testing.assert_allclose(decode(w, idx_NK, vals_NK), x_hat_ND, rtol=1e-5, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.data(), st.booleans(), st.integers(0, 2**31))
def test_encode_and_decode_equal_a_dense_float64_oracle(latents, data, subtracted, seed):
    rng = np.random.default_rng(seed)
    k = data.draw(st.integers(1, latents))
    w = random_weights(rng, d=6, latents=latents, k=k, b_dec_subtracted=subtracted)
    assert_encodes(w, rng.standard_normal((9, 6)).astype(np.float32))


def test_the_result_does_not_depend_on_the_blocks_the_rows_are_cut_into():
    rng = np.random.default_rng(1)
    w = random_weights(rng, d=8, latents=4096, k=32)
    x_ND = rng.standard_normal((700, 8)).astype(np.float32)
    assert_encodes(w, x_ND)
    parts = [encode(w, part) for part in np.array_split(x_ND, 3)]
    assert np.array_equal(encode(w, x_ND)[0], np.concatenate([idx for idx, _ in parts]))


def test_ties_go_to_the_lower_latent_at_the_edge_and_in_the_order():
    rng = np.random.default_rng(2)
    row_D = np.abs(rng.standard_normal(5))
    w = random_weights(rng, d=5, latents=64, k=7, W_enc_FD=np.tile(row_D, (64, 1)), b_enc_F=np.zeros(64))
    x_ND = (w.b_dec_D + np.abs(rng.standard_normal((3, 5)))).astype(np.float32)
    idx_NK, vals_NK = encode(w, x_ND)
    assert np.array_equal(idx_NK, np.tile(np.arange(7), (3, 1)))
    assert (vals_NK == vals_NK[:, :1]).all()


def test_fewer_positive_pre_activations_than_k_leave_slots_empty():
    rng = np.random.default_rng(3)
    b_enc_F = np.full(50, -1e3)
    b_enc_F[[4, 40]] = 5
    w = random_weights(rng, d=4, latents=50, k=8, b_enc_F=b_enc_F)
    x_ND = np.tile(w.b_dec_D, (3, 1))
    idx_NK, vals_NK = encode(w, x_ND)
    assert np.array_equal(idx_NK, [[4, 40, 0, 0, 0, 0, 0, 0]] * 3)
    assert np.array_equal(vals_NK, [[5, 5, 0, 0, 0, 0, 0, 0]] * 3)
    assert np.array_equal(latent_values(w, x_ND, [0, 40]), [[0, 5]] * 3)


def test_the_threshold_variant_fires_every_latent_above_its_threshold():
    rng = np.random.default_rng(4)
    threshold_F = rng.uniform(0, 2, 90)
    w = random_weights(rng, d=6, latents=90, k=4, variant="threshold", threshold_F=threshold_F)
    x_ND = rng.standard_normal((40, 6)).astype(np.float32)
    assert_encodes(w, x_ND)
    assert encode(w, x_ND[:0])[0].shape == (0, 1)


def test_a_latent_at_its_threshold_stays_silent():
    eye, none = np.eye(3, dtype=np.float32), np.zeros(3, np.float32)
    w = random_weights(
        np.random.default_rng(0), d=3, latents=3, k=1, W_enc_FD=eye, W_dec_FD=eye, b_enc_F=none, b_dec_D=none,
        variant="threshold", threshold_F=np.array([0.5, 2, 0]),
    )  # fmt: skip
    x_ND = np.array([[0.5, 2, 0], [np.nextafter(np.float32(0.5), 1), 2.5, 1e-3]], np.float32)
    np.testing.assert_array_equal(dense(w, *encode(w, x_ND)), [[0, 0, 0], x_ND[1]])


def test_rows_that_are_written_over_are_encoded_anew():
    rng = np.random.default_rng(0)
    encoder = NumpyEncoder(random_weights(rng, d=8, latents=40, k=4))
    x_ND = rng.standard_normal((5, 8)).astype(np.float32)
    before = encoder.encode(x_ND)
    assert encoder.encode(x_ND.copy()) is before  # the last result is kept ...
    x_ND[2] = rng.standard_normal(8)
    for found, expected in zip(encoder.encode(x_ND), encode(encoder.weights, x_ND), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(encoder.encode(x_ND)[1], before[1])


def test_latent_values_are_the_activations_after_top_k_for_any_selection():
    rng = np.random.default_rng(5)
    w = random_weights(rng, d=6, latents=80, k=5)
    x_ND = rng.standard_normal((60, 6)).astype(np.float32)
    expected_NF = dense_oracle(w, x_ND)
    for latents in ([3], [79, 0, 3, 3], np.arange(80), []):
        np.testing.assert_allclose(latent_values(w, x_ND, latents), expected_NF[:, list(latents)], rtol=2e-5, atol=1e-5)


def test_half_precision_input_is_read_as_float32():
    rng = np.random.default_rng(6)
    w = random_weights(rng, d=6, latents=80, k=5)
    x_ND = rng.standard_normal((20, 6)).astype(np.float16)
    assert np.array_equal(encode(w, x_ND)[1], encode(w, x_ND.astype(np.float32))[1])


def test_memory_stays_far_below_the_dense_activations():
    rng = np.random.default_rng(7)
    w = random_weights(rng, d=8, latents=4096, k=16)
    x_ND = rng.standard_normal((8000, 8)).astype(np.float32)  # dense pre-activations: 131 MB
    tracemalloc.start()
    decode(w, *encode(w, x_ND))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


def test_the_untrained_sae_is_tied_and_its_one_scale_is_the_least_squares_one():
    toy = Toy()
    stats, x_ND = toy.statistics(), toy.rows(2000, 5)
    w = untrained_weights(32, 128, 8, seed=3, sample_ND=x_ND, **stats)

    def fvu(weights):
        metrics = ReconstructionMetrics(32, 128)
        idx_NK, vals_NK = encode(weights, x_ND)
        metrics.update(x_ND, decode(weights, idx_NK, vals_NK), idx_NK, vals_NK)
        return metrics.result()["fvu"]

    factor = w.W_enc_FD[0] / w.W_dec_FD[0]
    np.testing.assert_allclose(factor, factor[0], rtol=1e-5)
    best = fvu(w)
    assert best < 1
    for off in (0.97, 1.03):
        moved = untrained_weights(32, 128, 8, seed=3, sample_ND=x_ND, **stats)
        moved.W_enc_FD[:] *= off
        assert fvu(moved) > best
    again = untrained_weights(32, 128, 8, seed=3, sample_ND=x_ND, **stats)
    assert np.array_equal(w.W_enc_FD, again.W_enc_FD)
    assert not np.array_equal(w.W_dec_FD, untrained_weights(32, 128, 8, seed=4, **stats).W_dec_FD)


def test_wrong_shapes_and_settings_are_refused_with_the_sizes_named():
    rng = np.random.default_rng(8)
    w = random_weights(rng, d=6, latents=20, k=5)
    with pytest.raises(ShapeError, match=r"\(rows, 6\)"):
        encode(w, np.zeros((3, 7)))
    with pytest.raises(ShapeError, match="between 0 and 19"):
        latent_values(w, np.zeros((3, 6)), [20])
    with pytest.raises(ShapeError, match=r"\(N, K\)"):
        decode(w, np.zeros((3, 2), np.int32), np.zeros((3, 1)))
    with pytest.raises(ShapeError, match=r"b_enc_F must have shape \(20,\)"):
        random_weights(rng, d=6, latents=20, k=5, b_enc_F=np.zeros(6))
    with pytest.raises(ConfigError, match="k must be between 1 and the 20"):
        random_weights(rng, d=6, latents=20, k=21)
    with pytest.raises(ConfigError, match="known are topk, threshold"):
        random_weights(rng, d=6, latents=20, k=5, variant="relu")
    with pytest.raises(ConfigError, match="needs threshold_F"):
        random_weights(rng, d=6, latents=20, k=5, variant="threshold")
    with pytest.raises(ConfigError, match="variance"):
        random_weights(rng, d=6, latents=20, k=5, variance=float("nan"))
