"""From a foreign file's arrays to `SAEWeights`: shapes checked, scales and norms folded.

Shape letters: D d_in, O d_out, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sae.errors import FormatError, SAEError
from sae.weights import SAEWeights

LARGEST = float(np.finfo(np.float32).max)
RANKS = ("one number", "a vector", "a matrix", "a stack of matrices")  # by the number of axes
WIDE_SITES = ("attn.hook_z", "mlp.hook_post", "attn.hook_q", "attn.hook_k", "attn.hook_v")  # not as wide as the model


@dataclass(kw_only=True)
class Foreign:
    """An SAE as its library computes it, in that library's units, u = input_scale x:

    pre = W_enc (u - b_dec) + b_enc     (without "- b_dec" where `subtracts_b_dec` is false)
    y   = (sum_i a_i W_dec[i] + b_dec) / output_scale

    `k` 0: nowhere said. `by_norm`: what is compared, and what a is, is pre ||W_dec[i]||, and y has a_i / ||W_dec[i]||.
    `threshold_F` None with variant "threshold": plain ReLU. Negative thresholds are those of ReLU, since a >= 0.
    """

    W_enc_FD: np.ndarray
    b_enc_F: np.ndarray
    W_dec_FO: np.ndarray
    b_dec_O: np.ndarray
    hook: str
    k: int = 0
    variant: str = "threshold"
    threshold_F: np.ndarray | None = None
    subtracts_b_dec: bool = False
    input_scale: float = 1.0
    output_scale: float = 1.0
    by_norm: bool = False
    centred: bool = False  # u has its mean over the dimensions taken off: the model's writing weights were centred
    layer_norm_eps: float | None = None  # sigma with D - 1 below the root, as torch has it
    hook_out: str = ""
    W_skip_OD: np.ndarray | None = None
    freq_F: np.ndarray | None = None
    prepend_bos: bool | None = None  # whether its training put a BOS before every text; None: nowhere said
    bos_excluded: bool | None = None  # rows of special tokens were left out of its training; None: nowhere said
    model_name: str = ""
    published: dict[str, float] = field(default_factory=dict)  # l0, fvu, as its files or its name say
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """`weights` in raw model units; mean 0, variance 1 and k 1 stand for what no file says (`k_known`)."""

    weights: SAEWeights
    format: str
    k_known: bool
    published: dict[str, float]
    notes: tuple[str, ...]


def build(found: Foreign, format_name: str, label: str) -> Imported:
    """Folds and checks.

    W_enc input_scale; W_dec and b_dec over output_scale; b_dec's subtraction goes into b_enc where it cannot stay
    (unequal scales, transcoders, `centred`); with `centred` W_enc less the mean of each row; with `by_norm`
    n = ||W_dec[i]||: n W_enc, n b_enc, W_dec / n.

    FormatError where the arrays do not fit, hold NaN, a scale is not positive, or what comes out is beyond float32.
    """
    arrays = {name: value for name, value in vars(found).items() if isinstance(value, np.ndarray)}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise FormatError(f"{label}: {name} holds NaN or infinity")
    check_shapes(found, label)
    for name in ("input_scale", "output_scale"):
        if not (np.isfinite(getattr(found, name)) and getattr(found, name) > 0):
            raise FormatError(f"{label}: the scale of the activations is {getattr(found, name)}, expected above 0")
    W_enc_FD, b_enc_F, W_dec_FO, b_dec_O = found.W_enc_FD, found.b_enc_F, found.W_dec_FO, found.b_dec_O
    subtracts = found.subtracts_b_dec
    if subtracts and (found.hook_out or found.centred or found.input_scale != found.output_scale):
        b_enc_F = (b_enc_F - W_enc_FD.astype(np.float64) @ b_dec_O).astype(np.float32)
        subtracts = False
    if found.centred:  # <w, x - mean(x)> = <w - mean(w), x>
        W_enc_FD = W_enc_FD - W_enc_FD.mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)
    if found.by_norm:
        norm_F = np.linalg.norm(W_dec_FO, axis=1)
        W_enc_FD, b_enc_F = W_enc_FD * norm_F[:, None], b_enc_F * norm_F
        W_dec_FO = W_dec_FO / np.where(norm_F > 0, norm_F, 1)[:, None]
    if found.input_scale != 1:
        W_enc_FD = W_enc_FD * np.float32(found.input_scale)
    if found.output_scale != 1:
        W_dec_FO, b_dec_O = W_dec_FO / np.float32(found.output_scale), b_dec_O / np.float32(found.output_scale)
    fields: dict[str, Any] = {}
    if found.variant == "threshold":
        threshold_F = np.zeros(len(b_enc_F)) if found.threshold_F is None else found.threshold_F
        fields["threshold_F"] = np.maximum(threshold_F, 0)
    if found.layer_norm_eps is not None:
        fields |= {"norm_mode": "layer", "norm_eps": found.layer_norm_eps, "norm_correction": 1}
    training: dict[str, Any] = {"imported_from": format_name, "source": label}
    for name in ("bos_excluded", "prepend_bos"):
        if (said := getattr(found, name)) is not None:
            training[name] = said
    try:
        weights = SAEWeights(
            W_enc_FD=W_enc_FD, b_enc_F=b_enc_F, W_dec_FD=W_dec_FO, b_dec_D=b_dec_O,
            mean_D=np.zeros_like(b_dec_O), variance=1.0, k=found.k or 1, hook=found.hook, variant=found.variant,
            b_dec_subtracted=subtracts, hook_out=found.hook_out, W_skip_OD=found.W_skip_OD, freq_F=found.freq_F,
            host=host_facts(found), training=training, **fields,
        )  # fmt: skip
    except SAEError as error:
        raise FormatError(f"{label}: {error}") from error
    for name, array in vars(weights).items():
        if isinstance(array, np.ndarray) and not np.isfinite(array).all():
            raise FormatError(f"{label}: {name} is beyond the range of float32 once its scales are folded in")
    published = {key: value for key, value in found.published.items() if np.isfinite(value)}
    return Imported(
        weights=weights, format=format_name, k_known=found.k > 0, published=published, notes=tuple(found.notes)
    )


def check_shapes(found: Foreign, label: str) -> None:
    if found.W_enc_FD.ndim != 2 or found.W_dec_FO.ndim != 2 or not found.W_enc_FD.size:
        raise FormatError(
            f"{label}: expected matrices of an encoder and a decoder, got shapes {found.W_enc_FD.shape}, {found.W_dec_FO.shape}"
        )
    latents, d_in = found.W_enc_FD.shape
    d_out = found.W_dec_FO.shape[1]
    if not found.hook_out and d_in != d_out:
        raise FormatError(f"{label}: the encoder reads {d_in} numbers, the decoder gives {d_out}")
    wanted = {
        "b_enc_F": (latents,), "W_dec_FO": (latents, d_out), "b_dec_O": (d_out,), "threshold_F": (latents,),
        "freq_F": (latents,), "W_skip_OD": (d_out, d_in),
    }  # fmt: skip
    for name, shape in wanted.items():
        array = getattr(found, name)
        if array is not None and array.shape != shape:
            raise FormatError(
                f"{label}: {name.rsplit('_', 1)[0]} has shape {array.shape}, expected {shape} to fit the encoder"
            )
    if found.subtracts_b_dec and d_in != d_out:
        raise FormatError(f"{label}: a bias of {d_out} numbers cannot be subtracted from {d_in}")


def host_facts(found: Foreign) -> dict[str, Any]:
    """What is known of the model: its name, and its width where the hook point is as wide as the model."""
    facts: dict[str, Any] = {"name": found.model_name} if found.model_name else {}
    if not found.hook.endswith(WIDE_SITES) and found.hook.startswith("blocks."):
        facts["n_embd"] = found.W_enc_FD.shape[1]
    return facts


def gate_threshold(r_mag_F: np.ndarray, gate_bias_F: np.ndarray, mag_bias_F: np.ndarray) -> np.ndarray:
    """Gated SAEs (Rajamanoharan et al. 2404.16014) as thresholds, exactly.

    pre = e^r z + b_mag fires where z + b_gate > 0 and pre > 0, which is pre > max(0, b_mag - e^r b_gate).
    """
    return np.maximum(mag_bias_F.astype(np.float64) - np.exp(r_mag_F.astype(np.float64)) * gate_bias_F, 0)


def required(arrays: dict[str, Any], name: str, label: str, ndim: int | tuple[int, ...]) -> np.ndarray:
    """The array of that name as float32, with `ndim` axes (or one of several counts), none of them empty."""
    found = optional(arrays, name, label, ndim)
    if found is None:
        named = (name if name.isprintable() else repr(name) for name in sorted(arrays)[:12])
        held = ", ".join(name[:60] for name in named) or "nothing"
        raise FormatError(f"{label} has no tensor {name!r}; it holds {held}")
    return found


def optional(arrays: dict[str, Any], name: str, label: str, ndim: int | tuple[int, ...]) -> np.ndarray | None:
    """As `required`, None where nothing has that name."""
    found, wanted = arrays.get(name), (ndim,) if isinstance(ndim, int) else ndim
    if found is None:
        return None
    if not isinstance(found, np.ndarray):
        raise FormatError(f"{label}: {name!r} should be a tensor, got {shown(found)}")
    if found.ndim not in wanted or not found.size:
        wanted_said = " or ".join(RANKS[n] for n in wanted)
        raise FormatError(f"{label}: {name!r} should be {wanted_said} and not empty, got {shown(found)}")
    if found.dtype.kind != "f" and found.size > 1:
        raise FormatError(
            f"{label}: {name!r} holds whole numbers, expected floating-point ones; a quantised SAE has to be written out first"
        )
    return found.astype(np.float32, copy=False)


def whole_number(value: Any, what: str, label: str, most: int) -> int:
    """1 to `most`; FormatError otherwise."""
    value = single(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 1 <= value <= most:
        raise FormatError(f"{label}: {what} should be a whole number from 1 to {most}, got {shown(value)}")
    return value


def number(value: Any, what: str, label: str) -> float:
    """A finite number, of the range of a float32."""
    value = single(value)
    if type(value) not in (int, float) or not abs(value) <= LARGEST:
        raise FormatError(f"{label}: {what} should be a number, got {shown(value)}")
    return float(value)


def single(value: Any) -> Any:
    """The number of an array of one, anything else as it is."""
    return value.item() if isinstance(value, np.ndarray) and value.size == 1 else value


def shown(value: Any) -> str:
    """What a message says of a foreign value, on one line: itself where it is short and plain, else what it is."""
    if isinstance(value, np.ndarray):
        return f"a tensor of shape {value.shape}"
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, int) and value.bit_length() > 128:
        return "a far larger number"
    return str(value) if value is None or isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"


def text(value: Any) -> str:
    """A string of a config, "" for anything else."""
    return value[:200] if isinstance(value, str) else ""
