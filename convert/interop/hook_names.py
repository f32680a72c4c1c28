"""Hook points as other libraries name them, to ours. The one place where conventions meet.

TransformerLens   blocks.3.hook_resid_post: as ours, but for hook_q and hook_k (another place) and ln_final (behind its gain here); hook_mlp_in is hook_resid_mid
Hugging Face      model.layers.3: the output of the module; `.input` and `.output` at the end say which
"""

from __future__ import annotations

import re

from sae.errors import FormatError

from ..keys import hook_block

OURS = {
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "mlp.hook_post",
    "attn.hook_z", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k", "ln1.hook_normalized", "ln2.hook_normalized",
}  # fmt: skip
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.(.+)")
_MODULE = re.compile(
    r"(?:model\.)?(?:language_model\.)?(?:layers|transformer\.h|h|gpt_neox\.layers)\.(\d{1,4})(?:\.(.+))?"
)
# what a module of a block computes; on models with a norm after attention and MLP that norm's output is added instead
MODULES = {
    "": "hook_resid_post", "output": "hook_resid_post", "input": "hook_resid_pre",
    "mlp": "hook_mlp_out", "mlp.output": "hook_mlp_out", "mlp.down_proj.output": "hook_mlp_out",
    "mlp.down_proj.input": "mlp.hook_post",
    "self_attn": "hook_attn_out", "self_attn.output": "hook_attn_out", "attn": "hook_attn_out",
    "attention": "hook_attn_out", "self_attn.o_proj.input": "attn.hook_z", "self_attn.o_proj.output": "hook_attn_out",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}  # fmt: skip
# the input of the MLP after its norm and that norm's gain: no site of ours, but llama.cpp names the tensor
MLP_INPUTS = ("mlp.input", "pre_feedforward_layernorm.output")
BEFORE_NORM = (
    "hook {} is the output of a module; where the model has a norm behind it (gemma2, gemma3, olmo2) "
    "{} is what follows that norm: name the tensor with convert.hook=ggml:NAME"
)


def to_hook(name: str, override: str, label: str, notes: list[str], *, key: str = "convert.hook") -> str:
    """Our name for a foreign hook point; `override` (the setting `key`) wins.

    FormatError for a name that has no counterpart, and for an override that is no hook point.
    """
    if override:
        hook_block(override)
        return override
    if match := _BLOCK.fullmatch(name):
        site = "hook_resid_mid" if match[2] == "hook_mlp_in" else match[2]
        if site in OURS:
            return f"blocks.{int(match[1])}.{site}"
    if match := _MODULE.fullmatch(name):
        block, module = int(match[1]), match[2] or ""
        if module in MLP_INPUTS:
            return f"ggml:ffn_norm-{block}"
        if module in MODULES:
            ours = f"blocks.{block}.{MODULES[module]}"
            if module.split(".")[0] in ("mlp", "self_attn", "attn", "attention") and not module.endswith("input"):
                notes.append(BEFORE_NORM.format(name, ours))
            return ours
    said = (
        f"hook point {name[:80]!r} has no counterpart here"
        if name
        else "the files do not say which hook point it reads"
    )
    raise FormatError(f"{label}: {said}; name it with {key}=blocks.N.hook_resid_post (or another point)")


def layer_in(label: str, pattern: str) -> str:
    """The number that `pattern`'s group finds in the place's name, "" where it does not."""
    match = re.search(pattern, label)
    return str(int(match[1])) if match else ""
