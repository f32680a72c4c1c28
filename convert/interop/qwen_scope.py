"""Qwen Scope: `Qwen/SAE-Res-<model>-W<n>K-L0_<k>/layer<L>.sae.pt`, residual stream after a block.

    a = TopK(ReLU(W_enc x + b_enc)),  x_hat = W_dec a + b_dec

W_enc (F, D), W_dec (D, F). k stands in the repository's name only, so a local copy must lie in a folder of that name.
"""

from __future__ import annotations

import re

from sae.errors import FormatError

from .building import Foreign, required, whole_number
from .hook_names import layer_in, to_hook
from .source import Source

NAME = "qwen_scope"
FILES = ()
_REPO = re.compile(r"SAE-Res-([^/]+?)-W(\d+)K-L0_(\d+)")


def recognises(source: Source) -> bool:
    return source.torch_names() == {"W_enc", "W_dec", "b_enc", "b_dec"}


def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
    label, arrays, notes = source.label, source.arrays(), []
    release = _REPO.search(label)
    if not release:
        raise FormatError(
            f"{label}: k stands in the repository's name only; keep the file in a folder named like SAE-Res-Qwen3-8B-Base-W64K-L0_50"
        )
    W_enc_FD = required(arrays, "W_enc", label, 2)
    layer = layer_in(source.named, r"layer(\d+)\.sae\.pt")
    return Foreign(
        W_enc_FD=W_enc_FD,
        b_enc_F=required(arrays, "b_enc", label, 1),
        W_dec_FO=required(arrays, "W_dec", label, 2).T,
        b_dec_O=required(arrays, "b_dec", label, 1),
        hook=to_hook(f"blocks.{layer}.hook_resid_post" if layer else "", hook, label, notes),
        variant="topk",
        k=whole_number(int(release[3]), "L0 of the name", label, len(W_enc_FD)),
        model_name=f"Qwen/{release[1]}",
        published={"l0": float(release[3])},
        notes=notes,
    )
