"""The SAEs of train runs as rows of numbers. Nothing is computed anew: manifests, sae.json and evaluations are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.checkpoint import read_meta
from sae.errors import ConfigError
from sae.options import WITHOUT_K

from ..run import read_manifest, runs_of
from ..sweep.sweep import SWEEP

TRAIN_RUNS = Path("runs/train")
WHOLE_RUNS = Path("runs/run")  # of `ggscope run`, each with a train run in it


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One SAE. None: not known; held-out FVU and CE because it was not evaluated, CE recovered alone because zero
    ablation costs nothing there."""

    name: str
    variant: str
    kind: str  # sae, transcoder, crosscoder, cross_layer
    seed: int | None
    num_latents: int
    k: int | None  # None too where the variant has none
    lr: float | None
    tokens: int | None
    fvu: float | None  # over the last rows of the training, its metrics' last row, and so is l0
    l0: float | None
    dead_share: float | None
    tokens_per_s: float | None  # of the whole training
    held_out_fvu: float | None
    held_out_l0: float | None
    ce_recovered: float | None
    delta_ce_nats: float | None
    measured_on: str  # the held-out rows: "" where it was not evaluated, the same where model, text, seed and rows are
    path: str
    hook: str  # of a transcoder or crosscoder all its hook points
    rows_sha256: str  # of the store, or of the corpus of a stream


def collect(places: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The SAEs of all finished train runs in these places, and the names of runs that are not finished.

    Without places: those of `ggscope train` and of `ggscope run` under the working directory. A place that is an evaluate
    run, or a folder of them, is none of SAEs: its numbers count beside those of the evaluations under the working directory,
    and before them.

    Raises:
        ConfigError: a place that holds no train run.
    """
    of_place = {place: list(evaluate_runs(Path(place))) for place in places}
    evaluations = evaluations_by_sae([manifest for manifests in of_place.values() for manifest in manifests])
    # a folder of both, like `runs` of a sweep's evaluations, gives both
    places = [place for place in places if not of_place[place] or next(train_runs(Path(place)), None) is not None]
    rows, unfinished, seen = [], [], set()
    for runs in map(runs_in, places) if places else [all_runs()]:
        for run in runs:
            if run.resolve() in seen:
                continue
            seen.add(run.resolve())
            manifest = read_manifest(run)
            if manifest is None or manifest["status"] != "finished":
                unfinished.append(name_of(run))
            else:
                rows += rows_of(run, manifest, evaluations)
    return rows, unfinished


def all_runs() -> list[Path]:
    """The train runs under the working directory. ConfigError where there is none."""
    runs = [*train_runs(TRAIN_RUNS), *train_runs(WHOLE_RUNS)]
    if not runs:
        raise ConfigError(f"expected train runs in {TRAIN_RUNS} or {WHOLE_RUNS}, found none; run `ggscope train`")
    return runs


def runs_in(place: str) -> list[Path]:
    """The train runs of a place. ConfigError where there is none."""
    runs = list(train_runs(Path(place)))
    if not runs:
        raise ConfigError(f"{place}: expected a train run, a sweep of them or a folder of them; run `ggscope train`")
    return runs


def evaluate_runs(place: Path) -> Iterator[dict[str, Any]]:
    """The manifests of the evaluate runs of a place: its own, or those of a folder, newest first."""
    for run in [place, *(sorted(place.iterdir(), reverse=True) if place.is_dir() else [])]:
        manifest = read_manifest(run) or {}
        if manifest.get("command") == "evaluate":
            yield manifest


def train_runs(place: Path) -> Iterator[Path]:
    """The train runs of a place: itself, that of a whole run, the points of a sweep, or all of these in a folder."""
    if (found := train_run(place)) is not None:
        yield found
    elif (place / SWEEP).is_file():
        yield from sorted(TRAIN_RUNS.glob(f"{place.resolve().name}-*"))
    else:
        for child in sorted(place.iterdir()) if place.is_dir() else []:
            if (found := train_run(child)) is not None:
                yield found
            elif (child / SWEEP).is_file():
                yield from train_runs(child)


def train_run(folder: Path) -> Path | None:
    """The folder, where it is a train run; that of the training in it, where it is a whole run."""
    command = (read_manifest(folder) or {}).get("command")
    if command == "run" and read_manifest(folder / "train") is not None:
        return folder / "train"
    return folder if command == "train" else None


def name_of(run: Path) -> str:
    """The folder's name, and before it that of the whole run it lies in."""
    inside = (read_manifest(run.parent) or {}).get("command") == "run"
    return f"{run.parent.name}/{run.name}" if inside else run.name


def rows_of(run: Path, manifest: dict[str, Any], evaluations: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """A row for each SAE of a run."""
    metrics = manifest["metrics"]
    for name, numbers in metrics.get("saes", {"": metrics}).items():
        path = Path(manifest["outputs"][f"sae:{name}" if name else "sae"])
        meta = read_meta(path)
        config = meta["training"].get("config", {})
        training, variant = meta["training"], config.get("variant", meta["variant"])
        evaluation = evaluations.get(numbers.get("sae_id", ""), {})
        dead = numbers.get("dead")
        yield Row(
            name=f"{name_of(run)}/{name}" if name else name_of(run),
            variant=variant,
            kind=meta_kind(meta),
            seed=config.get("seed"),
            num_latents=meta["num_latents"],
            k=None if variant in WITHOUT_K else meta["k"],
            lr=config.get("lr"),
            tokens=numbers.get("tokens"),
            fvu=numbers.get("fvu"),
            l0=numbers.get("l0"),
            dead_share=None if dead is None else dead / meta["num_latents"],
            tokens_per_s=numbers.get("tokens_per_s"),
            held_out_fvu=evaluation.get("fvu"),
            held_out_l0=evaluation.get("l0"),
            ce_recovered=evaluation.get("ce_recovered"),
            delta_ce_nats=evaluation.get("delta_ce_nats"),
            measured_on=evaluation.get("measured_on", ""),
            path=str(path),
            hook=" ".join(name for name, _ in meta.get("ports", ())) or meta["hook"],
            rows_sha256=training.get("store_sha256") or training.get("corpus_hash", ""),
        )


def evaluations_by_sae(named: Sequence[dict[str, Any]] = ()) -> dict[str, dict[str, Any]]:
    """sae_id to the numbers of the newest finished evaluation of that SAE; the manifests `named` before all others."""
    found: dict[str, dict[str, Any]] = {}
    for manifest in (*named, *(manifest for _, manifest in runs_of("evaluate"))):
        sae_id = manifest.get("metrics", {}).get("sae_id")
        if manifest.get("status") == "finished" and sae_id and sae_id not in found:
            found[sae_id] = manifest["metrics"] | {"measured_on": rows_measured(manifest)}
    return found


def rows_measured(manifest: dict[str, Any]) -> str:
    """What the held-out rows of an evaluation are, in 16 hex digits: of the same rows the same."""
    config, metrics = manifest.get("config", {}), manifest["metrics"]
    facts = [
        manifest.get("inputs", {}).get("model", {}).get("sha256"), config.get("corpus"), config.get("evaluate", {}).get("seed"),
        metrics.get("rows"), metrics.get("splice_rows"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def meta_kind(meta: dict[str, Any]) -> str:
    """What an SAE's `sae.json` is of, by the hook points it names."""
    if not meta.get("hook_out"):
        return "crosscoder" if meta.get("ports") else "sae"
    return "transcoder" if len(meta.get("ports", ())) in (0, 2) else "cross_layer"


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each hook point and store, whose FVU are shares of one variance; other FVU do not compare.

    By name: the hook point, and the store's hash where a hook point has rows of several.
    """
    stores: dict[str, set[str]] = {}
    for row in rows:
        stores.setdefault(row.hook, set()).add(row.rows_sha256)
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.hook, row.rows_sha256)):  # stable
        name = row.hook if len(stores[row.hook]) == 1 else f"{row.hook}, store {row.rows_sha256[:12]}"
        found.setdefault(name, []).append(row)
    return found


def rows_of_group(rows: Sequence[Row]) -> set[str]:
    """`measured_on` of those that were evaluated."""
    return {row.measured_on for row in rows} - {""}


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is at or below in both numbers and below in one, by the first number."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best
