from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from convert.sae_gguf import read_decoder_norms, read_sae_gguf, write_sae_gguf
from convert.verify import TOLERANCES, verify
from sae.errors import CheckFailedError, ShapeError

from .test_sae_gguf import random_sae


def sparse_rows(sae, n=400, *, seed=3):
    """Rows with structure the SAE knows: a few decoder directions on its bias, plus noise."""
    rng = np.random.default_rng(seed)
    a_NF = rng.exponential(3.0, (n, sae.num_latents)) * (rng.random((n, sae.num_latents)) < 4 / sae.num_latents)
    noise_ND = 0.1 * rng.standard_normal((n, sae.d_in))
    return (a_NF @ sae.W_dec_FD + sae.b_dec_D + noise_ND).astype(np.float32)


def oracle(sae, W_enc_FD, W_dec_FD, x_ND):
    """FVU, L0 and active sets in dense float64."""
    pre_NF = (x_ND.astype(np.float64) - sae.b_dec_D) @ W_enc_FD.astype(np.float64).T + sae.b_enc_F
    a_NF = np.maximum(pre_NF, 0)
    a_NF[a_NF < np.sort(a_NF, axis=1)[:, [-sae.k]]] = 0
    x_hat_ND = a_NF @ W_dec_FD.astype(np.float64) + sae.b_dec_D
    centred_ND = x_ND - x_ND.astype(np.float64).mean(axis=0)
    return ((x_ND - x_hat_ND) ** 2).sum() / (centred_ND**2).sum(), a_NF > 0


def test_an_f32_file_is_exact(tmp_path):
    sae = random_sae()
    x_ND = sparse_rows(sae)
    report = verify(sae, write_sae_gguf(tmp_path / "a.gguf", sae, encoder_type="F32", decoder_type="F32"), x_ND)
    fvu, active_NF = oracle(sae, sae.W_enc_FD, sae.W_dec_FD, x_ND)
    assert report["fvu_source"] == pytest.approx(fvu, rel=1e-5)
    assert report["fvu_file"] == report["fvu_source"]
    assert report["l0"] == report["l0_source"] == pytest.approx(active_NF.sum(axis=1).mean(), abs=1e-9)
    assert report["topk_overlap"] == 1.0
    assert all(value == 0 for key, value in report.items() if key.startswith(("relative.", "max_abs.")))


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_rounded_files_stay_in_their_tolerance_and_the_numbers_are_right(tmp_path, kind):
    sae = random_sae()
    x_ND = sparse_rows(sae)
    path = write_sae_gguf(tmp_path / "a.gguf", sae, encoder_type=kind, decoder_type=kind)
    report = verify(sae, path, x_ND)
    back = read_sae_gguf(path)
    fvu, active_NF = oracle(back, back.W_enc_FD, back.W_dec_FD, x_ND)
    _, source_NF = oracle(sae, sae.W_enc_FD, sae.W_dec_FD, x_ND)
    overlap = (active_NF & source_NF).sum(1) / np.maximum(active_NF.sum(1), source_NF.sum(1))
    assert report["fvu_file"] == pytest.approx(fvu, rel=1e-4)
    assert report["topk_overlap"] == pytest.approx(overlap.mean(), abs=2e-3)
    assert 0 < report["relative.W_enc_FD"] < TOLERANCES[kind].relative
    assert report["max_abs.b_dec_D"] == 0


def test_each_matrix_is_held_to_its_own_type_and_fvu_to_the_coarser(tmp_path):
    sae = random_sae()
    x_ND = sparse_rows(sae)
    for kinds in (("F32", "Q4_0"), ("Q4_0", "F32")):
        path = write_sae_gguf(tmp_path / "a.gguf", sae, encoder_type=kinds[0], decoder_type=kinds[1])
        report = verify(sae, path, x_ND)
        assert 0 < abs(report["fvu_file"] - report["fvu_source"]) < TOLERANCES["Q4_0"].fvu
        name, coarse = ("W_enc_FD", "W_dec_FD") if kinds[0] == "F32" else ("W_dec_FD", "W_enc_FD")
        assert (report[f"relative.{name}"], report[f"relative.{coarse}"] > 0) == (0, True)
        changed = dataclasses.replace(sae, **{name: getattr(sae, name) * np.float32(1.01)})
        path = write_sae_gguf(tmp_path / "b.gguf", changed, encoder_type=kinds[0], decoder_type=kinds[1])
        with pytest.raises(CheckFailedError, match=f"relative.{name} 1.00e-02 > 0"):
            verify(sae, path, x_ND)


def test_fewer_common_latents_than_the_encoders_type_may_cost_are_found(tmp_path, monkeypatch):
    sae = random_sae()
    x_ND = sparse_rows(sae)
    path = write_sae_gguf(tmp_path / "a.gguf", sae, encoder_type="Q4_0", decoder_type="F32")
    found = verify(sae, path, x_ND)["topk_overlap"]
    assert TOLERANCES["Q4_0"].overlap < found < 0.99
    monkeypatch.setitem(TOLERANCES, "Q4_0", dataclasses.replace(TOLERANCES["Q4_0"], overlap=0.99))
    with pytest.raises(CheckFailedError, match=f"top-k overlap {found:.3f} < 0.99"):
        verify(sae, path, x_ND)


def test_a_transcoders_file_is_held_against_what_the_source_makes_of_the_probe(tmp_path):
    sae = random_sae(hook_out="blocks.2.hook_mlp_out", b_dec_subtracted=False)
    x_ND = sparse_rows(sae)
    report = verify(sae, write_sae_gguf(tmp_path / "a.gguf", sae, encoder_type="F32", decoder_type="Q8_0"), x_ND)
    back = read_sae_gguf(tmp_path / "a.gguf")
    a_NF = np.maximum(x_ND.astype(np.float64) @ sae.W_enc_FD.astype(np.float64).T + sae.b_enc_F, 0)
    a_NF[a_NF < np.sort(a_NF, axis=1)[:, [-sae.k]]] = 0
    y_NO, rest_NO = (a_NF @ W_FO.astype(np.float64) for W_FO in (sae.W_dec_FD, back.W_dec_FD - sae.W_dec_FD))
    assert report["fvu_source"] == 0
    assert report["fvu_file"] == pytest.approx((rest_NO**2).sum() / ((y_NO - y_NO.mean(axis=0)) ** 2).sum(), rel=1e-2)


def test_beyond_an_fvu_of_1_the_change_is_a_share_of_it(tmp_path):
    sae = random_sae()
    rows = sparse_rows(sae)
    far = dataclasses.replace(sae, W_dec_FD=-300 * sae.W_dec_FD)  # an SAE of another place: FVU in the thousands
    report = verify(far, write_sae_gguf(tmp_path / "far.gguf", far, encoder_type="F16", decoder_type="F16"), rows)
    assert report["fvu_source"] > 1000
    assert 1e-3 < abs(report["fvu_file"] - report["fvu_source"]) < 1e-3 * report["fvu_source"]


def test_a_file_of_another_sae_fails_with_exit_code_3(tmp_path):
    sae = random_sae()
    path = write_sae_gguf(tmp_path / "a.gguf", random_sae(seed=1))
    with pytest.raises(CheckFailedError, match="does not match its source") as caught:
        verify(sae, path, sparse_rows(sae))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["W_enc_FD", "W_dec_FD", "b_enc_F", "b_dec_D", "mean_D"])
def test_one_percent_more_in_any_array_is_found(tmp_path, name):
    sae = random_sae()
    changed = dataclasses.replace(sae, **{name: getattr(sae, name) * np.float32(1.01)})
    path = write_sae_gguf(tmp_path / "a.gguf", changed)
    with pytest.raises(CheckFailedError, match=name):
        verify(sae, path, sparse_rows(sae))


def test_other_norms_than_those_of_the_rows_are_found(tmp_path, monkeypatch):
    sae = random_sae()
    assert read_decoder_norms(write_sae_gguf(tmp_path / "a.gguf", sae)) == pytest.approx(
        np.linalg.norm(sae.W_dec_FD, axis=1)
    )
    monkeypatch.setattr("convert.sae_gguf.np.linalg.norm", lambda x, axis: np.full(len(x), 99.0))
    path = write_sae_gguf(tmp_path / "b.gguf", sae)
    monkeypatch.undo()
    with pytest.raises(CheckFailedError, match=r"b.gguf does not match its source: dec.norm holds other lengths"):
        verify(sae, path, sparse_rows(sae))


def test_a_file_is_checked_before_it_has_its_name(tmp_path):
    sae, reports = random_sae(), []
    probe_ND = sparse_rows(sae)
    good = write_sae_gguf(tmp_path / "good.gguf", sae, check=lambda path: reports.append(verify(sae, path, probe_ND)))
    assert reports == [verify(sae, good, probe_ND)]
    before = good.read_bytes()
    for name in ("good.gguf", "bad.gguf"):
        with pytest.raises(ShapeError, match=r"\(rows, 64\), got \(3, 65\)"):
            write_sae_gguf(tmp_path / name, sae, check=lambda path: verify(sae, path, np.zeros((3, 65), np.float32)))
    assert [p.name for p in tmp_path.iterdir()] == ["good.gguf"]
    assert good.read_bytes() == before
