"""sparsify (EleutherAI, `eai-sparsify`): `cfg.json` and `sae.safetensors`, in a folder named after the module.

    a = TopK(ReLU(W_enc (x - b_dec) + b_enc)),  x_hat = W_dec^T a + b_dec (+ W_skip x)

A transcoder (`transcode`) reads the module's input, subtracts nothing and gives the module's output; an SAE reads the
module's output. encoder.weight (F, D), W_dec (F, D). `num_latents` may be 0 in the file: the tensor says.
"""

from __future__ import annotations

import re

from sae.errors import FormatError

from .building import Foreign, optional, required, whole_number
from .hook_names import to_hook
from .source import Source

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
FILES = (CONFIG, WEIGHTS)
_MODULE = re.compile(r"(?:^|/)((?:model\.)?(?:layers|transformer\.h|h|gpt_neox\.layers)\.\d+(?:\.[a-z_.]+)?)/*$")


def recognises(source: Source) -> bool:
    return source.has(CONFIG, WEIGHTS)


def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
    label, config, arrays = source.label, source.json(CONFIG), source.arrays(WEIGHTS)
    W_enc_FD = required(arrays, "encoder.weight", label, 2)
    latents = len(W_enc_FD)
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax") or config.get("signed"):
        raise FormatError(
            f"{label}: activation {str(activation)[:40]!r} (signed: {bool(config.get('signed'))}) is not read"
        )
    module = match[1] if (match := _MODULE.search(label.removesuffix(f"/{WEIGHTS}"))) else ""
    skip_OD = optional(arrays, "W_skip", label, 2)
    transcode = bool(config.get("transcode"))
    notes: list[str] = []
    found = Foreign(
        W_enc_FD=W_enc_FD,
        b_enc_F=required(arrays, "encoder.bias", label, 1),
        W_dec_FO=required(arrays, "W_dec", label, 2),
        b_dec_O=required(arrays, "b_dec", label, 1),
        hook=to_hook(module + ".input" * (transcode and bool(module)), hook, label, notes),
        k=whole_number(config.get("k", 32), "k", label, latents),
        variant=activation,
        subtracts_b_dec=not transcode,
        W_skip_OD=skip_OD,
        notes=notes,
    )
    if transcode:
        found.hook_out = to_hook(module, hook_out, label, notes, key="convert.hook_out")
    elif skip_OD is not None:
        found.hook_out = found.hook
    return found
