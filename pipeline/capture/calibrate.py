"""The first batches of a capture: number format and outlier threshold of every hook, and the speed to expect.

Letters: N rows, D width of a hook.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from sae.errors import LlamaError

from ..corpus.windows import FLAG_NOT_FINITE, FLAGS_ALL
from ..store.schema import FLOAT16_MAX, HookInfo
from .capturer import Batch, Capturer, exact_norms

FLOAT16_CALIBRATED_MAX = FLOAT16_MAX / 4  # dtype=auto keeps this much room above the calibration rows
SPEED_BATCHES = 2  # enough to tell minutes from hours where a store is resumed


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What a few batches spread over the corpus say; `hooks` is empty where only the speed was wanted."""

    hooks: tuple[HookInfo, ...]
    rows: int
    tokens_per_s: float


def calibrate(capturer: Capturer) -> Calibration:
    """Number format, outlier threshold and speed, from `calibration_tokens` in batches spread evenly over the corpus.

    float16 where max |x| < 16376, a quarter of its largest value, else bfloat16; a given dtype stands.
    Threshold: `outlier_factor` times the median norm of the rows without flags.
    LlamaError when a hook has no finite row at all: the model, not a document, is at fault.
    """
    plan, config = capturer.plan, capturer.config
    largest = dict.fromkeys(plan.hooks, 0.0)
    norms: dict[str, list[np.ndarray]] = {name: [] for name in plan.hooks}
    batches, rows, seconds = _timed(capturer, calibration_batches(capturer))
    for batch in batches:
        finite_N = batch.flags_N & FLAG_NOT_FINITE == 0
        counted_N = batch.flags_N & FLAGS_ALL == 0
        for name, x_ND in batch.acts.items():
            largest[name] = max(largest[name], float(np.abs(x_ND).max()))
            norms[name].append(exact_norms(x_ND[counted_N if counted_N.any() else finite_N]))
    infos = []
    for name, width in plan.hooks.items():
        norm_N = np.concatenate(norms[name])
        if not len(norm_N):
            raise LlamaError(
                f"the model gives values that are not finite at {', '.join(plan.hooks)} in all of the {rows} rows tried "
                f"(the first in {capturer.where(batches[0].start)}); check the model file"
            )
        infos.append(_hook_info(name, width, config.dtype, largest[name], norm_N, config.outlier_factor))
    return Calibration(hooks=tuple(infos), rows=rows, tokens_per_s=rows / seconds)


def measure_speed(capturer: Capturer) -> Calibration:
    """Only the speed, of a store whose formats are known."""
    _, rows, seconds = _timed(capturer, _spread(capturer, SPEED_BATCHES))
    return Calibration(hooks=(), rows=rows, tokens_per_s=rows / seconds)


def calibration_batches(capturer: Capturer) -> list[int]:
    """The batches a calibration looks at, about `calibration_tokens` rows."""
    return _spread(capturer, max(1, capturer.config.calibration_tokens // capturer.plan.max_batch_rows))


def _spread(capturer: Capturer, wanted: int) -> list[int]:
    """At most that many batches, evenly over the plan."""
    n_batches = capturer.plan.n_batches
    return np.unique(np.linspace(0, n_batches - 1, min(wanted, n_batches)).round().astype(int)).tolist()


def _timed(capturer: Capturer, chosen: list[int]) -> tuple[list[Batch], int, float]:
    """These batches, and the rows and seconds of those after the first, which also warms up."""
    batches, seconds = [], []
    for index in chosen:
        started = time.perf_counter()
        batches.append(capturer.batch(index))
        seconds.append(time.perf_counter() - started)
    warm = slice(1, None) if len(batches) > 1 else slice(None)
    return batches, sum(b.stop - b.start for b in batches[warm]), max(sum(seconds[warm]), 1e-9)


def _hook_info(name: str, width: int, dtype: str, largest: float, norm_N: np.ndarray, factor: float) -> HookInfo:
    if dtype == "auto":
        dtype = "float16" if largest < FLOAT16_CALIBRATED_MAX else "bfloat16"
    median = float(np.median(norm_N))
    # A hook that is zero on the median row has no scale to be an outlier of.
    threshold = factor * median if median > 0 else float(np.finfo(np.float64).max)
    return HookInfo(name=name, width=width, dtype=dtype, outlier_threshold=threshold)
