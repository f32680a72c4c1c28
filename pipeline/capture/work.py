"""The capture of a store as work that any process can do: by paths and settings, shard by shard, idempotent."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae.errors import StoreError

from ..config import ExtractConfig, ModelConfig, StoreConfig
from ..corpus.plan import Plan, make_plan
from ..corpus.spool import open_table
from ..llama.model import Model
from ..llama.truncated import blocks_to_load
from ..store.schema import StoreMeta
from ..store.writer import ShardWriter
from .capturer import Capturer
from .shards import capture_shards

if TYPE_CHECKING:
    from ..executors.base import Placement


@dataclass(frozen=True, kw_only=True)
class CaptureWork:
    """Capture a store that was made, from a corpus that was spooled. What it opens stays open for the next call."""

    model_path: str
    spool: str  # folder of the tokenised corpus
    store: str  # folder or URL
    model: ModelConfig
    extract: ExtractConfig
    layout: StoreConfig  # with the hooks what decides the plan
    hooks: tuple[tuple[str, int], ...]  # hook point, width

    def missing(self) -> list[int]:
        """Shards without a commit, ascending."""
        return ShardWriter(self.store).missing()

    def rows(self, shards: Sequence[int]) -> int:
        """Rows of these shards together."""
        meta = _meta(self.store)
        return sum(stop - start for start, stop in map(meta.shard_range, shards))

    def capture(self, shards: Sequence[int], *, place: Placement, done: Callable[[int], None]) -> None:
        """Capture and commit these shards, leaving out those somebody committed; see `capture_shards`."""
        writer = ShardWriter(self.store)
        wanted = sorted(set(shards) & set(writer.missing()))
        if wanted:
            capture_shards(_opened(self, place.n_threads or self.model.n_threads), writer, wanted, done)


def blocks_needed(path: Path, points: Sequence[str], config: ExtractConfig) -> int:
    """What a capture of these points loads, as `Model` takes it: 0 is all blocks."""
    return blocks_to_load(path, points) if config.load == "auto" else 0


@functools.lru_cache(maxsize=1)
def _meta(store: str) -> StoreMeta:
    """What does not change while a store is written, asked of object storage once."""
    return ShardWriter(store).meta


_kept: tuple[CaptureWork, int, Capturer] | None = None


def _opened(work: CaptureWork, n_threads: int) -> Capturer:
    """The capturer of this work in this process: loading a model for every few shards would cost more than they do."""
    global _kept
    if _kept is not None:
        if _kept[:2] == (work, n_threads):
            return _kept[2]
        _kept[2].close()
        _kept[2].model.close()
        _kept = None
    table = open_table(Path(work.spool))
    plan = make_plan(table, hooks=dict(work.hooks), extract=work.extract, store=work.layout)
    blocks = blocks_needed(Path(work.model_path), list(plan.hooks), work.extract)
    model = Model(work.model_path, n_gpu_layers=work.model.n_gpu_layers, use_mmap=work.model.mmap, blocks=blocks)
    try:
        _refuse_other(work, plan, model)
    except BaseException:
        model.close()
        raise
    settings = dataclasses.replace(work.model, n_threads=n_threads)
    _kept = (work, n_threads, Capturer(model, table, plan, work.extract, settings))
    return _kept[2]


def _refuse_other(work: CaptureWork, plan: Plan, model: Model) -> None:
    """StoreError when the files a worker finds are not those the store was made for: paths may mean others here."""
    meta = _meta(work.store)
    checks = {
        f"corpus ({work.spool})": (plan.corpus_hash, meta.corpus_hash),
        "plan": (plan.config_hash, meta.config_hash),
        f"model ({work.model_path})": (model.id.sha256, meta.model["sha256"]),
    }
    wrong = [what for what, (found, expected) in checks.items() if found != expected]
    if wrong:
        raise StoreError(
            f"{work.store} was made with another {' and another '.join(wrong)} than this worker finds; "
            "give every worker the same files"
        )
