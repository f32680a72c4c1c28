"""SAELens (decoderesearch/SAELens): `cfg.json` and `sae_weights.safetensors`, of version 6 and before.

W_enc (D, F) and W_dec (F, O) of files; encode and decode as sae_lens 6.54 does. Version 6 nests model and hook point
in `metadata`, older ones are flat with other names for some settings.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sae.errors import FormatError

from .building import Foreign, gate_threshold, number, optional, required, text, whole_number
from .hook_names import to_hook
from .source import Source

NAME = "saelens"
CONFIG, WEIGHTS, SPARSITY, SCALER = (
    "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "activation_scaler.json",
)  # fmt: skip
FILES = (CONFIG, WEIGHTS, SPARSITY, SCALER)
LAYER_NORM_EPS = 1e-5
THRESHOLDS = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
TRAINING = ("batchtopk", "matryoshka_batchtopk")  # checkpoints; finished ones are saved as jumprelu
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
# What SAELens 6.54 knows of releases beside their files. SCALES: what activations were multiplied by in training.
CENTRED = (
    "tommmcgrath/gpt2-small-mlp-out-saes", "jbloom/GPT2-Small-SAEs-Reformatted",
    "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8",
)  # fmt: skip
SCALES = {
    "tommmcgrath/gpt2-small-mlp-out-saes": dict(
        zip(
            (f"blocks.{block}.hook_mlp_out" for block in range(12)),
            (1.049317, 2.369398, 1.641193, 1.895852, 1.816735, 1.550234, 1.323774, 1.104291, 0.912376, 0.695534, 0.361973, 0.285155),
            strict=True,
        )
    ),
    "jbloom/Gemma-2b-Residual-Stream-SAEs": {"blocks.12.hook_resid_post": 0.213819},
}  # fmt: skip
KNOWN = ("standard", "topk", "gated", *THRESHOLDS, *TRAINING, *TRANSCODERS[:2])


def recognises(source: Source) -> bool:
    return source.has(CONFIG, WEIGHTS) and "d_sae" in source.json(CONFIG)


def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
    label, config = source.label, settings(source.json(CONFIG))
    arrays = source.arrays(WEIGHTS)
    kind = config["architecture"]
    if kind not in KNOWN:
        raise FormatError(f"{label}: SAELens architecture {str(kind)[:40]!r} is not read; known are {', '.join(KNOWN)}")
    if config["hook_head_index"] is not None:
        raise FormatError(f"{label} reads one head of {config['hook_name']}; only whole hook points are read")
    W_enc_DF = required(arrays, "W_enc", label, 2)
    transcoder = kind in TRANSCODERS
    notes: list[str] = []
    found = Foreign(
        W_enc_FD=W_enc_DF.T,
        b_enc_F=np.zeros(W_enc_DF.shape[1], np.float32) if kind == "gated" else required(arrays, "b_enc", label, 1),
        W_dec_FO=required(arrays, "W_dec", label, 2),
        b_dec_O=required(arrays, "b_dec", label, 1),
        hook=to_hook(config["hook_name"], hook, label, notes),
        subtracts_b_dec=config["apply_b_dec_to_input"] and not transcoder,
        by_norm=config["rescale_acts_by_decoder_norm"],
        bos_excluded=config["bos_excluded"],
        prepend_bos=config["prepend_bos"],
        model_name=config["model_name"],
        notes=notes,
    )
    if transcoder:
        found.hook_out = to_hook(config["hook_name_out"], hook_out, label, notes, key="convert.hook_out")
        found.W_skip_OD = optional(arrays, "W_skip", label, 2)
    _activation(found, kind, config, arrays, label)
    _centring(found, source, config["centred"])
    _normalisation(found, source, config["normalize_activations"])
    _old_scaling(found, arrays, config["finetuning_scaling_factor"], label)
    if source.has(SPARSITY):  # log10 of the share of tokens
        log_F = source.arrays(SPARSITY).get("sparsity")
        if log_F is not None and log_F.shape == found.b_enc_F.shape and not np.isnan(log_F).any():
            found.freq_F = freq_F = 10.0 ** np.minimum(log_F, 0)
            found.published["l0"] = float(freq_F.sum(dtype=np.float64))
    return found


def settings(raw: dict[str, Any]) -> dict[str, Any]:
    """One form for all versions, what an older one leaves out filled in as SAELens does."""
    metadata = raw.get("metadata")
    flat = raw | (metadata if isinstance(metadata, dict) else {})
    function = text(flat.get("activation_fn", flat.get("activation_fn_str", "relu")))
    keywords = flat.get("activation_fn_kwargs")
    keywords = keywords if isinstance(keywords, dict) else {}
    architecture = raw.get("architecture", "standard")
    if function == "topk" and keywords.get("k") is not None:
        architecture = "topk"
    elif function not in ("relu", "topk"):
        architecture = function  # refused by name
    norm, loaded = flat.get("normalize_activations"), flat.get("model_from_pretrained_kwargs")
    if norm is None or isinstance(norm, bool):
        norm = "expected_average_only_in" if norm else "none"
    return {
        "architecture": architecture,
        "k": flat.get("k", keywords.get("k")),
        "hook_name": text(flat.get("hook_name", flat.get("hook_point"))),
        "hook_name_out": text(flat.get("hook_name_out")),
        "hook_head_index": flat.get("hook_head_index", flat.get("hook_point_head_index")),
        "apply_b_dec_to_input": bool(flat.get("apply_b_dec_to_input", True)),
        "normalize_activations": norm,
        "rescale_acts_by_decoder_norm": architecture in ("topk", *TRAINING)
        and bool(flat.get("rescale_acts_by_decoder_norm", False)),
        "finetuning_scaling_factor": bool(flat.get("finetuning_scaling_factor", False)),
        "bos_excluded": _bos_excluded(flat.get("exclude_special_tokens"), flat.get("prepend_bos")),
        "prepend_bos": said if isinstance(said := flat.get("prepend_bos"), bool) else None,
        "model_name": text(flat.get("model_name")),
        "centred": isinstance(loaded, dict) and loaded.get("center_writing_weights") is True,
    }


def _bos_excluded(left_out: Any, prepended: Any) -> bool | None:
    """Whether special tokens' rows were left out of its training; None where the settings do not say, as with a list of
    token ids, or with special tokens kept and no BOS put before a text."""
    if left_out is True:
        return True
    return False if left_out is False and prepended is True else None


def _activation(found: Foreign, kind: str, config: dict[str, Any], arrays: dict[str, Any], label: str) -> None:
    latents = found.W_enc_FD.shape[0]
    if kind == "topk":
        found.variant, found.k = "topk", whole_number(config["k"], "k", label, latents)
    elif kind in THRESHOLDS:
        log_F = optional(arrays, "log_threshold", label, 1)
        found.threshold_F = required(arrays, "threshold", label, 1) if log_F is None else np.exp(log_F)
    elif kind in TRAINING:
        threshold = number(arrays.get("topk_threshold"), "topk_threshold", label)
        found.threshold_F = np.full(latents, threshold, np.float32)
        found.k = whole_number(config["k"], "k", label, latents)
    elif kind == "gated":
        r_F, gate_F, mag_F = (required(arrays, name, label, 1) for name in ("r_mag", "b_gate", "b_mag"))
        if not r_F.shape == gate_F.shape == mag_F.shape == (latents,):
            raise FormatError(f"{label}: r_mag, b_gate and b_mag should have {latents} numbers each")
        found.W_enc_FD = found.W_enc_FD * np.exp(r_F)[:, None]
        found.b_enc_F = mag_F
        found.threshold_F = gate_threshold(r_F, gate_F, mag_F)


def _normalisation(found: Foreign, source: Source, mode: Any) -> None:
    """What SAELens does to x before encoding, and undoes after decoding."""
    if mode == "none":
        return
    if mode == "layer_norm" and not found.hook_out:
        found.layer_norm_eps = LAYER_NORM_EPS
        return
    if mode == "expected_average_only_in":
        scale = source.json(SCALER).get("scaling_factor")
        if scale is None:
            scale = next((by_hook.get(found.hook) for repo, by_hook in SCALES.items() if repo in source.label), None)
        if scale is None:
            found.notes.append(
                "trained on scaled activations (expected_average_only_in), and the files do not say by how much: taken as "
                "folded into the weights; if FVU is poor it was not"
            )
            return
        if found.hook_out:
            raise FormatError(f"{source.label}: a transcoder whose {SCALER} is not folded; save it folded first")
        found.input_scale = found.output_scale = number(scale, "scaling_factor", source.label)
        return
    raise FormatError(
        f"{source.label}: normalize_activations={str(mode)[:40]!r} cannot be folded into the weights; read are none, layer_norm, expected_average_only_in"
    )


def _centring(found: Foreign, source: Source, said: bool) -> None:
    """Rows of the residual stream less their mean: TransformerLens's center_writing_weights."""
    if said or any(repo in source.label for repo in CENTRED):
        found.centred = True
        found.notes.append(
            "trained on a model with centred writing weights: folded into the encoder; its reconstructions are of rows less "
            "their mean over the dimensions"
        )


def _old_scaling(found: Foreign, arrays: dict[str, Any], used: bool, label: str) -> None:
    """Before version 6: activations times a fine-tuned factor in the decoder."""
    factor_F = optional(arrays, "scaling_factor", label, (0, 1))
    if factor_F is None:
        factor_F = optional(arrays, "finetuning_scaling_factor", label, (0, 1))
    if factor_F is None or np.allclose(factor_F, 1):
        return
    if not used or factor_F.shape != found.W_dec_FO.shape[:1]:
        raise FormatError(f"{label}: a scaling_factor that its cfg.json does not announce, or of another length")
    found.W_dec_FO = found.W_dec_FO * factor_F[:, None]
