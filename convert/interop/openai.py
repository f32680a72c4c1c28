"""OpenAI's sparse autoencoders of GPT-2 (Gao et al. 2406.04093; versions 1, 4, 5): `.../<location>/autoencoders/<L>.pt`.

    n   = (x - mu) / (sigma + 1e-5) where the activation is TopK (v5), else x
    a   = activation(W_enc (n - pre_bias) + latent_bias),  x_hat = W_dec a + pre_bias, times sigma plus mu

sigma has D - 1 below its root. encoder.weight (F, D), decoder.weight (D, F); a tied decoder is the encoder's transpose.
"""

from __future__ import annotations

import re
from typing import Any

from sae.errors import FormatError

from .building import Foreign, optional, required, shown, text, whole_number
from .hook_names import to_hook
from .source import Source

NAME = "openai"
FILES = ()
EPS = 1e-5
LOCATIONS = {
    "resid_post_mlp": "hook_resid_post", "resid_post_attn": "hook_resid_mid", "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out", "mlp_post_act": "mlp.hook_post",
}  # fmt: skip
_PLACE = re.compile(rf"({'|'.join(LOCATIONS)})(?:_v\d+(?:_\d+k)?)?/autoencoders/(\d+)\.pt")


def recognises(source: Source) -> bool:
    return {"pre_bias", "latent_bias", "encoder.weight"} <= source.torch_names()


def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
    label, arrays = source.label, source.arrays()
    W_enc_FD = required(arrays, "encoder.weight", label, 2)
    activation = arrays.get("activation", "ReLU")
    if text(activation) not in ("ReLU", "TopK"):
        raise FormatError(f"{label}: activation should be ReLU or TopK, got {shown(activation)}")
    place = _PLACE.search(label)
    notes: list[str] = []
    W_dec_DF = optional(arrays, "decoder.weight", label, 2)
    if W_dec_DF is None:
        notes.append("it has no decoder of its own: tied, the encoder's transpose")
    found = Foreign(
        W_enc_FD=W_enc_FD,
        b_enc_F=required(arrays, "latent_bias", label, 1),
        W_dec_FO=W_enc_FD if W_dec_DF is None else W_dec_DF.T,
        b_dec_O=required(arrays, "pre_bias", label, 1),
        hook=to_hook(f"blocks.{int(place[2])}.{LOCATIONS[place[1]]}" if place else "", hook, label, notes),
        subtracts_b_dec=True,
        model_name="openai-community/gpt2" if place else "",
        notes=notes,
    )
    if activation == "TopK":
        state: Any = arrays.get("activation_state_dict")
        k = state.get("k") if isinstance(state, dict) else None
        found.variant, found.k = "topk", whole_number(k, "k of activation_state_dict", label, len(W_enc_FD))
        found.layer_norm_eps = EPS
    return found
