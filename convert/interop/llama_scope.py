"""OpenMOSS: Llama Scope (He et al. 2410.20526), its R1-distill successor, and llamascopium 2 and later.

Llama Scope 2024: `hyperparams.json`, `checkpoints/final.safetensors`, folded as Language-Model-SAEs (384b6e8c) did on
loading, with s = sqrt(D) / the dataset's average norm, of the input and of what is reconstructed:

    b_enc / s_in,  b_dec / s_out,  W_dec s_in / s_out,  and with m = ||W_dec[i]|| of that (where
    `sparsity_include_decoder_norm`):  W_dec / m,  W_enc m,  b_enc m;      a = pre where pre > jump_relu_threshold

on raw x. The threshold was estimated in these units; SAELens multiplies it by s_in and leaves m out, which gives
another L0.

R1-distill and llamascopium: `config.json`, `sae_weights.safetensors` or `.pt`; u = s_in x and, in these units,

    pre = W_E u + b_E,  a = pre where pre ||W_D[i]|| > exp(log_jumprelu_threshold),  y = (W_D^T a + b_D) / s_out

(without ||W_D[i]|| unless `sparsity_include_decoder_norm`). Of a top-k SAE that compares with the norm, the norm goes
into the activations: k latents are chosen alike, a is pre ||W_D[i]||. What is compared is what a latent's activation
is here, so no folding gives the library's own a = pre with its choice.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sae.errors import FormatError

from .building import Foreign, number, optional, required, text, whole_number
from .hook_names import to_hook
from .source import Source

LM_CONFIG = "lm_config.json"  # of its training run: names the model
WEIGHTS, TORCH_WEIGHTS = "sae_weights.safetensors", "sae_weights.pt"
NORM = "dataset_average_activation_norm"


class LlamaScope:
    NAME = "llama_scope"
    FILES = ("hyperparams.json", LM_CONFIG, "checkpoints/final.safetensors")

    @staticmethod
    def recognises(source: Source) -> bool:
        return source.has("hyperparams.json", "checkpoints/final.safetensors")

    @staticmethod
    def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
        label, config = source.label, source.json("hyperparams.json")
        arrays = source.arrays("checkpoints/final.safetensors")
        kind = config.get("act_fn", "jumprelu")
        if kind not in ("jumprelu", "relu") or config.get("use_glu_encoder"):
            raise FormatError(
                f"{label}: act_fn {str(kind)[:40]!r} or a GLU encoder; read are jumprelu and relu without GLU"
            )
        W_enc_FD, b_enc_F = required(arrays, "encoder.weight", label, 2), required(arrays, "encoder.bias", label, 1)
        W_dec_FO = required(arrays, "decoder.weight", label, 2).T
        b_dec_O = optional(arrays, "decoder.bias", label, 1)
        s_in, s_out = _scales(config, "in", "out", W_enc_FD.shape[-1], W_dec_FO.shape[-1], label)
        found = Foreign(
            W_enc_FD=W_enc_FD,
            b_enc_F=b_enc_F / np.float32(s_in),
            W_dec_FO=W_dec_FO * np.float32(s_in / s_out),
            b_dec_O=np.zeros(W_dec_FO.shape[1], np.float32) if b_dec_O is None else b_dec_O / np.float32(s_out),
            hook="",
            by_norm=bool(config.get("sparsity_include_decoder_norm", True)),
            subtracts_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
            model_name=_model_name(source) or ("meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in label else ""),
        )
        if kind == "jumprelu":
            threshold = number(config.get("jump_relu_threshold"), "jump_relu_threshold", label)
            found.threshold_F = np.full(len(b_enc_F), threshold, np.float32)
        return _places(found, config, hook, hook_out, label)


class Llamascopium:
    NAME = "llamascopium"
    FILES = ("config.json", LM_CONFIG, WEIGHTS, TORCH_WEIGHTS)

    @staticmethod
    def recognises(source: Source) -> bool:
        held = source.has(WEIGHTS) or source.has(TORCH_WEIGHTS)
        return held and "hook_point_in" in source.json("config.json")

    @staticmethod
    def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
        label, config = source.label, source.json("config.json")
        arrays = source.arrays(WEIGHTS if source.has(WEIGHTS) else TORCH_WEIGHTS)
        if isinstance(arrays.get("sae"), dict):  # a torch file has the version beside it
            arrays = arrays["sae"]
        if config.get("sae_type", "sae") != "sae" or config.get("use_glu_encoder"):
            raise FormatError(
                f"{label}: sae_type {str(config.get('sae_type'))[:40]!r} or a GLU encoder; read are SAEs without"
            )
        old = "encoder.weight" in arrays  # R1-distill: nn.Linear
        encoder, decoder, b_enc, b_dec = (
            ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")
            if old
            else ("W_E", "W_D", "b_E", "b_D")
        )
        W_enc, W_dec = required(arrays, encoder, label, 2), required(arrays, decoder, label, 2)
        W_enc_FD, W_dec_FO = (W_enc, W_dec.T) if old else (W_enc.T, W_dec)
        b_dec_O = optional(arrays, b_dec, label, 1)
        found = Foreign(
            W_enc_FD=W_enc_FD,
            b_enc_F=required(arrays, b_enc, label, 1),
            W_dec_FO=W_dec_FO,
            b_dec_O=np.zeros(W_dec_FO.shape[-1], np.float32) if b_dec_O is None else b_dec_O,
            hook="",
            model_name=_model_name(source),
        )
        _normalise(found, config, arrays, label)
        _activate(found, config, arrays, label)
        return _places(found, config, hook, hook_out, label)


def _model_name(source: Source) -> str:
    """The model's name in its training run's settings, "" where they are not there."""
    return text(source.json(LM_CONFIG).get("model_name"))


def _normalise(found: Foreign, config: dict[str, Any], arrays: dict[str, Any], label: str) -> None:
    mode = config.get("norm_activation", "dataset-wise")
    if mode == "inference":
        return
    if mode != "dataset-wise":
        raise FormatError(f"{label}: norm_activation {str(mode)[:40]!r} cannot be folded into the weights")
    names = [text(config.get("hook_point_in")), text(config.get("hook_point_out"))]
    widths = found.W_enc_FD.shape[-1], found.W_dec_FO.shape[-1]
    stored = {f"{NORM}.{name}" for name in names} <= set(arrays)
    norms = {NORM: {name: arrays[f"{NORM}.{name}"] for name in names}} if stored else config
    keys = (names[0], names[1]) if stored else ("in", "out")
    found.input_scale, found.output_scale = _scales(norms, *keys, *widths, label)


def _activate(found: Foreign, config: dict[str, Any], arrays: dict[str, Any], label: str) -> None:
    kind, by_norm = str(config.get("act_fn", "relu")).lower(), bool(config.get("sparsity_include_decoder_norm", True))
    if kind == "topk":
        found.variant, found.by_norm = "topk", by_norm
        found.k = whole_number(config.get("top_k"), "top_k", label, len(found.W_enc_FD))
        if by_norm:
            found.notes.append("activations carry the norm of the decoder row, which the library takes out again")
    elif kind == "jumprelu":
        names = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
        log_F = required(arrays, next((name for name in names if name in arrays), names[0]), label, 1)
        found.threshold_F = np.exp(log_F)
        if by_norm:
            norm_F = np.linalg.norm(found.W_dec_FO, axis=1)
            if log_F.shape != norm_F.shape or not norm_F.all():
                raise FormatError(
                    f"{label}: a decoder row of norm 0, or {log_F.shape} thresholds for {norm_F.shape} rows"
                )
            found.threshold_F = found.threshold_F / norm_F
    elif kind != "relu":
        raise FormatError(f"{label}: act_fn {kind[:40]!r} is not read; read are relu, jumprelu and topk")


def _scales(config: dict[str, Any], read: str, written: str, d_in: int, d_out: int, label: str) -> tuple[float, float]:
    """sqrt(D) / average norm, of what is read and what is reconstructed."""
    norms = config.get(NORM)
    if not isinstance(norms, dict):
        raise FormatError(f"{label}: {NORM} is missing, without it the scale of the activations is not known")
    values = [number(norms.get(name), f"{NORM} of {name[:60]}", label) for name in (read, written)]
    if min(values) <= 0:
        raise FormatError(f"{label}: {NORM} should be above 0, got {values}")
    return math.sqrt(d_in) / values[0], math.sqrt(d_out) / values[1]


def _places(found: Foreign, config: dict[str, Any], hook: str, hook_out: str, label: str) -> Foreign:
    read, written = text(config.get("hook_point_in")), text(config.get("hook_point_out"))
    found.hook = to_hook(read, hook, label, found.notes)
    if (written and written != read) or hook_out:
        found.hook_out = to_hook(written, hook_out, label, found.notes, key="convert.hook_out")
    return found
