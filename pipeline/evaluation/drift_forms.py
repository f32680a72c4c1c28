"""The forms of an SAE in a drift report: both matrices in types of a GGUF file, encoded as `ggscope apply` does.

W_enc is multiplied in its type by ggml (GgmlEncoder), so a form's rounding of the row counts too; with numpy the
float32 row meets the rounded matrix. W_dec's rows are those the file gives back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.keys import MATRIX_TYPES
from convert.sae_gguf import stored_as, stored_matrix
from pipeline.cores import usable_cores
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.placement import device_at
from sae.errors import ConfigError
from sae.weights import SAEWeights

from .baselines import SAEReplacement


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """The types of both matrices; `name` as the settings spell it: `Q8_0`, or `Q4_0/Q8_0` for encoder and decoder."""

    name: str
    encoder_type: str
    decoder_type: str


def forms_of(names: Sequence[str]) -> list[Form]:
    """ConfigError for a type that no file has, and for one named twice."""
    found = []
    for name in names:
        encoder, _, decoder = name.partition("/")
        if encoder not in MATRIX_TYPES or (decoder or encoder) not in MATRIX_TYPES:
            raise ConfigError(
                f"drift.types: expected {', '.join(MATRIX_TYPES)}, or two of them as ENCODER/DECODER, got {name!r}"
            )
        found.append(Form(name=name, encoder_type=encoder, decoder_type=decoder or encoder))
    if not found or len(set(names)) < len(found):
        raise ConfigError(f"drift.types: expected each type once, got {', '.join(names) or 'none'}")
    return found


def groups_of(forms: Sequence[Form], weights: SAEWeights, copies_bytes: int) -> list[Sequence[Form]]:
    """As many forms at once as their copies fit `copies_bytes`, at least one: float32 ones, and W_enc in its type."""
    each = 2 * weights.W_enc_FD.nbytes + weights.W_dec_FD.nbytes
    size = max(1, copies_bytes // each)
    return [forms[i : i + size] for i in range(0, len(forms), size)]


def running(form: Form, weights: SAEWeights, choice: str, model: Model, session: Mapping[str, Any]) -> SAEReplacement:
    """The SAE in this form, with the encoder that `apply.encoder=choice` runs beside a session of these settings.

    LlamaError for "ggml" where llama.cpp's device cannot multiply with the type; FormatError where no file can hold it.
    """
    rounded = stored_as(weights, form.encoder_type, form.decoder_type)
    if choice == "numpy":  # before the import: a llama.cpp without these symbols can still be used
        return SAEReplacement(rounded)
    from pipeline.llama.encoder import open_encoder

    stored = stored_matrix("enc.weight", weights.W_enc_FD, form.encoder_type)
    n_threads = session.get("n_threads") or usable_cores()
    device = device_at(model, HookPoint.parse(weights.hook))
    return SAEReplacement(rounded, open_encoder(rounded, choice, n_threads=n_threads, stored=stored, device=device))
