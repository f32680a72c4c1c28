"""Hook points by the field's names, `blocks.3.hook_resid_post`; blocks count from 0. No llama_cpp here.

TransformerLens's names, with two differences: `hook_q` and `hook_k` are what RoPE turns, so after the norm of q and k
where a model has one, and heads lie side by side in one row. `ln1` and `ln2` are before the norm's gain and bias, as there;
`ln_final` is behind it, what the unembedding reads.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sae.errors import HookError

# What each site is, in the residual stream x of one block:
#   resid_pre -> (norm, q k v, RoPE, attention, z, output projection = attn_out) -> + = resid_mid
#   resid_mid -> (norm, mlp_post, down projection = mlp_out) -> + = resid_post
BLOCK_SITES: dict[str, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "ln1": "ln1.hook_normalized",  # the norm before the attention, without its gain and bias: of unit (root mean) square
    "ln2": "ln2.hook_normalized",  # ... before the MLP
    "attn_out": "hook_attn_out",  # what the attention adds to the residual
    "mlp_out": "hook_mlp_out",  # what the MLP adds to the residual
    "mlp_post": "mlp.hook_post",  # input of the MLP's down projection
    "router": "mlp.hook_router_scores",  # a mixture of experts: logits over the experts, before the choice
    "expert_weights": "mlp.hook_expert_weights",  # ... after softmax or sigmoid, over all experts
    "q": "attn.hook_q",  # what RoPE turns: after a norm of q, all heads side by side
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "rot_q": "attn.hook_rot_q",  # after RoPE
    "rot_k": "attn.hook_rot_k",
    "z": "attn.hook_z",  # heads side by side, the input of the output projection
    "pattern": "attn.hook_pattern",  # attention weights, per head and position; flash_attn=off only
}
MODEL_SITES: dict[str, str] = {"ln_final": "ln_final.hook_normalized", "logits": "logits"}
RAW_PREFIX = "ggml:"
NOT_STORABLE = frozenset({"pattern", "logits"})  # no fixed width per token, or too wide: for the lens

_SITE_OF = {name: site for site, name in BLOCK_SITES.items()}
_SITE_OF |= {f"hook_{site}": site for site in BLOCK_SITES}
_MODEL_SITE_OF = {name: site for site, name in MODEL_SITES.items()} | {"ln_final": "ln_final"}
_IN_BLOCK = re.compile(r"blocks\.(0|[1-9]\d{0,5})\.(.+)")
_IN_BLOCKS = re.compile(r"blocks\.(\*|(\d{1,6})(?:\.\.(\d{1,6}))?|\{\d{1,6}(?:,\d{1,6})*\})\.(.+)")
_NUMBERED = re.compile(r"(.*?-)(\d{1,6})((?:[ #].*)?)")  # a tensor's name: `Qcur-3`, `Qcur-3 (view)`, `Qcur-3#1`


@dataclass(frozen=True, slots=True, order=True)
class HookPoint:
    """A place in the forward pass: a site of a block, `ln_final`, `logits`, or a raw ggml tensor name."""

    site: str
    block: int | None = None
    tensor: str = ""  # site "ggml" only: the tensor's name, with `#2` its third node of that name

    @classmethod
    def parse(cls, text: str) -> HookPoint:
        """Read `blocks.3.hook_resid_post`, `blocks.3.attn.hook_z`, `ln_final.hook_normalized`, `logits`, `ggml:NAME`.

        HookError names the sites that exist, and the nearest one.
        """
        if text.startswith(RAW_PREFIX) and len(text) > len(RAW_PREFIX):
            return cls("ggml", None, text[len(RAW_PREFIX) :])
        if text in _MODEL_SITE_OF:
            return cls(_MODEL_SITE_OF[text])
        if (match := _IN_BLOCK.fullmatch(text)) and match[2] in _SITE_OF:
            return cls(_SITE_OF[match[2]], int(match[1]))
        raise HookError(_cannot_read(text))

    def __str__(self) -> str:
        if self.site == "ggml":
            return RAW_PREFIX + self.tensor
        if self.block is None:
            return MODEL_SITES[self.site]
        return f"blocks.{self.block}.{BLOCK_SITES[self.site]}"


def _cannot_read(text: str) -> str:
    names = [f"blocks.N.{name}" for name in BLOCK_SITES.values()] + list(MODEL_SITES.values())
    block = match[1] if (match := _IN_BLOCK.fullmatch(text)) else "N"
    close = difflib.get_close_matches(text, [n.replace(".N.", f".{block}.") for n in names], 1, 0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"'{text}' is no hook point{hint} (known: {', '.join(names)}, ggml:TENSOR_NAME)"


def is_pattern(text: str) -> bool:
    """Whether a text may stand for several hook points: it has a `*`, or names blocks by a range or a list."""
    match = _IN_BLOCKS.fullmatch(text)
    return ("*" in text and (match is not None or text.startswith(RAW_PREFIX))) or (
        match is not None and not match[1].isdigit()
    )


def expand(texts: Iterable[str], known: Sequence[HookPoint], raw_names: Iterable[str] = ()) -> list[HookPoint]:
    """Hook points of texts that may hold patterns, each pattern's in the order of `known`; no doubles.

    `blocks.*.SITE` is every block that has the site, `blocks.2..5.SITE` (both included) and `blocks.{1,4}.SITE` the
    blocks named, `blocks.3.*` or `blocks.*.attn.hook_*` every site of that form that can be stored, `ggml:l_out-*`
    every tensor of that form. `known` and `raw_names` are what the model has, in the order of computation. A text
    without a pattern is read, not looked up.

    HookError for a text that is no hook point, a pattern nothing matches, and a block named that lacks the site.
    """
    raw_names = list(raw_names)
    found: dict[HookPoint, None] = {}
    for text in texts:
        if not is_pattern(text):
            matches = [HookPoint.parse(text)]
        elif match := _IN_BLOCKS.fullmatch(text):
            matches = _block_matches(text, match, known)
        else:
            matches = _raw_matches(text, raw_names)
        found |= dict.fromkeys(matches)
    return list(found)


def blocks_read(texts: Iterable[str]) -> int | None:
    """How many blocks, from the first on, have to be computed for texts as `expand` takes them; None: no saying less
    than all of them."""
    most = 0
    for text in texts:
        match = _IN_BLOCKS.fullmatch(text)
        blocks = _blocks(match) if match else None
        if match is None or not blocks:  # a point of the whole model, a raw name, `*`, a misspelling
            return None
        most = max(most, max(blocks) + (_SITE_OF.get(match[4]) != "resid_pre"))
    return most


def _raw_matches(text: str, names: list[str]) -> list[HookPoint]:
    pattern = _glob(text.removeprefix(RAW_PREFIX))
    if matches := [HookPoint("ggml", None, name) for name in names if pattern.fullmatch(name)]:
        return matches
    raise HookError(f"'{text}' matches no tensor; this model's graph has {describe_tensors(names)}")


def _block_matches(text: str, match: re.Match[str], known: Sequence[HookPoint]) -> list[HookPoint]:
    sites = _sites(match[4], text)
    blocks = _blocks(match)
    matches = [p for p in known if p.block is not None and p.site in sites and (blocks is None or p.block in blocks)]
    if lacking := (blocks or set()) - {p.block for p in matches}:
        raise HookError(f"'{text}': block {min(lacking)} has no such point; this model has {described(known)}")
    if not matches:
        raise HookError(f"'{text}' matches no hook point; this model has {described(known)}")
    return matches


def _sites(name: str, text: str) -> set[str]:
    if "*" in name:
        pattern = _glob(name)
        return {site for site, full in BLOCK_SITES.items() if pattern.fullmatch(full)} - NOT_STORABLE
    if name not in _SITE_OF:
        raise HookError(_cannot_read(text))
    return {_SITE_OF[name]}


def _blocks(match: re.Match[str]) -> set[int] | None:
    """The blocks a pattern names; None: any."""
    if match[1] == "*":
        return None
    if match[1].startswith("{"):
        return {int(number) for number in match[1][1:-1].split(",")}
    return set(range(int(match[2]), int(match[3] or match[2]) + 1))


def _glob(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, text.split("*"))))


def described(known: Iterable[HookPoint]) -> str:
    """`describe`, or what to do where there is nothing to describe."""
    return describe(known) or "no hook points by name, only raw tensors (ggml:NAME; see `ggscope inspect`)"


def describe(points: Iterable[HookPoint]) -> str:
    """`blocks.0..5.hook_resid_pre, ..., logits`: a short list of what exists, for messages."""
    blocks: dict[str, list[int]] = {}
    rest = []
    for point in points:
        if point.block is None:
            rest.append(str(point))
        else:
            blocks.setdefault(point.site, []).append(point.block)
    order = [site for site in BLOCK_SITES if site in blocks]
    return ", ".join([f"blocks.{block_ranges(blocks[site])}.{BLOCK_SITES[site]}" for site in order] + rest)


def describe_tensors(names: Iterable[str]) -> str:
    """`embd, l_out-0..31`: the names of a graph's tensors without those llama.cpp numbered itself."""
    blocks: dict[tuple[str, str], list[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            blocks.setdefault((match[1], match[3]), []).append(int(match[2]))
        elif not name.startswith("node_"):
            blocks.setdefault((name, ""), [])
    return ", ".join(
        stem + (block_ranges(found) if found else "") + rest for (stem, rest), found in sorted(blocks.items())
    )


def block_ranges(numbers: Iterable[int]) -> str:
    """`3`, `0..5` or `{1,4}`."""
    numbers = sorted(set(numbers))
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}"
    return "{" + ",".join(map(str, numbers)) + "}"
