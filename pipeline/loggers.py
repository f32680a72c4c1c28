"""Where training metrics go: always a JSONL file, and optionally TensorBoard or Weights & Biases."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, final

from sae.errors import ConfigError

from .config import LoggerConfig

STEP = "step"


class MetricsLogger(ABC):
    @abstractmethod
    def log(self, row: dict[str, Any]) -> None:
        """One row of numbers; `row["step"]` is the optimizer step."""

    @abstractmethod
    def close(self) -> None: ...


@final
class JsonlLogger(MetricsLogger):
    """One JSON object a line, flushed at once. Resuming at a step drops the rows past it."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = []
        if resume_step and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the line a kill cut short
                if row.get(STEP, 0) <= resume_step:
                    kept.append(line)
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115  open for the whole run
        for line in kept:
            self.file.write(line + "\n")

    def log(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


@final
class TensorBoardLogger(MetricsLogger):
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "logger.tensorboard=true needs the package: pip install 'ggscope[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(str(folder))

    def log(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != STEP and isinstance(value, int | float):
                self.writer.add_scalar(key, value, row[STEP])

    def close(self) -> None:
        self.writer.close()


@final
class WandbLogger(MetricsLogger):
    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError("logger.wandb=true needs the package: pip install 'ggscope[wandb]'") from error
        self.run = wandb.init(project=project, dir=str(folder), config=config)

    def log(self, row: dict[str, Any]) -> None:
        self.run.log({k: v for k, v in row.items() if k != STEP}, step=row[STEP])

    def close(self) -> None:
        self.run.finish()


def open_loggers(config: LoggerConfig, folder: Path, settings: dict[str, Any], resume_step: int) -> list[MetricsLogger]:
    optional: list[MetricsLogger] = []  # first: a missing package is found before a file is opened
    if config.tensorboard:
        optional.append(TensorBoardLogger(folder / "tensorboard"))
    if config.wandb:
        optional.append(WandbLogger(folder, config.wandb_project, settings))
    return [JsonlLogger(folder / "metrics.jsonl", resume_step), *optional]
