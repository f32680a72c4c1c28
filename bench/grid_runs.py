"""What `bench.grid` runs, each once: the store, the rows of the peers, a training, an evaluation. Kept in one folder.

Our side is `ggscope train`. The peers train on the very batches it reads (grid_peers.py); their files come in through
`ggscope convert convert.source=`. `ggscope evaluate` measures every SAE alike. What a folder holds is not made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import ROOT, THREAD_SETTINGS, TRAIN_PEER_PYTHON, BenchError, Worker
from bench.train_cases import Say
from pipeline.store.reader import ActivationStore

HOOK = "blocks.3.hook_resid_post"
OURS = "ours"
MAX_WARMUP_SHARE = 0.25  # of the steps of a search, as in pipeline/training/lr_search.py
AUXK_ALPHA = 1 / 32  # sparsify has AuxK off by default; the other libraries' own weights stand
THRESHOLD = (0.5, 0.98)  # dictionary_learning's BatchTopK: its average starts at step 1000, later than a run here ends
MEASURED = ("fvu", "l0", "dead_share", "ce_recovered", "delta_ce_nats", "rows", "splice_rows")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One place of the grid."""

    num_latents: int
    k: int
    variant: str = "topk"

    @property
    def name(self) -> str:
        return f"k{self.k}_n{self.num_latents}" + ("" if self.variant == "topk" else f"_{self.variant}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What decides the results; the folder is named after it."""

    store_rows: int = 500_000
    tokens: int = 409_600
    batch: int = 1024
    rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2)
    search_share: float = 0.2
    warmup_share: float = 0.1
    decay_share: float = 0.2  # sparsify's schedule falls from the end of the warm-up on
    dead_after_tokens: int = 100_000
    evaluate_tokens: int = 32_768
    splice_tokens: int = 12_288
    seed: int = 0

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.batch)

    @property
    def warmup_steps(self) -> int:
        return int(self.steps * self.warmup_share)

    @property
    def search_steps(self) -> int:
        return math.ceil(self.steps * self.search_share)

    def folder(self, base: Path) -> Path:
        text = json.dumps(asdict(self), sort_keys=True)
        return base / f"grid-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


class Runs:
    """The folder of one grid. `search_at`: where each side's learning rate is chosen, for all its points."""

    def __init__(self, settings: Settings, folder: Path, search_at: Point, *, threads: int, say: Say) -> None:
        self.settings, self.folder, self.search_at, self.threads, self.say = settings, folder, search_at, threads, say
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", asdict(settings))

    def quality(self, side: str, point: Point) -> dict[str, Any]:
        """FVU, L0, dead share, CE recovered and delta CE of a side's SAE on held-out text; with `lr` and `seconds`."""
        return self._once(f"{side}/{point.name}/quality.json", lambda: self._evaluated(side, point))

    def version(self, side: str) -> str:
        """The name of a side in the table."""
        if side == OURS:
            return OURS
        return self._once(f"{side}/version.json", lambda: self._ask(side, "version", library=side))["version"]

    def store(self) -> Path:
        """The rows of the training split at the hook point, as the demo captures them."""
        target = self.folder / "extract"
        if not (target / "activations.zarr").is_dir() or not _finished(target):
            self._cli("extract", "experiment=demo_cpu", f"corpus.max_tokens={self.settings.store_rows}", run_dir=target)
        return target / "activations.zarr"

    def rows(self) -> tuple[Path, dict[str, float]]:
        """The batches of a training in a file, in its order, and statistics of the store."""
        path, settings = self.folder / "rows.npy", self.settings
        stats = ActivationStore(self.store()).stats(HOOK)
        square = stats.variance + float((stats.mean_D.astype(np.float64) ** 2).sum())
        numbers = {"mean_norm": stats.mean_norm, "mean_square": square, "variance": stats.variance}
        if not path.exists():
            self.say("writing the batches for the peers")
            source = ActivationStore(self.store()).batches(HOOK, batch_rows=settings.batch, seed=settings.seed)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            shape = (settings.steps * settings.batch, source.d_in)
            x_ND = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            for step in range(settings.steps):
                x_ND[step * settings.batch : (step + 1) * settings.batch] = source.next()
            del x_ND
            np.save(self.folder / "mean.npy", stats.mean_D.astype(np.float32))
            partial.replace(path)
        return path, numbers

    def rate(self, side: str) -> dict[str, Any]:
        """`{"best": lr, "fvu": {lr: FVU over the last quarter}}` of the rates, each on the same share of the tokens."""
        if side == OURS:  # its search ends in the training of the point it was made at
            self._trained(OURS, self.search_at)
            return json.loads((self.folder / OURS / self.search_at.name / "train" / "lr_search.json").read_text())[""]
        return self._once(f"{side}/rate.json", lambda: self._searched(side))

    def _searched(self, library: str) -> dict[str, Any]:
        settings, fvu = self.settings, dict[float, float]()
        steps = settings.search_steps
        warmup = min(settings.warmup_steps, int(steps * MAX_WARMUP_SHARE))
        for lr in settings.rates:
            self.say(f"{library}: learning rate {lr:g}")
            found = self._peer(library, self.search_at, lr=lr, steps=steps, warmup_steps=warmup)["fvu"]
            if math.isfinite(found):
                fvu[lr] = found
        return {"best": min(fvu, key=lambda lr: fvu[lr]), "fvu": fvu}

    def _trained(self, side: str, point: Point) -> dict[str, Any]:
        return self._once(f"{side}/{point.name}/train.json", lambda: self._train(side, point))

    def _train(self, side: str, point: Point) -> dict[str, Any]:
        folder = self.folder / side / point.name
        folder.mkdir(parents=True, exist_ok=True)
        searched = side == OURS and point == self.search_at
        lr = 0.0 if searched else self.rate(side)["best"]
        self.say(f"{side}: {point.name}" + (f" at lr {lr:g}" if lr else ", after a search for its learning rate"))
        if side != OURS:
            (folder / "sae").mkdir(exist_ok=True)
            found = self._peer(
                side, point, lr=lr, steps=self.settings.steps, warmup_steps=self.settings.warmup_steps,
                save=str(folder / "sae"),
            )  # fmt: skip
            return {"lr": lr, "seconds": found["seconds"]}
        manifest = self._ours(point, folder / "train", lr)
        lr = lr or manifest["metrics"]["lr_search"]["best"]
        return {"lr": lr, "seconds": self.settings.tokens / manifest["metrics"]["tokens_per_s"]}

    def _ours(self, point: Point, run_dir: Path, lr: float) -> dict[str, Any]:
        s = self.settings
        rates = [f"trainer.lr={lr}"] if lr else [
            f"trainer.lr_search=[{','.join(map(str, s.rates))}]", f"trainer.lr_search_share={s.search_share}",
        ]  # fmt: skip
        return self._cli(
            "train", f"store.path={self.store()}", f"sae.num_latents={point.num_latents}", f"sae.k={point.k}",
            f"sae.variant={point.variant}", f"trainer.tokens={s.tokens}", f"trainer.batch_tokens={s.batch}",
            f"trainer.warmup_steps={s.warmup_steps}", f"trainer.decay_share={s.decay_share}", f"trainer.seed={s.seed}",
            f"trainer.dead_after_tokens={s.dead_after_tokens}", f"trainer.n_threads={self.threads}", *rates,
            run_dir=run_dir,
        )  # fmt: skip

    def _peer(self, library: str, point: Point, **request: Any) -> dict[str, Any]:
        rows, statistics = self.rows()
        width = int(np.load(rows, mmap_mode="r").shape[1])
        options: dict[str, Any] = {"auxk_alpha": AUXK_ALPHA} if library == "sparsify" else {"kind": point.variant}
        if point.variant == "batchtopk" and library == "dictionary_learning":
            options["threshold"] = THRESHOLD
        shape = {"d_in": width, "num_latents": point.num_latents, "k": point.k, "batch": self.settings.batch}
        decay = int(request["steps"] * self.settings.decay_share)
        return self._ask(
            library, "train", library=library, options=options, rows=str(rows), statistics=statistics, shape=shape,
            decay_steps=decay, dead_after_tokens=self.settings.dead_after_tokens, seed=self.settings.seed,
            threads=self.threads, **request,
        )  # fmt: skip

    def _ask(self, library: str, op: str, /, **request: Any) -> dict[str, Any]:
        command = [str(TRAIN_PEER_PYTHON), "-P", str(ROOT / "bench" / "grid_peers.py"), library]
        with Worker(command, threads=self.threads) as worker:
            return worker.ask(op, **request)

    def _evaluated(self, side: str, point: Point) -> dict[str, Any]:
        trained = self._trained(side, point)
        folder = self.folder / side / point.name
        sae = folder / "train" / "sae"
        if side != OURS:
            sae = folder / "sae.gguf"
            self._cli(
                "convert", f"convert.source={folder / 'sae'}", f"convert.hook={HOOK}", f"convert.out={sae}",
                "convert.encoder_type=F32", "convert.decoder_type=F32", run_dir=folder / "convert",
            )  # fmt: skip
        self.say(f"{side}: {point.name}: evaluating")
        self._cli(
            "evaluate", f"sae.path={sae}", "evaluate.baselines=false", "evaluate.structure_latents=16",
            f"evaluate.tokens={self.settings.evaluate_tokens}", f"evaluate.splice_tokens={self.settings.splice_tokens}",
            run_dir=folder / "evaluate",
        )  # fmt: skip
        found = json.loads((folder / "evaluate" / "evaluation.json").read_text())
        return {key: found[key] for key in MEASURED} | trained

    def _cli(self, command: str, *overrides: str, run_dir: Path) -> dict[str, Any]:
        """One command of ggscope in a process of its own; its manifest. BenchError with its last line if it fails."""
        environment = dict(os.environ) | dict.fromkeys(THREAD_SETTINGS, str(self.threads)) | {"PYTHONPATH": str(ROOT)}
        threads = () if command == "train" else (f"model.n_threads={self.threads}",)
        if run_dir.exists():  # half a run of an interrupted grid
            run_dir.rename(run_dir.with_name(f"{run_dir.name}.left-{os.getpid()}"))
        ran = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", command, *overrides, *threads, f"run_dir={run_dir}"],
            env=environment, cwd=self.folder, text=True, capture_output=True, check=False,
        )  # fmt: skip
        if ran.returncode:
            words = (ran.stderr.strip() or ran.stdout.strip()).splitlines()
            raise BenchError(f"{command} ended with {ran.returncode}: {words[-1] if words else 'no words'}")
        return json.loads((run_dir / "manifest.json").read_text())

    def _once(self, name: str, make: Any) -> dict[str, Any]:
        path = self.folder / name
        if not path.exists():
            write_json(path, make())
        return json.loads(path.read_text())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def _finished(run_dir: Path) -> bool:
    manifest = run_dir / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_text())["status"] == "finished"
