"""Attention heads switched off: nothing, or their mean, in place of what they write.

Heads are named as in the literature, `L3H5`: block 3, head 5, both from 0. What a head writes are its columns of
`attn.hook_z`, the input of the output projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from sae.errors import ConfigError, ShapeError

from .base import Intervention, check_width, digest

_NAME = re.compile(r"L(\d{1,6})H(\d{1,6}|\*)")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class AblateHeads(Intervention):
    """x' = x with the columns of `heads` set to 0, or to those of `mean_D` (the mean of the point's rows over some text).

    `count`: how many heads lie side by side in a row of the point, equal in width. An attention head is no SAE: nothing
    speaks for leaving BOS alone, `where=Where(flagged=True)` takes every row.
    """

    heads: tuple[int, ...]
    count: int
    mean_D: np.ndarray | None = None
    sets_value: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if wrong := [head for head in self.heads if not 0 <= head < self.count]:
            raise ConfigError(f"{self.point} has heads 0..{self.count - 1}, got {', '.join(map(str, wrong))}")
        if len(set(self.heads)) != len(self.heads):
            raise ConfigError(f"a head is named twice in {list(self.heads)}; name each once")

    def key(self) -> str:
        mean = "zero" if self.mean_D is None else digest(np.asarray(self.mean_D, np.float32))
        return f"heads({self.point};{sorted(self.heads)}/{self.count};{mean};{self.where.key()})"

    def change(self, x_ND: np.ndarray, seq_N: np.ndarray, pos_N: np.ndarray) -> np.ndarray:
        if self.mean_D is not None:
            check_width(x_ND, len(self.mean_D), "the mean")
        columns = columns_of(self.heads, self.count, x_ND.shape[1])
        delta_ND = np.zeros_like(x_ND)
        delta_ND[:, columns] = -x_ND[:, columns]
        if self.mean_D is not None:
            delta_ND[:, columns] += np.asarray(self.mean_D, np.float32)[columns]
        return delta_ND


def columns_of(heads: Iterable[int], count: int, width: int) -> np.ndarray:
    """Columns of some of `count` heads that lie side by side in rows of `width`, ascending."""
    if width % count:
        raise ShapeError(f"{count} heads of one width do not make rows of {width}")
    each = width // count
    return np.concatenate([np.arange(head * each, (head + 1) * each) for head in sorted(heads)] or [np.arange(0)])


def head_name(block: int, head: int) -> str:
    return f"L{block}H{head}"


def named_heads(names: Iterable[str], counts: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """Block -> heads of names such as `L3H5` and `L3H*` (all of a block), ascending. `counts`: heads of each block.

    ConfigError for a text that names none, and for a block or head that is not there.
    """
    found: dict[int, set[int]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(f"expected heads as L3H5 (block 3, head 5) or L3H* (all of block 3), got {name!r}")
        block = int(match[1])
        if block not in counts:
            blocks = ", ".join(map(str, counts)) or "none"
            raise ConfigError(f"{name}: no attention heads in block {block}; blocks with heads: {blocks}")
        if match[2] != "*" and int(match[2]) >= counts[block]:
            raise ConfigError(f"{name}: block {block} has heads 0..{counts[block] - 1}")
        found.setdefault(block, set()).update(range(counts[block]) if match[2] == "*" else [int(match[2])])
    return {block: tuple(sorted(heads)) for block, heads in sorted(found.items())}
