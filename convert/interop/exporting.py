"""Our SAEs as folders that SAELens 6 and sparsify load: equal latents and reconstructions there.

SAELens    topk -> topk, threshold -> jumprelu, transcoders -> (jumprelu_)(skip_)transcoder
sparsify   topk and groupmax
What a library has no equation for is refused. W_enc (D, F) and W_dec (F, D) in SAELens, both (F, D) in sparsify.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from sae.checkpoint import write_atomic
from sae.errors import ConfigError, DiskError
from sae.weights import SAEWeights

from . import saelens, sparsify

TARGETS = ("saelens", "sparsify")
SAELENS_VERSION = "6.54.12"  # whose form is written


@dataclass(frozen=True, slots=True)
class Windows:
    """How the texts of an SAE's rows are cut: whether a BOS comes before each, and tokens in all."""

    prepend_bos: bool = True
    context_size: int = 1024


def export_folder(folder: Path, weights: SAEWeights, target: str, windows: Windows = Windows()) -> Path:
    """Writes the SAE in the form of `target` into `folder` (made if missing), the settings last. SAELens's say `windows` too.

    ConfigError where the target has no such SAE; DiskError where the folder cannot be written.
    """
    config, arrays = _form(weights, target)
    if target == "saelens":
        config["metadata"] |= asdict(windows)
    module = saelens if target == "saelens" else sparsify
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"could not write {folder}: {error.strerror or error}") from error
    data = save({name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()})
    write_atomic(folder / module.WEIGHTS, lambda file: file.write(data))
    text = json.dumps(config, indent=1, allow_nan=False).encode()
    write_atomic(folder / module.CONFIG, lambda file: file.write(text))
    return folder


def check_export(weights: SAEWeights, target: str) -> None:
    """ConfigError where the target has no such SAE."""
    _form(weights, target)


def _form(weights: SAEWeights, target: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if target not in TARGETS:
        raise ConfigError(f"convert.export={target!r}; expected one of {', '.join(TARGETS)}")
    if weights.is_wired and not weights.is_transcoder:
        raise ConfigError(f"{target} has no SAEs over several hook points")
    return (_saelens if target == "saelens" else _sparsify)(weights)


def _saelens(w: SAEWeights) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if w.variant == "groupmax":
        raise ConfigError("SAELens has no groupmax SAEs; fit thresholds first (convert.thresholds=latent)")
    if w.norm_mode == "layer" and w.norm_eps != saelens.LAYER_NORM_EPS:
        raise ConfigError(f"SAELens's layer_norm has eps {saelens.LAYER_NORM_EPS}, this SAE's {w.norm_eps}")
    if w.hook_out and w.variant == "topk":
        raise ConfigError("SAELens has no top-k transcoders; fit thresholds first (convert.thresholds=latent)")
    # SAELens's sigma is over D - 1: n here is `ratio` times its n, and so is n_hat
    ratio = math.sqrt(w.d_in / (w.d_in - 1)) if w.norm_mode == "layer" and w.norm_correction == 0 else 1.0
    arrays = {
        "W_enc": w.W_enc_FD.T * ratio, "b_enc": w.b_enc_F, "W_dec": w.W_dec_FD / ratio, "b_dec": w.b_dec_D / ratio,
    }  # fmt: skip
    architecture = "topk" if w.variant == "topk" else "jumprelu"
    if w.hook_out:
        architecture = "jumprelu_skip_transcoder" if w.W_skip_OD is not None else "jumprelu_transcoder"
    if w.threshold_F is not None:
        arrays["threshold"] = w.threshold_F
    if w.W_skip_OD is not None:
        arrays["W_skip"] = w.W_skip_OD
    metadata = {
        "sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, "hook_name": w.hook,
        "model_name": w.host.get("name"), "hook_head_index": None,
    }  # fmt: skip
    if w.hook_out:
        metadata["hook_name_out"] = w.hook_out
    config: dict[str, Any] = {
        "architecture": architecture, "d_in": w.d_in, "d_sae": w.num_latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": w.b_dec_subtracted,
        "normalize_activations": "layer_norm" if w.norm_mode == "layer" else "none",
        # "none" for hook_z too: a caller there gives rows of all heads side by side, as ours are
        "reshape_activations": "none", "metadata": metadata,
    }  # fmt: skip
    if w.variant == "topk":
        config |= {"k": w.k, "rescale_acts_by_decoder_norm": False}
    if w.hook_out:
        config["d_out"] = w.d_out
    return config, arrays


def _sparsify(w: SAEWeights) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if w.variant not in ("topk", "groupmax"):
        raise ConfigError(f"sparsify has no SAEs of variant {w.variant!r}; only topk and groupmax")
    if w.norm_mode != "none":
        raise ConfigError("sparsify has no per-token layer norm")
    if w.hook_out and w.d_in != w.d_out:
        raise ConfigError(f"sparsify's transcoders are as wide on both sides, this one has {w.d_in} and {w.d_out}")
    arrays = {
        "encoder.weight": w.W_enc_FD, "encoder.bias": w.b_enc_F, "W_dec": w.W_dec_FD, "b_dec": w.b_dec_D,
    }  # fmt: skip
    if not w.hook_out and not w.b_dec_subtracted:  # W x + b = W (x - b_dec) + (b + W b_dec)
        arrays["encoder.bias"] = w.b_enc_F + w.W_enc_FD.astype(np.float64) @ w.b_dec_D
    if w.W_skip_OD is not None:
        arrays["W_skip"] = w.W_skip_OD
    config = {
        "activation": w.variant, "expansion_factor": max(1, w.num_latents // w.d_in), "normalize_decoder": True,
        "num_latents": w.num_latents, "k": w.k, "multi_topk": False, "skip_connection": w.W_skip_OD is not None,
        "transcode": bool(w.hook_out), "d_in": w.d_in,
    }  # fmt: skip
    return config, arrays
