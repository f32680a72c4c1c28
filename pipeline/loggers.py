"""Where training metrics go: always a JSONL file, and optionally TensorBoard, Weights & Biases, MLflow or trackio.

The packages are imported where a logger is opened. A resumed run goes on in its own TensorBoard folder, W&B, MLflow or
trackio run; the rows between the last checkpoint and the kill come again there, while the JSONL file drops the first.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from sae.checkpoint import write_atomic
from sae.errors import ConfigError

from .config import LoggerConfig
from .run import flat

STEP = "step"


class MetricsLogger(ABC):
    @abstractmethod
    def log(self, row: dict[str, Any]) -> None:
        """One row of numbers; `row["step"]` is the optimizer step."""

    @abstractmethod
    def close(self) -> None: ...


@final
class JsonlLogger(MetricsLogger):
    """One JSON object a line, flushed at once. Resuming at a step drops the rows past it; a kill meanwhile, no other."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = b""
        if resume_step and path.exists():
            lines = path.read_bytes().splitlines()
            kept = b"".join(
                line + b"\n" for line in lines if (step := step_of(line)) is not None and step <= resume_step
            )
        write_atomic(path, lambda file: file.write(kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  open for the whole run

    def log(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None for one that a kill cut short, or that is none of ours."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get(STEP) if isinstance(row, dict) else None
    return step if type(step) is int else None


@final
class TensorBoardLogger(MetricsLogger):
    def __init__(self, place: Place) -> None:
        writer = imported("tensorboard", "torch.utils.tensorboard").SummaryWriter
        self.writer = writer(str(place.folder / "tensorboard" / place.name), purge_step=place.step + 1)

    def log(self, row: dict[str, Any]) -> None:
        for key, value in numbers(row).items():
            self.writer.add_scalar(key, value, row[STEP])

    def close(self) -> None:
        self.writer.close()


@final
class WandbLogger(MetricsLogger):
    def __init__(self, place: Place) -> None:
        self.run = imported("wandb").init(
            project=place.project, name=place.label, id=place.id, resume="allow", dir=str(place.folder),
            config=place.settings, reinit="create_new",
        )  # fmt: skip

    def log(self, row: dict[str, Any]) -> None:
        self.run.log(numbers(row), step=row[STEP])

    def close(self) -> None:
        self.run.finish()


@final
class MlflowLogger(MetricsLogger):
    """Through MLflow's client, which has no global state; its default tracking is a database in the run folder."""

    def __init__(self, place: Place, uri: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow = imported("mlflow")
        self.client = mlflow.MlflowClient(tracking_uri=uri or f"sqlite:///{place.folder / 'mlflow.db'}")
        self.entities = mlflow.entities
        experiment = self.client.get_experiment_by_name(place.project)
        where = None if uri else (place.folder / "mlflow").as_uri()
        found = experiment.experiment_id if experiment else self.client.create_experiment(place.project, where)
        mine = self.client.search_runs([found], f"tags.`ggscope.id` = '{place.id}'")
        run = mine[0] if mine else self.client.create_run(found, run_name=place.label, tags={"ggscope.id": place.id})
        self.run_id = run.info.run_id
        if not mine:
            parameters = [self.entities.Param(key, str(value)) for key, value in flat(place.settings).items()]
            self.client.log_batch(self.run_id, params=parameters)

    def log(self, row: dict[str, Any]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(key, value, now, row[STEP]) for key, value in numbers(row).items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


@final
class TrackioLogger(MetricsLogger):
    """Where trackio keeps its database is its own setting, TRACKIO_DIR."""

    def __init__(self, place: Place) -> None:
        self.run = imported("trackio").init(
            project=place.project, name=f"{place.label}-{place.id}", config=flat(place.settings), resume="allow",
            embed=False,
        )  # fmt: skip

    def log(self, row: dict[str, Any]) -> None:
        self.run.log(numbers(row), step=row[STEP])

    def close(self) -> None:
        self.run.finish()


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a logger is told of the run."""

    folder: Path  # the run folder
    name: str  # of the SAE, where there are several
    project: str
    settings: dict[str, Any]
    step: int  # rows up to here are logged already

    @property
    def label(self) -> str:
        """What a person sees the run as."""
        return f"{self.folder.name}-{self.name}" if self.name else self.folder.name

    @property
    def id(self) -> str:
        """The same for a run and its resumption."""
        return hashlib.sha256(f"{self.folder.resolve()}/{self.name}".encode()).hexdigest()[:16]


def imported(package: str, module: str = "") -> Any:
    """ConfigError, one line, where the package of a logger is missing."""
    try:
        return importlib.import_module(module or package)
    except ImportError as error:
        raise ConfigError(f"logger.{package}=true needs the package: pip install 'ggscope[{package}]'") from error


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != STEP and isinstance(value, int | float)}


def open_loggers(
    config: LoggerConfig, folder: Path, settings: dict[str, Any], resume_step: int, name: str = ""
) -> list[MetricsLogger]:
    """The loggers of one SAE: `folder` is the run's, `name` the SAE's in it ("" for a single one).

    Raises:
        ConfigError: a package that is not installed.
    """
    place = Place(folder=folder, name=name, project=config.project, settings=settings, step=resume_step)
    optional: list[MetricsLogger] = []  # first: a missing package is found before a file is opened
    if config.tensorboard:
        optional.append(TensorBoardLogger(place))
    if config.wandb:
        optional.append(WandbLogger(place))
    if config.mlflow:
        optional.append(MlflowLogger(place, config.mlflow_uri))
    if config.trackio:
        optional.append(TrackioLogger(place))
    own = folder / name
    own.mkdir(exist_ok=True)
    return [JsonlLogger(own / "metrics.jsonl", resume_step), *optional]
