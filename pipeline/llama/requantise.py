"""A model's file in another quantisation, made by llama.cpp itself: the types a user's own file would have."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import gguf

from sae.errors import LlamaError

from .log import log_tail
from .symbols import lc

# those that need no importance matrix
KINDS = (
    "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "Q3_K_L",
    "Q3_K_M", "Q3_K_S", "Q2_K",
)  # fmt: skip


def write_requantised(source: Path, destination: Path, kind: str, *, n_threads: int) -> None:
    """Write `source` (F32, F16 or BF16) as `kind`, as llama-quantize does: norms stay F32, the output layer may keep more bits.

    Written whole or not at all. LlamaError with llama.cpp's own words where it cannot, e.g. of a quantised source.
    """
    partial = destination.with_name(f"{destination.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    params = lc.llama_model_quantize_default_params()
    params.nthread = n_threads
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    log_tail.install()
    log_tail.clear()
    try:
        if lc.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(params)):
            raise LlamaError(
                f"llama.cpp could not write {source} as {kind}: {log_tail.reason('no reason given')}; "
                "give a file of F32, F16 or BF16 weights, and room on the disk"
            )
        os.replace(partial, destination)
    finally:
        partial.unlink(missing_ok=True)
