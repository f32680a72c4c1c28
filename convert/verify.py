"""Reads an SAE GGUF back and holds it against the SAE it was written from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sae.errors import CheckFailedError, ShapeError
from sae.metrics import mean_overlap, top_k_overlap
from sae.runtime import decode, encode
from sae.weights import SAEWeights

from .sae_gguf import read_decoder_norms, read_sae_gguf, sae_file_info


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What one matrix type may cost.

    relative: ||file - source|| / ||source|| of a matrix. Rounding moves a value by at most 2^-11 of it in F16 and 2^-8
    in BF16; in blocks of 32 by 1/254 of the largest in Q8_0, a sixteenth of it in Q4_0 (an eighth at the clipped end),
    1/30 of the range in Q4_1 and 1/62 in Q5_1. fvu: |fvu_file - fvu_source|. overlap: least mean share of common
    latents; of the encoder's type only.
    """

    relative: float
    fvu: float
    overlap: float


TOLERANCES = {
    "F32": Tolerance(relative=0.0, fvu=0.0, overlap=1.0),
    "F16": Tolerance(relative=5e-4, fvu=1e-3, overlap=0.99),
    "BF16": Tolerance(relative=4e-3, fvu=2e-3, overlap=0.98),
    "Q8_0": Tolerance(relative=2e-2, fvu=1e-2, overlap=0.95),
    "Q5_1": Tolerance(relative=8e-2, fvu=2e-2, overlap=0.9),
    "Q4_1": Tolerance(relative=1.6e-1, fvu=5e-2, overlap=0.8),
    "Q4_0": Tolerance(relative=1.6e-1, fvu=5e-2, overlap=0.8),
}
_FACTS = (
    "hook", "hook_out", "ports", "variant", "k", "b_dec_subtracted", "norm_mode", "norm_eps", "norm_correction", "variance", "labels",
)  # fmt: skip
_ARRAYS = ("W_enc_FD", "W_dec_FD", "b_enc_F", "b_dec_D", "mean_D", "threshold_F", "freq_F", "W_skip_OD")


def allowed(encoder_type: str, decoder_type: str) -> Tolerance:
    """What a file of these types may cost; `relative` is that of the encoder."""
    encoder, decoder = TOLERANCES[encoder_type], TOLERANCES[decoder_type]
    return Tolerance(relative=encoder.relative, fvu=max(encoder.fvu, decoder.fvu), overlap=encoder.overlap)


def verify(weights: SAEWeights, path: str | Path, probe_ND: np.ndarray, entry: int = 0) -> dict[str, float]:
    """Compares an SAE of the file with its source on `probe_ND` (N, D) rows in raw model units.

    Returns fvu_source, fvu_file (FVU = sum||x - x_hat||^2 / sum||x - mean||^2 over the probe, mean of the probe; of a
    transcoder with the source's own output for x),
    l0_source, l0 (mean latents above zero), topk_overlap (mean over rows of |A & B| / max(|A|, |B|, 1) of the active
    sets), and relative.NAME, max_abs.NAME per tensor. Raises CheckFailedError beyond TOLERANCES of the file's types,
    and where the two are not the same SAE: another shape, k, variant or hook point.
    """
    d_in = weights.d_in
    if probe_ND.ndim != 2 or probe_ND.shape[1] != d_in or len(probe_ND) == 0:
        raise ShapeError(f"the probe should be (rows, {d_in}), got {probe_ND.shape}")
    info, stored = sae_file_info(path, entry), read_sae_gguf(path, entry)
    _check_facts(weights, stored, path)
    report = _compare_codes(weights, stored, np.asarray(probe_ND, dtype=np.float32))
    for name in _ARRAYS:
        report |= _compare_array(name, getattr(weights, name), getattr(stored, name), path)
    _judge(report, info.encoder_type, info.decoder_type, path)
    norm_F, wanted_F = read_decoder_norms(path, entry), np.linalg.norm(weights.W_dec_FD, axis=1)
    if norm_F is not None and not np.allclose(norm_F, wanted_F, rtol=1e-5, atol=0):
        raise CheckFailedError(
            f"{path} does not match its source: dec.norm holds other lengths than its decoder's rows have"
        )
    return report


def _check_facts(source: SAEWeights, stored: SAEWeights, path: str | Path) -> None:
    wrong = [
        f"{name} is {str(getattr(stored, name))[:60]}, expected {str(getattr(source, name))[:60]}"
        for name in _FACTS
        if getattr(stored, name) != getattr(source, name)
    ]
    shapes = [(one.num_latents, one.d_in, one.d_out) for one in (stored, source)]
    if shapes[0] != shapes[1]:
        wrong.append(f"(latents, d_in, d_out) is {shapes[0]}, expected {shapes[1]}")
    if wrong:
        raise CheckFailedError(f"{path} does not match its source: {'; '.join(wrong)}")


def _compare_codes(source: SAEWeights, stored: SAEWeights, probe_ND: np.ndarray) -> dict[str, float]:
    report: dict[str, float] = {}
    codes = []
    target_NO = probe_ND
    if source.hook_out:  # what it should reconstruct is not in the probe: hold the file against the source's output
        target_NO = decode(source, *encode(source, probe_ND), probe_ND)
    centred_ND = target_NO.astype(np.float64) - target_NO.mean(axis=0, dtype=np.float64)
    total = float((centred_ND**2).sum())
    for fvu_key, l0_key, w in (("fvu_source", "l0_source", source), ("fvu_file", "l0", stored)):
        idx_NK, vals_NK = encode(w, probe_ND)
        residual_ND = target_NO.astype(np.float64) - decode(w, idx_NK, vals_NK, probe_ND)
        report[fvu_key] = float((residual_ND**2).sum()) / total if total else float("nan")
        report[l0_key] = float((vals_NK > 0).sum(axis=1).mean())
        codes.append((idx_NK, vals_NK))
    report["topk_overlap"] = mean_overlap(top_k_overlap(*codes))
    return report


def _compare_array(
    name: str, source: np.ndarray | None, stored: np.ndarray | None, path: str | Path
) -> dict[str, float]:
    if source is None and stored is None:
        return {}
    if source is None or stored is None:
        raise CheckFailedError(f"{path}: {name} is in only one of the file and its source; write the file again")
    gap = np.abs(stored.astype(np.float64) - source)
    norm = float(np.linalg.norm(source.astype(np.float64)))
    size = float(np.linalg.norm(gap))
    return {f"relative.{name}": size / norm if norm else size, f"max_abs.{name}": float(gap.max(initial=0.0))}


def _judge(report: dict[str, float], encoder_type: str, decoder_type: str, path: str | Path) -> None:
    limits = {f"relative.{name}": 0.0 for name in _ARRAYS if f"relative.{name}" in report}
    limits["relative.W_enc_FD"] = TOLERANCES[encoder_type].relative
    limits["relative.W_dec_FD"] = TOLERANCES[decoder_type].relative
    wrong = [f"{key} {report[key]:.2e} > {limit:.0e}" for key, limit in limits.items() if not report[key] <= limit]
    limit = allowed(encoder_type, decoder_type)
    fvu_gap = abs(report["fvu_file"] - report["fvu_source"])
    if fvu_gap > limit.fvu * max(1.0, report["fvu_source"]):  # above 1 a share of it: an SAE of another place
        wrong.append(f"FVU moved by {fvu_gap:.2e} > {limit.fvu:.0e}")
    if report["topk_overlap"] < limit.overlap:
        wrong.append(f"top-k overlap {report['topk_overlap']:.3f} < {limit.overlap}")
    if wrong:
        kinds = f"encoder {encoder_type}, decoder {decoder_type}"
        raise CheckFailedError(f"{path} ({kinds}) does not match its source: {'; '.join(wrong)}")
