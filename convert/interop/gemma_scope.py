"""Gemma Scope 1 (Lieberum et al. 2408.05147; `params.npz`) and 2 (`params.safetensors` with `config.json`).

    a = pre where pre > threshold,  pre = W_enc x + b_enc,  x_hat = W_dec a + b_dec (+ affine_skip_connection x)

W_enc (D, F), W_dec (F, D); version 2 writes w_enc and w_dec. Layer and site of version 1 stand in the place's name
only: google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from sae.errors import FormatError

from .building import Foreign, optional, required, text
from .hook_names import layer_in, to_hook
from .source import Source

SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
SITES_2 = {  # read, written
    "resid_post": ("output", ""), "attn_out": ("self_attn.o_proj.input", ""),
    "mlp_out": ("post_feedforward_layernorm.output", ""),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}  # fmt: skip
_RELEASE = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")


class GemmaScope1:
    NAME = "gemma_scope"
    FILES = ("params.npz",)

    @staticmethod
    def recognises(source: Source) -> bool:
        return source.has("params.npz") or (source.weights is not None and source.weights.suffix == ".npz")

    @staticmethod
    def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
        label = source.label
        arrays = source.arrays("params.npz" if source.file is None else "")
        found = _jumprelu(
            {name[:1].upper() + name[1:] if name[:2] == "w_" else name: a for name, a in arrays.items()}, label
        )
        release = _RELEASE.search(label)
        layer = layer_in(label, r"layer_(\d+)")
        site = release[3] if release else ""
        if release:
            size, kind, _ = release.groups()
            found.model_name = f"google/gemma-2-{size}" + ("-it" if kind == "it" else "")
        if l0 := layer_in(label, r"average_l0_(\d{1,6})"):
            found.published["l0"] = float(l0)
        if "embedding/width_" in label:  # trained on embeddings before their scale sqrt(D), which the model applies
            found.input_scale = found.output_scale = 1 / float(np.sqrt(found.W_enc_FD.shape[1]))
            name = "blocks.0.hook_resid_pre"
        else:
            name = f"blocks.{layer}.{SITES[site]}" if layer and site in SITES else ""
        if site == "transcoders":
            # the gain of the norm before the MLP was folded into the MLP: they read what comes before it
            found.hook = to_hook(f"blocks.{layer}.ln2.hook_normalized" if layer else "", hook, label, found.notes)
            found.hook_out = to_hook(
                f"blocks.{layer}.hook_mlp_out" if layer else "", hook_out, label, found.notes, key="convert.hook_out"
            )
        else:
            found.hook = to_hook(name, hook, label, found.notes)
        return found


class GemmaScope2:
    NAME = "gemma_scope_2"
    FILES = ("config.json", "params.safetensors")

    @staticmethod
    def recognises(source: Source) -> bool:
        return source.has("params.safetensors")

    @staticmethod
    def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
        label, config = source.label, source.json("config.json")
        if config.get("architecture", "jump_relu") != "jump_relu":
            raise FormatError(f"{label}: architecture {str(config['architecture'])[:40]!r}, expected 'jump_relu'")
        arrays = source.arrays("params.safetensors")
        found = _jumprelu(
            {"W" + name[1:] if name[:2] == "w_" else name: array for name, array in arrays.items()}, label
        )
        told = config or _of_the_name(label)
        found.model_name = text(told.get("model_name"))
        read, written = text(told.get("hf_hook_point_in")), text(told.get("hf_hook_point_out"))
        found.hook = to_hook(read, hook, label, found.notes)
        skip_DO = optional(arrays, "affine_skip_connection", label, 2)
        if (written and written != read) or skip_DO is not None or hook_out:
            found.hook_out = to_hook(written, hook_out, label, found.notes, key="convert.hook_out")
            found.W_skip_OD = None if skip_DO is None else skip_DO.T
        return found


def _of_the_name(label: str) -> dict[str, str]:
    """Some folders hold no config.json; there the place says it: google/gemma-scope-2-1b-pt/resid_post/layer_7_width_16k_l0_small."""
    release, layer = re.search(r"gemma-scope-2-([^/@]+)", label), layer_in(label, r"layer_(\d+)")
    site = next((site for site in SITES_2 if f"/{site}" in label), "")
    if not layer or not site:
        return {}
    read, written = SITES_2[site]
    return {
        "model_name": f"google/gemma-3-{release[1]}" if release else "",
        "hf_hook_point_in": f"model.layers.{layer}.{read}",
        "hf_hook_point_out": f"model.layers.{layer}.{written}" if written else "",
    }


def _jumprelu(arrays: dict[str, Any], label: str) -> Foreign:
    W_dec_FO = required(arrays, "W_dec", label, (2, 3))
    if W_dec_FO.ndim == 3:
        raise FormatError(f"{label} is a cross-layer transcoder; only SAEs and transcoders of one layer are read")
    return Foreign(
        W_enc_FD=required(arrays, "W_enc", label, 2).T,
        b_enc_F=required(arrays, "b_enc", label, 1),
        W_dec_FO=W_dec_FO,
        b_dec_O=required(arrays, "b_dec", label, 1),
        threshold_F=required(arrays, "threshold", label, 1),
        hook="",
    )
