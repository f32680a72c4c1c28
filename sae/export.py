"""A trained model as `SAEWeights`: scales, norms and centres folded, so that a reader needs only the equations there.

Shape letters: W columns of a batch, D d_in, O d_out, F latents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .weights import LAYER_NORM_EPS, SAEWeights

if TYPE_CHECKING:
    from .model import ExportForm, SparseCoder


def export(
    model: SparseCoder, form: ExportForm, *, mean_W: np.ndarray, variance: float, hook: str, extra: dict[str, Any]
) -> SAEWeights:
    """W_enc, b_enc and threshold in units in which the latents scale with what is reconstructed.

    With u = x / s_in and y = s_out y_u (s_out one number): a_raw = s_out a, so W_enc s_out / s_in, b_enc s_out,
    b_dec s_out, and W_dec as it is. Several hook points have several scales; then s_out is the largest of them and
    each block of W_dec is multiplied by its own over s_out. Rows that are not kept at norm 1 are made so first:
    W_enc, b_enc and threshold times ||W_dec[i]||, which is what their selection compared.
    """
    wiring = model.wiring
    scale_W = np.broadcast_to(np.asarray(model.scale, np.float64), (model.d_in,))
    in_I, out_O = (scale_W[: wiring.d_in], scale_W[wiring.target]) if wiring.inputs else (scale_W, scale_W)
    common = float(out_O.max())
    norm_F1 = torch.ones_like(form.b_enc_F)[:, None]
    if not model.unit_rows:
        norm_F1 = torch.linalg.vector_norm(model.W_dec_FD, dim=1, keepdim=True)
        norm_F1 = torch.where(norm_F1 > 0, norm_F1, torch.ones_like(norm_F1))
    W_enc_FD = form.W_enc_FD * norm_F1
    b_enc_F = form.b_enc_F * norm_F1[:, 0]
    fields: dict[str, Any] = {}
    if wiring.two_sided:
        W_enc_FD, centre_I = spread(model, W_enc_FD), model.centre_I
        b_enc_F = b_enc_F - W_enc_FD @ centre_I
        fields |= {"b_dec_subtracted": False, "hook_out": wiring.outputs[0][0]}
    b_dec_D = array(model.b_dec_D) * out_O
    if wiring.skip:
        fields["W_skip_OD"] = array(model.W_skip_OD) * (out_O[:, None] / in_I)
        b_dec_D = b_dec_D - (array(model.W_skip_OD) @ array(model.centre_I)) * out_O
    if wiring.inputs:
        fields["ports"] = tuple((name, width) for name, width in (*wiring.inputs, *wiring.outputs))
    if model.layer_norm:
        fields |= {"norm_mode": "layer", "norm_eps": LAYER_NORM_EPS}
    if form.threshold_F is not None:
        fields["threshold_F"] = array(form.threshold_F * norm_F1[:, 0]) * common
    return SAEWeights(
        W_enc_FD=array(W_enc_FD) * (common / in_I),
        b_enc_F=array(b_enc_F) * common,
        W_dec_FD=array(model.W_dec_FD / norm_F1) * (out_O / common),
        b_dec_D=b_dec_D,
        mean_D=mean_W[wiring.target],
        variance=variance,
        k=form.k if form.k is not None else mean_fired(extra.get("freq_F"), model),
        variant=form.variant,
        hook=hook,
        **fields,
        **extra,
    )


def mean_fired(freq_F: np.ndarray | None, model: SparseCoder) -> int:
    """Mean number of active latents, to the next whole one; the configured k where none were counted."""
    return model.final_k if freq_F is None else min(model.num_latents, max(1, round(float(freq_F.sum()))))


def spread(model: SparseCoder, W_enc_FD: torch.Tensor) -> torch.Tensor:
    """Encoder rows over all inputs: those of a cross-layer transcoder read their own layer's columns only."""
    wiring = model.wiring
    if wiring.kind != "cross_layer":
        return W_enc_FD
    whole_FI = W_enc_FD.new_zeros(len(W_enc_FD), wiring.d_in)
    for layer, rows in enumerate(model.layer_rows()):
        whole_FI[rows, wiring.parts[layer]] = W_enc_FD[rows]
    return whole_FI


def array(tensor: torch.Tensor) -> np.ndarray:
    """float64, so that folding rounds once."""
    return tensor.detach().double().cpu().numpy()
