"""`resume=RUN_DIR|latest`: which run goes on, and with which settings: its own, where none are typed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from sae.errors import ConfigError, FormatError

from .config import Config
from .run import MANIFEST, flat, nothing_done, read_manifest, runs_of
from .store.checks import of_kind

NOT_RESULT_RELEVANT = {
    "model.n_threads", "model.mmap", "extract.load", "trainer.n_threads", "trainer.checkpoint_steps", "trainer.keep_last", "trainer.save_best",
    "trainer.log_steps", "trainer.queue_batches", "store.verify",
    "extract.plan_only", "executor",
}  # fmt: skip

TAKEN_AS = {
    "store.path": "store",
    "sae.path": "sae",
}  # settings that stand for the newest where they are empty: as which input
FOR_ONE_CALL = ("extract.plan_only",)  # a planned run goes on to capture


def run_to_resume(command: str, resume: str) -> tuple[Path, dict[str, Any]]:
    """The folder that `resume=` names, and its manifest, whose settings and inputs are what they should be.

    Raises:
        ConfigError: there is no such run.
        FormatError: its manifest is damaged.
    """
    if resume == "latest":
        unfinished = [
            (folder, manifest)
            for folder, manifest in runs_of(command)
            if manifest.get("status") != "finished"
            and not (manifest.get("status") == "failed" and (manifest.get("refused") or nothing_done(folder)))
        ]
        if not unfinished:
            raise ConfigError(f"resume=latest: no unfinished `ggscope {command}` run under {Path('runs').resolve()}")
        return checked(*unfinished[0])
    manifest = read_manifest(Path(resume))
    if manifest is None or manifest.get("command") != command:
        raise ConfigError(f"resume={resume}: expected latest or the folder of a `ggscope {command}` run")
    return checked(Path(resume), manifest)


def checked(folder: Path, manifest: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    try:
        taken(Config, manifest.get("config"), "config")
        for name, item in of_kind(manifest.get("inputs", {}), dict, "inputs").items():
            of_kind(of_kind(item, dict, f"inputs.{name}").get("path"), str, f"inputs.{name}.path")
    except ValueError as error:
        raise FormatError(f"{folder / MANIFEST} is damaged ({error}); start a new run") from None
    return folder, manifest


def taken(kind: Any, value: Any, name: str) -> Any:
    """A manifest's `value` as a setting of this kind; of a group those items that there still are, as a dict.

    Raises ValueError for what is of another kind.
    """
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        items = of_kind(value, dict, name).items()
        return {item: taken(kinds[item], v, f"{name}.{item}") for item, v in items if item in kinds}
    if get_origin(kind) is list:
        (of,) = get_args(kind)
        found = [taken(of, item, name) for item in of_kind(value, list, name)]
        return [of(**item) for item in found] if isinstance(of, type) and is_dataclass(of) else found
    return value if kind is float and type(value) is int else of_kind(value, kind, name)


def with_settings_of_run(command: str, config: Config, typed: Collection[str]) -> Config:
    """The run's own settings for whatever was not typed; as it is where a set of settings was (`experiment=`,
    `trainer=signum`), which says more than its name does."""
    if any("." not in key and key not in ("resume", "run_dir") for key in typed):
        return config
    _, manifest = run_to_resume(command, config.resume)
    for group, items in taken(Config, manifest["config"], "config").items():
        if isinstance(items, dict):
            own = {item: value for item, value in items.items() if f"{group}.{item}" not in {*typed, *FOR_ONE_CALL}}
            config = replace(config, **{group: replace(getattr(config, group), **own)})
    return config


def same_place(one: str, other: str) -> bool:
    """Whether two paths, or URLs, are one."""
    return one == other or (
        "://" not in one + other and Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
    )


def resume_folder(command: str, config: Config, groups: tuple[str, ...]) -> Path:
    """The folder to go on in, after its config was compared with this one."""
    folder, manifest = run_to_resume(command, config.resume)
    old, new = flat(manifest["config"]), flat(asdict(config))
    had = {key: manifest.get("inputs", {}).get(name, {}).get("path", "") for key, name in TAKEN_AS.items()}
    changed = [
        f"{key}: {old.get(key)} -> {new[key]}"
        for key in new
        if not {key, key.split(".")[0]} & NOT_RESULT_RELEVANT
        and key.split(".")[0] in groups
        and old.get(key) != new[key]
        and not (had.get(key) and not old.get(key) and same_place(had[key], new[key]))
    ]
    if changed:
        raise ConfigError(
            f"resume={folder}: the settings differ ({'; '.join(changed)}); use the old ones or start anew"
        )
    return folder.resolve()
