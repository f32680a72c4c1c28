"""The way from the residual stream to logits, read from the GGUF: final norm and output matrix. numpy and gguf only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from sae.errors import LlamaError, ShapeError

from .identity import field_value, open_gguf

# Gemma's norm weights lie in the GGUF with their +1 already added.
_RMS = frozenset(
    {"llama", "mistral3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "olmoe"}
    | {"granite", "granitemoe", "smollm3", "arcee", "deci", "internlm2", "minicpm3", "exaone", "gpt-oss", "olmo2"}
)
_LAYER = frozenset({"gpt2", "gptneox", "phi2", "starcoder", "starcoder2", "stablelm", "falcon"})
_DIVIDED = frozenset({"granite", "granitemoe"})  # logits / logit_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Unembedding:
    """logits = softcap(W_VD norm(x) * scale + b): the model's own last steps, float32, raw units.

    rms:   norm(x) = x / sqrt(mean(x^2) + eps) * weight
    layer: norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    softcap(z) = c tanh(z / c) where the model has a cap c, else z
    """

    kind: str  # rms | layer
    eps: float
    weight_D: np.ndarray
    bias_D: np.ndarray | None
    W_VD: np.ndarray
    b_V: np.ndarray | None
    softcap: float  # 0: none
    scale: float
    tied: bool  # the output matrix is the token embedding

    def norm(self, x_ND: np.ndarray) -> np.ndarray:
        """The final normalisation of residual rows, (N, D) float32. ShapeError for another width."""
        x_ND = np.asarray(x_ND, np.float32)
        if x_ND.ndim != 2 or x_ND.shape[1] != len(self.weight_D):
            raise ShapeError(f"rows of shape {x_ND.shape}; expected (N, {len(self.weight_D)})")
        if self.kind == "layer":
            x_ND = x_ND - x_ND.mean(1, keepdims=True)
        normed_ND = x_ND / np.sqrt((x_ND * x_ND).mean(1, keepdims=True) + np.float32(self.eps)) * self.weight_D
        return normed_ND if self.bias_D is None else normed_ND + self.bias_D

    def logits(self, x_ND: np.ndarray) -> np.ndarray:
        """(N, V) logits of residual rows as if they came out of the last block."""
        return self.project(self.norm(x_ND))

    def project(self, normed_ND: np.ndarray) -> np.ndarray:
        """(N, V) logits of rows that are normalised already, or of directions."""
        logits_NV = normed_ND @ self.W_VD.T * np.float32(self.scale)
        if self.b_V is not None:
            logits_NV += self.b_V
        if self.softcap:
            logits_NV = np.float32(self.softcap) * np.tanh(logits_NV / np.float32(self.softcap))
        return logits_NV


def read_unembedding(path: str | os.PathLike[str]) -> Unembedding:
    """Read it from a GGUF file; tied embeddings are used where there is no output matrix.

    FormatError for a bad file; LlamaError names an architecture whose last steps are not known here.
    """
    reader = open_gguf(path)
    architecture = str(field_value(reader, "general.architecture", ""))
    if architecture not in _RMS | _LAYER:
        raise LlamaError(
            f"the last steps of architecture '{architecture}' are not known (known: "
            f"{', '.join(sorted(_RMS | _LAYER))}); a logit lens is not possible on it"
        )
    tensors = {t.name: t for t in reader.tensors}
    kind = "layer" if architecture in _LAYER else "rms"
    key = "attention.layer_norm_epsilon" if kind == "layer" else "attention.layer_norm_rms_epsilon"
    eps = field_value(reader, f"{architecture}.{key}")
    output = tensors.get("output.weight", tensors.get("token_embd.weight"))
    if eps is None or output is None or "output_norm.weight" not in tensors:
        raise LlamaError(f"{path} lacks an output norm, its epsilon or an output matrix; a logit lens is not possible")
    scale = float(field_value(reader, f"{architecture}.logit_scale", 1.0) or 1.0)
    return Unembedding(
        kind=kind,
        eps=float(eps),
        weight_D=_dequantised(tensors["output_norm.weight"]),
        bias_D=_optional(tensors, "output_norm.bias"),
        W_VD=_dequantised(output),
        b_V=_optional(tensors, "output.bias"),
        softcap=float(field_value(reader, f"{architecture}.final_logit_softcapping", 0.0)),
        scale=1 / scale if architecture in _DIVIDED else scale,
        tied="output.weight" not in tensors,
    )


def _optional(tensors: dict[str, Any], name: str) -> np.ndarray | None:
    return _dequantised(tensors[name]) if name in tensors else None


def _dequantised(tensor: Any) -> np.ndarray:
    """float32 in numpy's order, whatever the file's type. LlamaError for a type gguf cannot read."""
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise LlamaError(f"cannot read {tensor.name} of type {tensor.tensor_type.name}: {error}") from None
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return np.ascontiguousarray(values, np.float32).reshape(shape)
