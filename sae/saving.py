"""The checkpoints of SAEs that are trained together: each in a folder of its own, in the form of a run of one.

A step counts once every SAE has its checkpoint of it, so a kill between two files costs nothing but the newest step.
An SAE that diverged stays at its last good checkpoint; `diverged.json` beside it says at which step it was left.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import write_atomic
from .checkpoint_torch import checkpoint_path, checkpoint_steps, checkpoints, load_checkpoint, prune, save_checkpoint
from .errors import ConfigError, DiskError, FormatError
from .learner import Learner

BEST = "best.pt"
DIVERGED = "diverged.json"


class Saves:
    """Checkpoints of `learners` (by name) in `folder/name`; `folder` itself for the name "". Without `writes` another process does so."""

    def __init__(
        self, folder: Path, learners: Mapping[str, Learner], *, keep_last: int, save_best: bool, writes: bool = True
    ) -> None:
        self.folder, self.learners, self.writes = folder, learners, writes
        self.keep_last, self.save_best = keep_last, save_best

    def existing(self) -> list[Path]:
        """All there are."""
        return [path for name in self.learners for path in checkpoints(self.folder / name)]

    def newest(self, name: str) -> Path | None:
        """The newest checkpoint of one SAE."""
        found = checkpoints(self.folder / name)
        return found[-1] if found else None

    def save(self, step: int, data_state: dict[str, Any], *, scheduled: bool) -> Path:
        """Write the checkpoints, then delete old ones; a scheduled one may become the best.

        Raises:
            DivergedError: a parameter is not finite.
            DiskError: a file could not be written; the checkpoints that were there still are.
        """
        alive = {name: learner for name, learner in self.learners.items() if not learner.diverged}
        for learner in alive.values():
            learner.check_finite()
        written = self.folder
        for name, learner in alive.items():
            best = scheduled and learner.judge()
            tensors = learner.tensors()  # on all ranks: each may have only some of the latents
            if not self.writes:
                continue
            meta = json.dumps(learner.facts() | {"data_state": data_state})
            written = save_checkpoint(self.folder / name, step, tensors | {"meta": meta})
            if best and self.save_best:
                keep_as(written, written.with_name(BEST))
        for name in alive if self.writes else ():
            prune(self.folder / name, keep_last=self.keep_last, step=step)
        return written if len(self.learners) == 1 else self.folder

    def leave_out(self, name: str) -> None:
        """Note on disk that this SAE diverged."""
        learner = self.learners[name]
        if not self.writes:
            return
        text = json.dumps({"step": learner.step, "message": learner.diverged}).encode()
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / name / DIVERGED, lambda file: file.write(text))

    def restore(self, step: int) -> dict[str, Any]:
        """Put every SAE where it was at `step`; returns the state of the data there.

        Raises:
            ConfigError: checkpoints made with other settings.
            FormatError: damaged ones.
        """
        data_state: dict[str, Any] = {}
        for name, learner in self.learners.items():
            left = diverged_at(self.folder / name)
            if left is not None and left["step"] <= step:
                learner.step, learner.diverged = left["step"], left["message"]
                continue
            if self.writes:
                (self.folder / name / DIVERGED).unlink(missing_ok=True)
            path = checkpoint_path(self.folder / name, step)
            data_state = restored(learner, path)
            if (
                self.writes and self.save_best and learner.best and learner.best["step"] == step
            ):  # killed between the two files
                keep_as(path, path.with_name(BEST))
        return data_state

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints above `step`: the training that goes on from there comes to these steps anew."""
        for folder in (self.folder / name for name in self.learners if self.writes):
            for later in (s for s in checkpoint_steps(folder) if s > step):
                checkpoint_path(folder, later).unlink(missing_ok=True)


def keep_as(path: Path, copy: Path) -> None:
    """Give a file a second name that outlives the first: a link where the disk can, else a copy.

    Raises:
        DiskError: it could not be written.
    """
    partial = copy.with_name(copy.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)
        partial.replace(copy)
    except OSError as error:
        raise DiskError(f"could not write {copy}: {error.strerror or error}; free space there, then resume") from error


def restored(learner: Learner, path: Path, check: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Put the learner where the checkpoint was made; returns the state of the data there. `check` replaces its own
    `check_identity`.

    Raises:
        ConfigError: made with other settings.
        FormatError: damaged.
    """
    state = load_checkpoint(path)
    try:
        meta = json.loads(state["meta"])
        identity = meta["identity"]
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(f"{path} is incomplete ({error}); delete it to resume from the one before") from error
    try:
        (check or learner.check_identity)(identity)
    except ConfigError as error:
        raise ConfigError(
            f"{path} was made with other settings ({error}); resume with its own, or start a new run"
        ) from None
    try:
        learner.load(meta, state)
        return meta["data_state"]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"{path} does not fit ({error}); delete it to resume from the one before") from error


def diverged_at(folder: Path) -> dict[str, Any] | None:
    """The step at which an SAE was left out, and why; None for one that was not."""
    try:
        return json.loads((folder / DIVERGED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def common_step(folder: Path, names: Iterable[str], *, first: int = 0) -> int:
    """The newest step of which every SAE has a checkpoint (or was left out before it); 0 if there are no checkpoints.

    0 too where there are some of one SAE but no step after `first`, that of the first checkpoint: a kill in the midst
    of the first.

    Raises:
        ConfigError: there are checkpoints after `first`, but no step of which every SAE has one.
    """
    found = {name: set(checkpoint_steps(folder / name)) for name in names}
    left = {name: note["step"] for name in found if (note := diverged_at(folder / name)) is not None}
    every = set.union(*found.values())
    common = max((s for s in every if all(s in found[n] or s >= left.get(n, s + 1) for n in found)), default=0)
    if not common and max(every, default=0) > first:
        there = "; ".join(f"{name}: {', '.join(map(str, sorted(found[name]))) or 'none'}" for name in found)
        raise ConfigError(
            f"expected in {folder} a step of which every SAE has a checkpoint, got {there}; "
            "put the missing files back, or start a new run"
        )
    return common
