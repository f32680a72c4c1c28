"""dictionary_learning (Marks, Karvonen, Mueller): `ae.pt` (or `ae_<step>.pt`) with `config.json`.

`trainer.dict_class` names the equations; without a config the names of the tensors do. The standard, p-anneal and
ghost-gradient trainers write AutoEncoder, the gated ones GatedAutoEncoder. Norm scales are folded into the biases when
a run ends; an interrupted run's file has the unscaled weights under `ae`, and `norm_factor`.

Decoder rows are kept as they are; `from_pretrained` of the library renormalises those of an AutoEncoder unless told not to.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from sae.errors import FormatError

from .building import Foreign, gate_threshold, number, required, text, whole_number
from .hook_names import to_hook
from .source import Source

NAME = "dictionary_learning"
CONFIG, RESULTS = "config.json", "eval_results.json"  # the latter by the library's evaluation, where it was run
FILES = (CONFIG, "ae.pt", RESULTS)
SITES = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attention_out": "hook_attn_out"}
_SUBMODULE = re.compile(r"(resid_post|mlp_out|attention_out)_layer_(\d+)")


def recognises(source: Source) -> bool:
    if isinstance(source.json(CONFIG).get("trainer"), dict) and _file(source) is not None:
        return True
    names = source.torch_names()
    kinds = (
        {"bias", "encoder.weight"},
        {"gate_bias", "r_mag"},
        {"k", "threshold", "b_dec"},
        {"ae", "optimizer"},
        {"W_enc", "threshold"},
    )
    return any(kind <= names for kind in kinds)


def _file(source: Source) -> str | None:
    """The name of the weights' file; "" for the one that was given."""
    if source.file is not None:
        return ""
    return "ae.pt" if source.has("ae.pt") else None


def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
    label = source.label
    trainer = source.json(CONFIG).get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    arrays, factor = source.arrays(_file(source) or ""), 1.0
    if isinstance(arrays.get("ae"), dict):
        if arrays.get("norm_factor") is not None:
            factor = number(arrays["norm_factor"], "norm_factor", label)
        if factor <= 0:
            raise FormatError(f"{label}: norm_factor should be above 0, got {factor}")
        arrays = arrays["ae"]
    kind = text(trainer.get("dict_class")) or kind_of(arrays)
    if kind not in READERS:
        raise FormatError(f"{label}: dict_class {kind!r} is not read; known are {', '.join(READERS)}")
    found = READERS[kind](arrays, label)
    found.b_enc_F = found.b_enc_F * np.float32(factor)
    found.b_dec_O = found.b_dec_O * np.float32(factor)
    if found.threshold_F is not None:
        found.threshold_F = found.threshold_F * np.float32(factor)
    latents = len(found.W_enc_FD)
    k = arrays.get("k", trainer.get("k"))
    if k is not None and kind not in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"):
        found.k = whole_number(k, "k", label, latents)
    if found.variant == "topk" and not found.k:
        raise FormatError(f"{label}: neither the file nor {CONFIG} says k")
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE") and number(arrays.get("threshold"), "threshold", label) < 0:
        found.notes.append("its threshold was never set in training: every positive latent fires, as in the library")
    found.model_name = text(trainer.get("lm_name"))
    found.published = _results(source.json(RESULTS))
    found.hook = to_hook(_place(trainer), hook, label, found.notes)
    return found


def _results(results: dict[str, Any]) -> dict[str, float]:
    """l0, and fvu from the explained share: there a constant error costs nothing, so ours may be higher."""
    said = {"l0": results.get("l0"), "fvu": results.get("frac_variance_explained")}
    found = {key: value for key, value in said.items() if isinstance(value, float)}
    return found | {"fvu": 1 - found["fvu"]} if "fvu" in found else found


def kind_of(arrays: dict[str, Any]) -> str:
    """The class whose tensors these are."""
    names = set(arrays)
    for kind, needed in {
        "MatryoshkaBatchTopKSAE": {"W_enc", "k", "group_sizes"}, "JumpReluAutoEncoder": {"W_enc", "threshold"},
        "GatedAutoEncoder": {"gate_bias", "r_mag"}, "AutoEncoder": {"encoder.weight", "bias"},
        "AutoEncoderNew": {"encoder.weight", "encoder.bias", "decoder.bias"},
    }.items():  # fmt: skip
        if needed <= names:
            return kind
    if {"encoder.weight", "k", "threshold"} <= names:
        raise FormatError("TopK and BatchTopK files hold the same tensors: put the run's config.json beside it")
    return "of unknown tensors"


def _place(trainer: dict[str, Any]) -> str:
    if match := _SUBMODULE.fullmatch(text(trainer.get("submodule_name"))):
        return f"blocks.{int(match[2])}.{SITES[match[1]]}"
    if not trainer.get("submodule_name") and type(trainer.get("layer")) is int and trainer["layer"] >= 0:
        return f"blocks.{trainer['layer']}.hook_resid_post"
    return text(trainer.get("submodule_name"))


def _linear(arrays: dict[str, Any], label: str, b_dec: str, *, subtracts: bool, **fields: Any) -> Foreign:
    """nn.Linear layers: encoder.weight (F, D), decoder.weight (D, F)."""
    return Foreign(
        W_enc_FD=required(arrays, "encoder.weight", label, 2),
        b_enc_F=required(arrays, "encoder.bias", label, 1),
        W_dec_FO=required(arrays, "decoder.weight", label, 2).T,
        b_dec_O=required(arrays, b_dec, label, 1),
        subtracts_b_dec=subtracts,
        hook="",
        **fields,
    )


def _parameters(arrays: dict[str, Any], label: str, *, subtracts: bool) -> Foreign:
    """W_enc (D, F), W_dec (F, D), and a threshold: one, or one for each latent."""
    b_enc_F = required(arrays, "b_enc", label, 1)
    return Foreign(
        W_enc_FD=required(arrays, "W_enc", label, 2).T,
        b_enc_F=b_enc_F,
        W_dec_FO=required(arrays, "W_dec", label, 2),
        b_dec_O=required(arrays, "b_dec", label, 1),
        threshold_F=_thresholds(arrays, label, b_enc_F.shape),
        subtracts_b_dec=subtracts,
        hook="",
    )


def _thresholds(arrays: dict[str, Any], label: str, shape: tuple[int, ...]) -> np.ndarray:
    threshold = required(arrays, "threshold", label, (0, 1))
    return np.full(shape, threshold, np.float32) if threshold.ndim == 0 else threshold


def _batch_topk(arrays: dict[str, Any], label: str) -> Foreign:
    shape = required(arrays, "encoder.bias", label, 1).shape
    return _linear(arrays, label, "b_dec", subtracts=True, threshold_F=_thresholds(arrays, label, shape))


def _gated(arrays: dict[str, Any], label: str) -> Foreign:
    W_enc_FD = required(arrays, "encoder.weight", label, 2)
    r_F, gate_F, mag_F = (required(arrays, name, label, 1) for name in ("r_mag", "gate_bias", "mag_bias"))
    if not r_F.shape == gate_F.shape == mag_F.shape == W_enc_FD.shape[:1]:
        raise FormatError(f"{label}: r_mag, gate_bias and mag_bias should have {len(W_enc_FD)} numbers each")
    return Foreign(
        W_enc_FD=W_enc_FD * np.exp(r_F)[:, None],
        b_enc_F=mag_F,
        W_dec_FO=required(arrays, "decoder.weight", label, 2).T,
        b_dec_O=required(arrays, "decoder_bias", label, 1),
        threshold_F=gate_threshold(r_F, gate_F, mag_F),
        subtracts_b_dec=True,
        hook="",
    )


READERS = {
    "AutoEncoder": lambda arrays, label: _linear(arrays, label, "bias", subtracts=True),
    "AutoEncoderNew": lambda arrays, label: _linear(arrays, label, "decoder.bias", subtracts=False),
    "AutoEncoderTopK": lambda arrays, label: _linear(arrays, label, "b_dec", subtracts=True, variant="topk"),
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": lambda arrays, label: _parameters(arrays, label, subtracts=True),
    "JumpReluAutoEncoder": lambda arrays, label: _parameters(arrays, label, subtracts=False),
    "GatedAutoEncoder": _gated,
}
