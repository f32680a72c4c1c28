"""Names of the SAE GGUF v1 format, in one place. docs/formats.md is the specification."""

from __future__ import annotations

import re

from sae.errors import FormatError

ARCHITECTURE = "sae"
VERSION = 2  # of files that need what version 1 lacks; others are written as version 1
MATRIX_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_1", "Q4_0")
MATRICES = ("enc.weight", "dec.weight")  # of any of these types; all other tensors are F32
MAX_ENTRIES = 1024

SAE_VERSION = "sae.version"
SAE_COUNT = "sae.count"
LABELS = "labels"  # below `sae.{i}.`

# ModelId.as_dict() name -> key below `sae.{i}.`
HOST_KEYS = {
    "architecture": "host.architecture",
    "n_embd": "host.embedding_length",
    "n_layer": "host.block_count",
    "vocab_sha256": "host.vocab_sha256",
    "sha256": "host.sha256",
    "file_type": "host.file_type",
}
BASE_MODEL_COUNT = "general.base_model.count"
BASE_MODEL_NAME = "general.base_model.0.name"

# llama.cpp's own names in arch llama. A hint for people: readers resolve the hook point on the real graph.
TENSOR_HINTS = {
    "hook_resid_mid": "ffn_inp-{}",
    "hook_resid_post": "l_out-{}",
    "hook_attn_out": "attn_out-{}",
    "hook_mlp_out": "ffn_out-{}",
    "attn.hook_z": "kqv_out-{}",
}
_IN_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.([a-z0-9_.]+)")
_ELSEWHERE = re.compile(r"ggml:[ -~]+|ln_final\.hook_normalized|logits")


def entry(index: int, name: str) -> str:
    """Full key or tensor name of entry `index`: `entry(0, "enc.weight")` is `sae.0.enc.weight`."""
    return f"sae.{index}.{name}"


def hook_block(hook: str) -> int | None:
    """Block number of a hook point, None for one that is in no block.

    Raises FormatError for text that is no hook point: `blocks.N.SITE`, `ggml:TENSOR`, `ln_final.hook_normalized`,
    `logits`.
    """
    match = _IN_BLOCK.fullmatch(hook)
    if match:
        return int(match.group(1))
    if _ELSEWHERE.fullmatch(hook):
        return None
    raise FormatError(f"expected a hook point like 'blocks.3.hook_resid_post', got {hook[:80]!r}")


def hook_tensor(hook: str) -> str:
    """llama.cpp's tensor name for the hook point in arch llama, "" where there is no fixed one."""
    match = _IN_BLOCK.fullmatch(hook)
    if match is None:
        return hook.removeprefix("ggml:") if hook.startswith("ggml:") else ""
    block, site = int(match.group(1)), match.group(2)
    if site == "hook_resid_pre" and block > 0:
        return f"l_out-{block - 1}"
    return TENSOR_HINTS.get(site, "").format(block)
