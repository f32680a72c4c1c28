"""Activation patching: which block and position, or which head, carries the answer from a clean prompt to a corrupted
one.

Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (causal tracing); Wang et al. 2022.

Shape letters: L blocks, P positions, H heads, T prompt tokens, D width, S variants decoded side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.errors import ConfigError, LlamaError

from ..interventions.base import Where
from ..interventions.heads import columns_of
from ..interventions.patch import Patch
from ..llama.hooks import HookPoint
from ..llama.model import Model
from ..llama.session import Hook, Rows, Session
from .side_by_side import check_fits, decoded, last_logits

HEADS_SITE = "attn.hook_z"


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchResult:
    """grid_LP[l, p] = (patched - corrupted) / (clean - corrupted), each a logit difference answer - wrong after the
    last prompt token, with the clean run's row of `site` at block l and position p put into the corrupted run; where
    `heads` are named with what head p writes at every position. NaN: a head that block does not have.

    1: the clean answer is restored; 0: nothing happens; below 0 or above 1 can happen.
    """

    site: str
    blocks: tuple[int, ...]
    positions: tuple[int, ...]
    grid_LP: np.ndarray
    clean_difference: float
    corrupted_difference: float
    clean_tokens: np.ndarray
    corrupted_tokens: np.ndarray
    answer: int
    wrong: int
    heads: tuple[int, ...] = ()

    def strongest(self) -> tuple[int, int]:
        """Row and column of the largest entry of the grid."""
        row, column = np.unravel_index(int(np.nanargmax(self.grid_LP)), self.grid_LP.shape)
        return int(row), int(column)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "site": self.site,
            "blocks": list(self.blocks),
            "positions": list(self.positions),
            "heads": list(self.heads),
            "grid": [[None if math.isnan(v) else v for v in row] for row in self.grid_LP.tolist()],
            "clean_difference": self.clean_difference,
            "corrupted_difference": self.corrupted_difference,
            "clean_tokens": self.clean_tokens.tolist(),
            "corrupted_tokens": self.corrupted_tokens.tolist(),
            "answer": self.answer,
            "wrong": self.wrong,
        }


def prompt_tokens(model: Model, text: str) -> np.ndarray:
    """Tokens of a prompt as every command takes it: BOS where the model adds one, special text parsed off."""
    tokens = model.tokenize(text.encode("utf-8"))
    return np.insert(tokens, 0, model.bos) if model.add_bos and model.bos is not None else tokens


def single_token(model: Model, text: str, role: str) -> int:
    """The one token that `text` is. Raises ConfigError with the split when it is none or several."""
    tokens = model.tokenize(text.encode("utf-8"))
    if len(tokens) != 1:
        raise ConfigError(
            f"{role}: {text!r} should be one token, this model has {len(tokens)}: {show_tokens(model, tokens)}; "
            "take another word (a leading space is part of a token)"
        )
    return int(tokens[0])


def show_tokens(model: Model, tokens: np.ndarray) -> str:
    """The pieces between bars: `|The| cat|`."""
    pieces = [model.piece(int(token)).decode("utf-8", "backslashreplace") for token in tokens]
    return "|" + "|".join(piece.replace("\n", "\\n") for piece in pieces) + "|"


def patch_sweep(
    session: Session,
    model: Model,
    clean: str,
    corrupted: str,
    answer: str,
    wrong: str,
    *,
    site: str = "hook_resid_post",
    blocks: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    heads: bool = False,
    side_by_side: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PatchResult:
    """Patches every block and position of `site` (or those named) from the clean into the corrupted run; with `heads`
    every head of `attn.hook_z` instead, at all of the positions at once.

    `side_by_side` variants are decoded in one batch, each its own sequence with its own edit, beside the corrupted
    prompt as it is; 0 takes as many as the session's sequences, batch and context hold. Raises ConfigError for prompts of unequal token counts, answers that
    are not one token, prompts whose logit differences do not differ, HookError for a site the model does not have.
    """
    tokens = [prompt_tokens(model, text) for text in (clean, corrupted)]
    _check_prompts(session, model, *tokens)
    answers = single_token(model, answer, "answer"), single_token(model, wrong, "wrong")
    if answers[0] == answers[1]:
        raise ConfigError(f"answer and wrong are the same token, {answer!r}")
    count = len(tokens[0])
    positions = tuple(positions) if positions is not None else tuple(range(count))
    if any(not 0 <= position < count for position in positions):
        raise ConfigError(f"positions should be 0..{count - 1} of the prompt's tokens, got {list(positions)}")
    counts = model.graph.heads() if heads else {}
    if heads:
        site, blocks = HEADS_SITE, blocks_with_heads(counts, blocks)
    blocks = tuple(blocks) if blocks is not None else tuple(range(model.id.n_layer))
    points = _points(site, blocks)
    sources, clean_difference = _clean_run(session, tokens[0], points, answers)
    corrupted_difference = _difference(last_logits(session, tokens[1], 1, [])[0], answers)
    scale = clean_difference - corrupted_difference
    if abs(scale) < 1e-6 * max(1.0, abs(clean_difference)):
        raise ConfigError(
            f"the clean and the corrupted prompt give the same logit difference ({clean_difference:.4f}); "
            "choose prompts that call for different answers"
        )
    columns = tuple(range(max(counts[block] for block in blocks))) if heads else positions
    cells = [(r, c) for r, b in enumerate(blocks) for c in range(len(columns)) if not heads or c < counts[b]]
    variants = [(points[row], columns[column]) for row, column in cells]
    moved: list[float] = []

    def edits(batch: Sequence[tuple[HookPoint, int]]) -> list[Patch]:
        return _head_patches(batch, sources, positions, counts) if heads else _patches(batch, sources)

    for found_SV, plain_V in decoded(session, tokens[1], variants, edits, side_by_side=side_by_side):
        plain = _difference(plain_V, answers)
        moved += [_difference(found_V, answers) - plain for found_V in found_SV]
        if progress is not None:
            progress(len(moved), len(variants))
    grid_LP = np.full((len(blocks), len(columns)), np.nan)
    grid_LP[tuple(np.array(cells).reshape(-1, 2).T)] = np.array(moved) / scale
    return PatchResult(
        site=site,
        blocks=blocks,
        positions=positions,
        heads=columns if heads else (),
        grid_LP=grid_LP,
        clean_difference=clean_difference,
        corrupted_difference=corrupted_difference,
        clean_tokens=tokens[0],
        corrupted_tokens=tokens[1],
        answer=answers[0],
        wrong=answers[1],
    )


def blocks_with_heads(counts: Mapping[int, int], blocks: Sequence[int] | None) -> list[int]:
    """The blocks named, or all with attention heads. `counts`: heads of each block that has them.

    ConfigError for a model without, or a block that has none.
    """
    if not counts:
        raise ConfigError("this model has no block with attention heads")
    if wrong := [block for block in blocks or () if block not in counts]:
        having = f"{min(counts)}..{max(counts)}" if len(counts) > max(counts) - min(counts) else str(list(counts))
        raise ConfigError(f"expected blocks with attention heads, {having}; got {', '.join(map(str, wrong))}")
    return list(dict.fromkeys(blocks)) if blocks else list(counts)


def _points(site: str, blocks: Sequence[int]) -> list[HookPoint]:
    points = [HookPoint.parse(f"blocks.{block}.{site}") for block in blocks]
    if any(point.site == "pattern" for point in points):
        raise ConfigError("an attention pattern can be read, not patched; patch attn.hook_z or hook_attn_out instead")
    return points


def _check_prompts(session: Session, model: Model, clean: np.ndarray, corrupted: np.ndarray) -> None:
    if len(clean) != len(corrupted) or len(clean) == 0:
        raise ConfigError(
            f"clean and corrupted should have the same number of tokens, got {len(clean)} and {len(corrupted)}: "
            f"{show_tokens(model, clean)} and {show_tokens(model, corrupted)}"
        )
    if np.array_equal(clean, corrupted):
        raise ConfigError("the clean and the corrupted prompt are the same; change the word that decides the answer")
    check_fits(session, len(clean))


def _patches(batch: Sequence[tuple[HookPoint, int]], sources: dict[HookPoint, np.ndarray]) -> list[Patch]:
    """Variant s of the batch is sequence s; all variants of one hook point make one patch."""
    by_point: dict[HookPoint, list[tuple[int, int]]] = {}
    for seq, (point, position) in enumerate(batch):
        by_point.setdefault(point, []).append((seq, position))
    return [
        Patch(
            point=point,
            where=Where(positions=tuple(position for _, position in pairs)),
            targets=tuple(seq for seq, _ in pairs),
            source_PD=sources[point][[position for _, position in pairs]],
        )
        for point, pairs in by_point.items()
    ]


def _head_patches(
    batch: Sequence[tuple[HookPoint, int]],
    sources: dict[HookPoint, np.ndarray],
    positions: tuple[int, ...],
    counts: Mapping[int, int],
) -> list[Patch]:
    """Variant s of the batch is sequence s: one head's columns, at all of the positions."""
    return [
        Patch(
            point=point,
            where=Where(positions=positions, sequences=(seq,)),
            source_PD=sources[point][list(positions)],
            columns=columns_of([head], counts[point.block or 0], sources[point].shape[1]),
        )
        for seq, (point, head) in enumerate(batch)
    ]


def _clean_run(
    session: Session, tokens_T: np.ndarray, points: list[HookPoint], answers: tuple[int, int]
) -> tuple[dict[HookPoint, np.ndarray], float]:
    """All rows of the points in the clean run, and its logit difference."""
    found: dict[HookPoint, np.ndarray] = {}

    def keep(point: HookPoint) -> Hook:
        def read(rows: Rows) -> None:
            shape = (len(tokens_T), *rows.values_ND.shape[1:])
            x_TD = found.setdefault(point, np.full(shape, np.nan, dtype=np.float32))
            x_TD[rows.pos_N] = rows.values_ND

        return Hook(point=point, read=read)

    session.clear()
    positions_T, seq_T = np.arange(len(tokens_T), dtype=np.int32), np.zeros(len(tokens_T), dtype=np.int32)
    # all: with only the last logits asked for, the last block computes only the last row
    logits_TV = session.decode(tokens_T, seq_T, positions_T, hooks=[keep(point) for point in points], logits="all")
    if logits_TV is None:
        raise LlamaError("the clean prompt gave no logits")
    if not np.isfinite(logits_TV[-1].max()):
        raise LlamaError("the logits after the clean prompt are not finite, so nothing can be measured")
    return found, _difference(logits_TV[-1], answers)


def _difference(logits_V: np.ndarray, answers: tuple[int, int]) -> float:
    """Logit of the answer minus that of the wrong one."""
    return float(logits_V[answers[0]]) - float(logits_V[answers[1]])
