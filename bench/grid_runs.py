"""What `bench.grid` runs, each once: the store, the rows of the peers, a training, an evaluation. Kept in one folder.

Our side is `ggscope train`. The peers train on the very batches it reads (grid_peers.py); their files come in through
`ggscope convert convert.source=`. `ggscope evaluate` measures every SAE alike. What a folder holds is not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import ROOT, THREAD_SETTINGS, TRAIN_PEER_PYTHON, BenchError, Worker
from bench.train_cases import Say
from pipeline.store.reader import ActivationStore

HOOK = "blocks.3.hook_resid_post"
OURS = "ours"
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
    warmup_share: float = 0.1
    decay_share: float = 0.35  # of every side but sparsify, whose own schedule falls from the end of the warm-up on
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

    def folder(self, base: Path) -> Path:
        text = json.dumps(asdict(self), sort_keys=True)
        return base / f"grid-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


class Runs:
    """The folder of one grid. `first_width`: the number of latents at which the learning rates of a k are chosen."""

    def __init__(self, settings: Settings, folder: Path, first_width: int, *, threads: int, say: Say) -> None:
        self.settings, self.folder, self.first_width, self.threads, self.say = (
            settings,
            folder,
            first_width,
            threads,
            say,
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", asdict(settings))

    def quality(self, side: str, point: Point) -> dict[str, Any]:
        """FVU, L0, dead share, CE recovered and delta CE of a side's SAE on held-out text; with `lr` and `seconds`."""
        return self._measured(side, point, self.rate(side, point)["best"])

    def version(self, side: str) -> str:
        """The name of a side in the table."""
        if side == OURS:
            return OURS
        found = self._once(f"{side}/version.json", lambda: self._ask(side, "version", library=side))
        return f"{side}-{found['version']}"

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

    def rate(self, side: str, point: Point) -> dict[str, Any]:
        """`{"best": lr, "fvu": {lr: FVU on held-out text}}` of whole trainings at the first width, for every width."""
        at = replace(point, num_latents=self.first_width)
        fvu = {lr: self._measured(side, at, lr)["fvu"] for lr in self.settings.rates}
        return {"best": min(fvu, key=lambda lr: fvu[lr]), "fvu": fvu}

    def _measured(self, side: str, point: Point, lr: float) -> dict[str, Any]:
        return self._once(f"{side}/{point.name}/lr{lr:g}/quality.json", lambda: self._evaluated(side, point, lr))

    def _train(self, side: str, point: Point, lr: float, folder: Path) -> dict[str, Any]:
        self.say(f"{side}: {point.name} at lr {lr:g}")
        if side != OURS:
            (folder / "sae").mkdir(parents=True, exist_ok=True)
            return {"lr": lr, "seconds": self._peer(side, point, lr=lr, save=str(folder / "sae"))["seconds"]}
        manifest = self._ours(point, lr, folder / "train")
        return {"lr": lr, "seconds": self.settings.tokens / manifest["metrics"]["tokens_per_s"]}

    def _ours(self, point: Point, lr: float, run_dir: Path) -> dict[str, Any]:
        s = self.settings
        return self._cli(
            "train", f"store.path={self.store()}", f"sae.num_latents={point.num_latents}", f"sae.k={point.k}",
            f"sae.variant={point.variant}", f"trainer.tokens={s.tokens}", f"trainer.batch_tokens={s.batch}",
            f"trainer.warmup_steps={s.warmup_steps}", f"trainer.decay_share={s.decay_share}", f"trainer.seed={s.seed}",
            f"trainer.dead_after_tokens={s.dead_after_tokens}", f"trainer.n_threads={self.threads}",
            f"trainer.lr={lr}", run_dir=run_dir,
        )  # fmt: skip

    def _peer(self, library: str, point: Point, **request: Any) -> dict[str, Any]:
        rows, statistics = self.rows()
        width = int(np.load(rows, mmap_mode="r").shape[1])
        options: dict[str, Any] = {"auxk_alpha": AUXK_ALPHA} if library == "sparsify" else {"kind": point.variant}
        if point.variant == "batchtopk" and library == "dictionary_learning":
            options["threshold"] = THRESHOLD
        shape = {"d_in": width, "num_latents": point.num_latents, "k": point.k, "batch": self.settings.batch}
        s = self.settings
        return self._ask(
            library, "train", library=library, options=options, rows=str(rows), statistics=statistics, shape=shape,
            steps=s.steps, warmup_steps=s.warmup_steps, decay_steps=int(s.steps * s.decay_share),
            dead_after_tokens=s.dead_after_tokens, seed=s.seed, threads=self.threads, **request,
        )  # fmt: skip

    def _ask(self, library: str, op: str, /, **request: Any) -> dict[str, Any]:
        command = [str(TRAIN_PEER_PYTHON), "-P", str(ROOT / "bench" / "grid_peers.py"), library]
        with Worker(command, threads=self.threads) as worker:
            return worker.ask(op, **request)

    def _evaluated(self, side: str, point: Point, lr: float) -> dict[str, Any]:
        folder = self.folder / side / point.name / f"lr{lr:g}"
        name = str((folder / "train.json").relative_to(self.folder))
        trained = self._once(name, lambda: self._train(side, point, lr, folder))
        sae = folder / "train" / "sae"
        if side != OURS:
            sae = folder / "sae.gguf"
            self._cli(
                "convert", f"convert.source={folder / 'sae'}", f"convert.hook={HOOK}", f"convert.out={sae}",
                "convert.encoder_type=F32", "convert.decoder_type=F32", run_dir=folder / "convert",
            )  # fmt: skip
        self.say(f"{side}: {point.name} at lr {lr:g}: evaluating")
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
