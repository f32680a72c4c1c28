"""Activation patching: which block and position carry the answer from a clean prompt to a corrupted one.

Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (causal tracing); Wang et al. 2022.

Shape letters: L blocks, P positions, T prompt tokens, D width, S variants decoded side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.errors import ConfigError, LlamaError

from ..interventions.base import Sequences, Where, edit_hooks, edits_key
from ..interventions.patch import Patch
from ..llama.hooks import HookPoint
from ..llama.model import Model
from ..llama.session import Hook, Rows, Session


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchResult:
    """grid_LP[l, p] = (patched - corrupted) / (clean - corrupted), each a logit difference answer - wrong after the
    last prompt token, with the clean run's row of `site` at block l and position p put into the corrupted run.

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "site": self.site,
            "blocks": list(self.blocks),
            "positions": list(self.positions),
            "grid": self.grid_LP.tolist(),
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
    side_by_side: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PatchResult:
    """Patches every block and position of `site` (or those named) from the clean into the corrupted run.

    `side_by_side` variants are decoded in one batch, each its own sequence with its own edit, beside the corrupted
    prompt as it is; 0 takes as many as the session's sequences, batch and context hold. Raises ConfigError for prompts of unequal token counts, answers that
    are not one token, prompts whose logit differences do not differ, HookError for a site the model does not have.
    """
    tokens = [prompt_tokens(model, text) for text in (clean, corrupted)]
    _check_prompts(session, model, *tokens)
    answers = single_token(model, answer, "answer"), single_token(model, wrong, "wrong")
    count = len(tokens[0])
    blocks = tuple(blocks) if blocks is not None else tuple(range(model.id.n_layer))
    positions = tuple(positions) if positions is not None else tuple(range(count))
    if any(not 0 <= position < count for position in positions):
        raise ConfigError(f"positions should be 0..{count - 1} of the prompt's tokens, got {list(positions)}")
    points = _points(site, blocks)
    sources, clean_difference = _clean_run(session, tokens[0], points, answers)
    corrupted_difference = float(_differences(session, tokens[1], 1, [], answers)[0])
    scale = clean_difference - corrupted_difference
    if abs(scale) < 1e-6 * max(1.0, abs(clean_difference)):
        raise ConfigError(
            f"the clean and the corrupted prompt give the same logit difference ({clean_difference:.4f}); "
            "choose prompts that call for different answers"
        )
    variants = [(point, position) for point in points for position in positions]
    width, beside = _width(session, count, side_by_side)
    moved: list[float] = []
    for start in range(0, len(variants), width):
        batch = variants[start : start + width]
        found_S = _differences(session, tokens[1], len(batch) + beside, _patches(batch, sources), answers)
        # products of more rows round otherwise: what nothing was patched into is in the same batch
        moved += (found_S[: len(batch)] - (found_S[-1] if beside else corrupted_difference)).tolist()
        if progress is not None:
            progress(len(moved), len(variants))
    session.clear()
    grid_LP = np.array(moved).reshape(len(blocks), len(positions)) / scale
    return PatchResult(
        site=site,
        blocks=blocks,
        positions=positions,
        grid_LP=grid_LP,
        clean_difference=clean_difference,
        corrupted_difference=corrupted_difference,
        clean_tokens=tokens[0],
        corrupted_tokens=tokens[1],
        answer=answers[0],
        wrong=answers[1],
    )


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
    if len(clean) > min(session.n_ctx_seq, session.n_batch):
        held = min(session.n_ctx_seq, session.n_batch)
        raise ConfigError(
            f"the prompts have {len(clean)} tokens, one batch of the context holds {held}; raise model.n_ctx"
        )


def _width(session: Session, count: int, side_by_side: int) -> tuple[int, int]:
    """Variants of a batch, and whether (0, 1) the unpatched prompt is decoded beside them: not where one prompt fits."""
    cells = session.n_ctx // count if session.kv_unified else session.n_seq_max
    most = max(1, min(session.n_seq_max, session.n_batch // count, cells))
    beside = int(most > 1)
    if side_by_side > most - beside:
        raise ConfigError(
            f"side_by_side: this session holds at most {most} prompts of {count} tokens, {beside} of them unpatched, got "
            f"{side_by_side}"
        )
    return side_by_side or most - beside, beside


def _patches(batch: list[tuple[HookPoint, int]], sources: dict[HookPoint, np.ndarray]) -> list[Patch]:
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
    return found, float(logits_TV[-1, answers[0]]) - float(logits_TV[-1, answers[1]])


def _differences(
    session: Session, tokens_T: np.ndarray, copies: int, patches: list[Patch], answers: tuple[int, int]
) -> np.ndarray:
    """Logit difference answer - wrong after the last token of each of `copies` patched runs, float64 (S,)."""
    sequences = Sequences()
    for seq in range(copies):
        sequences.start(seq, [False] * len(tokens_T))
    session.clear()
    logits_SV = session.decode(
        np.tile(tokens_T, copies),
        np.repeat(np.arange(copies, dtype=np.int32), len(tokens_T)),
        np.tile(np.arange(len(tokens_T), dtype=np.int32), copies),
        hooks=edit_hooks(patches, sequences),
        logits="last",
        edits_key=edits_key(patches, sequences),
    )
    if logits_SV is None:
        raise LlamaError("a patched prompt gave no logits")
    return logits_SV[:, answers[0]].astype(np.float64) - logits_SV[:, answers[1]]
