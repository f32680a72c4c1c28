"""Per-latent columns of SAEs over several hook points against float64 arrays that hold everything densely."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.latents import dictionary_summary, wired_columns
from pipeline.evaluation.ports import OutputMetrics, ports_of
from sae.errors import ConfigError
from sae.latent_statistics import LatentStatistics
from sae.runtime import decode, encode
from sae.wiring import spans
from tests.evaluation.test_wired import dense
from tests.sae.toy import random_weights

N, F, K = 300, 24, 4
WIDTHS, SCALES = (6, 10, 3), (4.0, 0.5, 32.0)
CROSS = tuple((f"p{i}", width) for i, width in enumerate(WIDTHS))


def crosscoder():
    """Of hook points of very different scale, with rows that are nearly what it can reconstruct."""
    rng = np.random.default_rng(0)
    scale_O = np.repeat(SCALES, WIDTHS)
    w = random_weights(rng, d=sum(WIDTHS), latents=F, k=K, hook="p0", ports=CROSS)
    w = random_weights(
        rng, d=sum(WIDTHS), latents=F, k=K, hook="p0", ports=CROSS,
        W_enc_FD=w.W_dec_FD / scale_O, W_dec_FD=w.W_dec_FD * scale_O, b_dec_D=w.b_dec_D * scale_O,
    )  # fmt: skip
    y_NO = rng.exponential(size=(N, F)) * (rng.random((N, F)) < 0.15) @ w.W_dec_FD + w.b_dec_D
    return w, (y_NO + 0.2 * scale_O * rng.standard_normal(y_NO.shape)).astype(np.float32)


def measured(w, x_NI, y_NO):
    _, outputs = ports_of(w)
    statistics, metrics = LatentStatistics(w.W_dec_FD, spans(outputs)), OutputMetrics(outputs, w.num_latents)
    for rows in np.array_split(np.arange(len(x_NI)), 3):
        idx_NK, vals_NK = encode(w, x_NI[rows])
        y_hat_NO = decode(w, idx_NK, vals_NK, x_NI[rows])
        metrics.update(y_NO[rows], y_hat_NO, idx_NK, vals_NK)
        statistics.update(y_NO[rows], y_hat_NO, idx_NK, vals_NK)
    return statistics, metrics


def test_explained_is_the_rise_of_the_fvu_that_is_reported_and_of_each_outputs_own():
    w, y_NO = crosscoder()
    statistics, metrics = measured(w, y_NO, y_NO)
    metrics.scale_P = list(SCALES)
    columns = wired_columns(w, statistics, metrics.scatter_P, SCALES, searched=0, seed=0)
    a_NF, y_hat_NO = dense(w, y_NO.astype(np.float64))
    y_NO, scale_O, parts = y_NO.astype(np.float64), np.repeat(SCALES, WIDTHS), spans(CROSS)

    def fvu(found_NO, part=slice(None)):
        error_NO, off_NO = ((d_NO / scale_O)[:, part] for d_NO in (y_NO - found_NO, y_NO - y_NO.mean(axis=0)))
        return (error_NO**2).sum() / (off_NO**2).sum()

    assert metrics.result()["fvu"] == pytest.approx(fvu(y_hat_NO), rel=1e-5)
    for latent in range(F):
        without_NO = y_hat_NO - np.outer(a_NF[:, latent], w.W_dec_FD[latent].astype(np.float64))
        rise = fvu(without_NO) - fvu(y_hat_NO)
        assert columns["explained"][latent] == pytest.approx(rise, rel=1e-4, abs=1e-7)
        for p, part in enumerate(parts):
            rise = fvu(without_NO, part) - fvu(y_hat_NO, part)
            assert columns["explained_of"][latent, p] == pytest.approx(rise, rel=1e-4, abs=1e-7)
    assert abs(columns["explained"]).max() > 0.03
    np.testing.assert_allclose(columns["density"], (a_NF > 0).mean(axis=0), atol=1e-12)


def test_directions_are_taken_at_the_scales_they_were_trained_at():
    w, y_NO = crosscoder()
    statistics, metrics = measured(w, y_NO, y_NO)
    columns = wired_columns(w, statistics, metrics.scatter_P, SCALES, searched=0, seed=0)
    relative_O = np.repeat(SCALES, WIDTHS) / max(SCALES)
    W_dec, W_enc = w.W_dec_FD.astype(np.float64) / relative_O, w.W_enc_FD.astype(np.float64) * relative_O

    def nearest(W):
        unit = W / np.linalg.norm(W, axis=1, keepdims=True)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -np.inf)
        return cosines.max(axis=1), cosines.argmax(axis=1)

    for name, W in (("decoder", W_dec), ("encoder", W_enc)):
        cosine_F, latent_F = nearest(W)
        np.testing.assert_allclose(columns[f"{name}_nearest"], cosine_F, atol=1e-6)
        np.testing.assert_array_equal(columns[f"{name}_nearest_latent"], latent_F)
        np.testing.assert_allclose(columns[f"{name}_norm"], np.linalg.norm(W, axis=1), rtol=1e-6)
    raw, _ = nearest(w.W_dec_FD.astype(np.float64))
    assert abs(raw - columns["decoder_nearest"]).max() > 0.1  # the scales do count
    for p, part in enumerate(spans(CROSS)):
        cosine_F, latent_F = nearest(W_dec[:, part])
        np.testing.assert_allclose(columns["decoder_nearest_of"][:, p], cosine_F, atol=1e-6)
        np.testing.assert_array_equal(columns["decoder_nearest_latent_of"][:, p], latent_F)
    np.testing.assert_allclose((columns["decoder_norm_of"] ** 2).sum(axis=1), columns["decoder_norm"] ** 2, rtol=1e-5)
    np.testing.assert_allclose(columns["encoder_decoder_cosine"], 1, atol=1e-6)  # the encoder is the decoder here
    assert set(dictionary_summary(columns)) == {
        "searched", "decoder_nearest", "encoder_nearest", "encoder_decoder_cosine",
    }  # fmt: skip


def test_of_an_encoder_that_reads_another_space_there_is_no_cosine_with_the_decoder():
    rng = np.random.default_rng(3)
    w = random_weights(rng, d=8, latents=F, k=K, hook="a", hook_out="b", b_dec_subtracted=False)
    x_ND, y_ND = rng.standard_normal((2, N, 8)).astype(np.float32)
    statistics, metrics = measured(w, x_ND, y_ND)
    columns = wired_columns(w, statistics, metrics.scatter_P, [2.0], searched=10, seed=0)
    assert "encoder_decoder_cosine" not in columns
    assert set(dictionary_summary(columns)) == {"searched", "decoder_nearest", "encoder_nearest"}
    assert {len(column) for column in columns.values()} == {F}
    np.testing.assert_array_equal(columns["explained_of"][:, 0], columns["explained"])
    np.testing.assert_array_equal(columns["decoder_nearest_of"][:, 0], columns["decoder_nearest"])
    np.testing.assert_allclose(columns["decoder_norm"], 1, rtol=1e-6)  # as they are in the file, with a scale of 2
    assert (columns["decoder_nearest_latent"] >= 0).sum() == 10


@pytest.mark.parametrize(
    "ports",
    [(("a", 5), ("b", 2), ("b", 1)), (("a", 2), ("a", 3), ("b", 3)), (("a", 4), ("b", 4)), (("a", 8),), (("a", 5), ("b", 3), ("c", 0))],
)  # fmt: skip
def test_hook_points_that_do_not_divide_the_columns_are_refused(ports):
    rng = np.random.default_rng(0)
    said = "hook points that differ, of 5 columns read and 3 reconstructed|do not add up to 8"
    with pytest.raises(ConfigError, match=said):
        ports_of(
            random_weights(
                rng, d=3, latents=F, k=K, hook="a", hook_out="b", b_dec_subtracted=False,
                W_enc_FD=rng.standard_normal((F, 5)), ports=ports,
            )
        )  # fmt: skip
