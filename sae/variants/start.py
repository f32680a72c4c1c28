"""Fine-tuning: a model's parameters set to those of an SAE in raw model units, the inverse of `export`.

Shape letters: D d_in, O d_out, F latents.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from ..model import SparseCoder
from ..thresholds import is_one
from ..weights import SAEWeights
from ..wiring import Wiring
from .batchtopk import BatchSelecting
from .gated import GatedSAE
from .jumprelu import JumpReLUSAE

EQUAL = 1e-3  # norms that differ by no more than this share count as equal
LEAST_THETA = 0.01  # of s: JumpReLU's thresholds are above 0, one of 0 becomes this


@torch.no_grad()
def load_start_(model: SparseCoder, w: SAEWeights) -> None:
    """Put `w` into the model. What it computes is then what `w` computes, for the variant of `w`; another variant
    starts from its matrices and biases, and from its thresholds where it has some.

    Raises:
        ConfigError: sizes, sides, norm or rows that do not fit.
    """
    _check(model, w)
    wiring = model.wiring
    scale_W = np.broadcast_to(np.asarray(model.scale, np.float64), (model.d_in,))
    in_I, out_O = (scale_W[: wiring.d_in], scale_W[wiring.target]) if wiring.inputs else (scale_W, scale_W)
    common = float(out_O.max())
    W_dec_FO = w.W_dec_FD.astype(np.float64) * (common / out_O)
    W_enc_FD = w.W_enc_FD.astype(np.float64) * (in_I / common)
    b_enc_F, threshold_F = w.b_enc_F.astype(np.float64) / common, w.threshold_F
    b_dec_O = w.b_dec_D.astype(np.float64) / out_O
    theta_F = threshold_F.astype(np.float64) / common if threshold_F is not None else np.zeros_like(b_enc_F)
    norm_F = np.linalg.norm(W_dec_FO, axis=1)
    norm_F = np.where(norm_F > 0, norm_F, 1.0)
    ranked_F = theta_F * norm_F  # latents are compared by pre ||W_dec[i]||
    if model.unit_rows:
        W_dec_FO, W_enc_FD = W_dec_FO / norm_F[:, None], W_enc_FD * norm_F[:, None]
        b_enc_F, theta_F = b_enc_F * norm_F, theta_F * norm_F
    if wiring.two_sided:
        centre_I = model.centre_I.double().numpy()
        b_enc_F = b_enc_F + W_enc_FD @ centre_I
        if w.W_skip_OD is not None and wiring.skip:
            skip_OD = w.W_skip_OD.astype(np.float64) * (in_I / out_O[:, None])
            b_dec_O = b_dec_O + skip_OD @ centre_I
            _put(model.W_skip_OD, skip_OD)
    elif not w.b_dec_subtracted:
        b_enc_F = b_enc_F + W_enc_FD @ b_dec_O
    for parameter, value in (
        (model.W_enc_FD, W_enc_FD),
        (model.W_dec_FD, W_dec_FO),
        (model.b_enc_F, b_enc_F),
        (model.b_dec_D, b_dec_O),
    ):
        _put(parameter, value)
    _put_thresholds(model, theta_F, ranked_F)


def start_identity(w: SAEWeights | None, wiring: Wiring) -> dict[str, Any]:
    """What a resumed run must share with the one before: the SAE it began from, the hook points it works on."""
    found: dict[str, Any] = {}
    if w is not None:
        arrays = (w.W_enc_FD, w.b_enc_F, w.W_dec_FD, w.b_dec_D)
        found["start"] = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]
    if wiring.inputs:
        found |= {"kind": wiring.kind, "inputs": wiring.inputs, "outputs": wiring.outputs, "skip": wiring.skip}
    return found


def _put_thresholds(model: SparseCoder, theta_F: np.ndarray, ranked_F: np.ndarray) -> None:
    if isinstance(model, JumpReLUSAE):
        least = min(LEAST_THETA * model.unit, float(model.log_theta_F.exp().min()))
        _put(model.log_theta_F, np.log(np.maximum(theta_F, least)))
    elif isinstance(model, BatchSelecting) and theta_F.any():
        _put(model.theta, np.asarray(ranked_F.mean()))
        model.batches += 1
    elif isinstance(model, GatedSAE):  # mag = pre, and the gate opens where pre > theta
        _put(model.r_F, np.zeros_like(theta_F))
        _put(model.b_mag_F, model.b_enc_F.double().numpy())
        _put(model.b_enc_F, model.b_enc_F.double().numpy() - theta_F)


def _put(parameter: torch.Tensor, value: Any) -> None:
    parameter.copy_(torch.from_numpy(np.asarray(value)))


def _check(model: SparseCoder, w: SAEWeights) -> None:
    d_out = model.W_dec_FD.shape[1]
    if (w.d_out, w.num_latents) != (d_out, model.num_latents):
        raise ConfigError(
            f"the SAE to start from has {w.num_latents} latents of width {w.d_out}, this run {model.num_latents} of {d_out}"
        )
    if bool(w.hook_out) != model.wiring.two_sided or (w.W_skip_OD is not None) != model.wiring.skip:
        raise ConfigError("the SAE to start from and this run are not both an SAE, a transcoder or a skip transcoder")
    if model.wiring.kind == "cross_layer":
        raise ConfigError("a cross-layer transcoder cannot start from another one")
    if (w.norm_mode == "layer") != model.layer_norm:
        raise ConfigError(f"the SAE to start from has norm mode {w.norm_mode!r}; set input_norm to match")
    norm_F = np.linalg.norm(w.W_dec_FD, axis=1)
    # unit and free rows alike compare pre ||W_dec[i]||: the choice is that of pre where all norms are equal
    if model.wiring.kind != "sae" or norm_F.min() >= (1 - EQUAL) * norm_F.max():
        return
    unequal = f"the SAE to start from has decoder rows of norm {norm_F.min():.3g} to {norm_F.max():.3g}: "
    if w.variant == "topk":
        raise ConfigError(
            unequal
            + "its top-k would choose others, as latents are compared by pre times that norm here; convert it to "
            "thresholds first"
        )
    if (
        isinstance(model, BatchSelecting)
        and w.threshold_F is not None
        and w.threshold_F.any()
        and is_one(w.threshold_F)
    ):
        raise ConfigError(
            unequal
            + "its one threshold would choose others, as latents are compared by pre times that norm here; start "
            "sae.variant=jumprelu from it, which has a threshold for each"
        )
