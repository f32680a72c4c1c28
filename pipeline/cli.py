"""`ggscope CMD [PATH...] key=value ...`: pops the command, composes its settings with Hydra, runs the stage.

Exit codes: 0 done; 1 a bug of ours; 2 input or environment; 3 a check failed; 130 interrupted.
Heavy packages are imported by the stages, so `--help` is quick.
"""

from __future__ import annotations

import difflib
import errno
import functools
import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sae.errors import ConfigError, SAEError
from sae.signals import terminations

from .commands import COMMANDS
from .config import Config
from .help import help_of, overview
from .log_lines import show_warnings
from .ranges import check_ranges
from .setting_errors import one_line, unknown
from .start import interruptible
from .streams import lasting_streams
from .terminal import shown
from .unread import warnings
from .words import take_texts, take_words, with_paths, with_texts

# numpy's BLAS threads spin for a while after each product and then take the cores from llama.cpp's threads, which
# wait for each other: evaluate took 1.5 times as long. Must be set before numpy is loaded; 2**4 cycles is the least.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

HYDRA_FLAGS_WITH_VALUE = {"--config-dir", "-cd", "--cfg", "-c", "--package", "-p"}
HYDRA_FLAGS = {"-m", "--multirun", "--resolve", "--info", "-i", "--hydra-help", "--run", "-r"}
PATH_KEYS = {
    "run_dir", "resume", "model.path", "store.path", "sae.path", "convert.source", "convert.out", "convert.labels", "cvector.out",
    "evaluate.random_sae", "report.evaluation", "report.metrics",
}  # fmt: skip


def flat_defaults(name: str) -> dict[str, str]:
    """Every setting with the value that the command gives it."""
    return composed(name)[0]


@functools.cache
def composed(name: str) -> tuple[dict[str, str], dict[str, tuple[str, list[str]]]]:
    """Every setting's default, and for every folder of conf the file taken by default and all there are."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from .run import flat

    register_schema()
    with initialize_config_module("conf", version_base="1.3"):
        whole = compose(name, return_hydra_config=True)
    chosen = whole.hydra.runtime.choices
    folders = sorted((f for f in resources.files("conf").iterdir() if f.is_dir()), key=lambda f: f.name)
    names = {
        f.name: sorted(y.name.removesuffix(".yaml") for y in f.iterdir() if y.name.endswith(".yaml")) for f in folders
    }
    groups = {group: (chosen.get(group) or "", there) for group, there in names.items() if there}
    settings = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    values = flat(OmegaConf.to_container(settings))  # type: ignore[arg-type]
    return {key: ("" if v is None else str(v).replace("'", "")) for key, v in values.items()}, groups


def register_schema() -> None:
    """Store the schema under `schema` with its read-only flags cleared (frozen classes set them)."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    node = OmegaConf.structured(Config)
    OmegaConf.set_readonly(node, None)
    for key in node:
        if OmegaConf.is_config(node[key]):
            OmegaConf.set_readonly(node[key], None)
    ConfigStore.instance().store(name="schema", node=node)


def quoted(override: str, *, multirun: bool = False) -> str:
    """The override as it is where Hydra's grammar takes it, else with its value, or each of a list's, quoted."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    key, sign, value = override.partition("=")
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
        if multirun or not (parsed.is_sweep_override() and key in PATH_KEYS):  # a comma in a path is no sweep
            return override
    except OverrideParseException:
        if not sign or not key.strip("+~.").replace(".", "").replace("_", "").replace("/", "").isalnum():
            raise
    if value.startswith("[") and value.endswith("]"):  # [lang==en,score>=0.5]
        return f"{key}=[{','.join(in_quotes(item) for item in value[1:-1].split(','))}]"
    return f"{key}={in_quotes(value)}"


def in_quotes(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def checked_overrides(name: str, args: Sequence[str]) -> list[str]:
    """Quote what the grammar cannot take; `format=json` is short for the command's own `<command>.format=json`."""
    checked, skip = [], False
    multirun = not {"-m", "--multirun"}.isdisjoint(args)
    for arg in args:
        if "=" in arg and not skip:
            arg = arg.lstrip("+")  # Hydra's sign for a new key: here every setting is there
        if skip or arg.startswith("-"):
            if not skip and arg.split("=")[0] not in HYDRA_FLAGS | HYDRA_FLAGS_WITH_VALUE:
                raise ConfigError(f"unknown flag {arg}; settings are key=value, see `ggscope {name} --help`")
            skip = not skip and arg in HYDRA_FLAGS_WITH_VALUE
            checked.append(arg)
        elif "/" in (key := arg.partition("=")[0]) and "=" in arg:
            raise ConfigError(unknown(key, name, list(flat_defaults(name))))
        elif arg.startswith("format=") and f"{name}.format" in flat_defaults(name):
            checked.append(f"{name}.{arg}")
        elif "=" in arg and not arg.startswith("~") and arg.partition("=")[0].strip() == arg.partition("=")[0]:
            checked.append(quoted(arg, multirun=multirun))
        else:
            raise ConfigError(f"expected key=value, got {arg!r}; see `ggscope {name} --help`")
    if skip:
        raise ConfigError(f"{checked[-1]}: expected a value after it")
    return checked


def run_stage(name: str, config: Config, verb: str = "") -> None:
    """Open the run folder (of a command that keeps one) and call `pipeline.stages.<name>.run`."""
    from .resuming import resume_folder
    from .run import RunContext, new_folder, read_manifest, running, torchrun_rank

    check_ranges(config)
    interruptible()
    stage = importlib.import_module(f"pipeline.stages.{name}")
    if not COMMANDS[name].keeps_run:
        stage.run(RunContext(command=name, verb=verb, folder=Path.cwd(), config=config))
        return
    groups = COMMANDS[name].groups
    rank = torchrun_rank(name, config)
    if rank:
        where = Path(config.resume or config.run_dir).resolve()
        stage.run(
            RunContext(command=name, verb=verb, folder=where, config=config, resumed=bool(config.resume), rank=rank)
        )
        return
    folder = resume_folder(name, config, groups) if config.resume else new_folder(name, config)
    before = (read_manifest(folder) or {}) if config.resume else {}
    context = RunContext(
        command=name, verb=verb, folder=folder, config=config, resumed=bool(config.resume),
        inputs=before.get("inputs", {}),
    )  # fmt: skip
    if before.get("status") == "finished":
        context.console.print(f"note: {config.resume} is finished: only what is missing is done", highlight=False)
    with running(context):
        stage.run(context)


def hydra_task(
    name: str, words: tuple[str, list[str]], texts: dict[str, str], keys: list[str], failures: list[Exception]
) -> Callable[[Any], None]:
    """The function Hydra calls once a job; `words` are verb and paths, `keys` the settings typed. A failure in this process is kept, so that Hydra adds no lines of its own."""
    owner = os.getpid()

    def task(cfg: Any) -> None:
        from omegaconf import OmegaConf

        from .resuming import with_settings_of_run

        try:
            config = OmegaConf.to_object(cfg)
            assert isinstance(config, Config)
            for line in warnings(name, keys, config):
                print(f"warning: {line}", file=sys.stderr)
            if config.resume and COMMANDS[name].keeps_run:
                config = with_settings_of_run(name, config, keys)
            run_stage(name, with_paths(name, with_texts(config, texts), words[1]), words[0])
        except Exception as error:
            if os.getpid() != owner:  # a launcher's worker: the exception is the only way back
                raise
            failures.append(error)

    return task


def run_command(name: str, args: list[str]) -> None:
    verb, paths, args = take_words(name, args)
    texts, rest = take_texts(name, args)
    overrides = checked_overrides(name, rest)
    import hydra

    register_schema()
    if not {"-m", "--multirun"}.isdisjoint(overrides):
        if not COMMANDS[name].keeps_run:
            raise ConfigError(
                f"-m: `ggscope {name}` makes no runs to sweep over; leave out -m, one call for each value"
            )
        sweep(name, [*([verb] if verb else []), *paths], texts, overrides)
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come out instead of being printed
    sys.argv = [f"ggscope {name}", *overrides]
    failures: list[Exception] = []
    hydra.main(version_base="1.3", config_path="pkg://conf", config_name=name)(
        hydra_task(name, (verb, paths), texts, [item.partition("=")[0] for item in overrides if "=" in item], failures)
    )()
    if failures:
        raise failures[0]


def sweep(name: str, words: list[str], texts: dict[str, str], overrides: list[str]) -> None:
    """`-m`: a run for each point, through an executor (`pipeline/sweep` says why not a launcher of Hydra's)."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from .sweep.points import split
    from .sweep.sweep import run_sweep

    interruptible()
    flags, settings, search_path = [], [], []
    queue = [item for item in overrides if item not in ("-m", "--multirun")]
    while queue:
        item = queue.pop(0)
        if item in ("--config-dir", "-cd"):
            folder = str(Path(queue.pop(0)).resolve())
            flags += ["--config-dir", folder]
            search_path = [f"hydra.searchpath=[{in_quotes(f'file://{folder}')}]"]
        elif item.startswith("-"):
            raise ConfigError(f"-m takes no {item}; look at one point without -m")
        else:
            settings.append(item)
    with initialize_config_module("conf", version_base="1.3"):
        config = OmegaConf.to_object(compose(name, [*search_path, *split(settings)[0]]))
    assert isinstance(config, Config)
    check_ranges(config)
    flag_of = {key: flag for flag, key in COMMANDS[name].prompts}
    said = [word for key, text in texts.items() for word in (flag_of[key], text)]
    run_sweep(name, config, [name, *words, *said], settings, flags)


def report_bug(error: BaseException) -> int:
    with tempfile.NamedTemporaryFile("w", prefix="ggscope-bug-", suffix=".txt", delete=False, encoding="utf-8") as f:
        f.write("".join(traceback.format_exception(error)))
    print(
        f"ggscope: this is a bug of ours ({type(error).__name__}: {error}); the traceback is in {f.name}",
        file=sys.stderr,
    )
    return 1


def exit_code_of(error: BaseException, name: str) -> int:
    """Print one line for what went wrong and return the exit code that goes with it."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, SAEError):
        print(f"ggscope {name}: {shown(' '.join(str(error).split()))}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print(f"ggscope {name}: interrupted", file=sys.stderr)
        return 130
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        text = str(error) if cause is error else f"{error} {cause}"
        print(f"ggscope {name}: {one_line(text, name, list(flat_defaults(name)))}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and error.errno != errno.ENOSPC and error.filename is not None:
        place = shown(str(error.filename))
        print(f"ggscope {name}: {place}: {error.strerror}; name a path that can be used", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        print(
            f"ggscope {name}: the disk is full ({error.filename or 'while writing'}); free some room and resume",
            file=sys.stderr,
        )
        return 2
    return report_bug(error)


def terminate(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    name = args[0] if args else ""
    keeps_run = name in COMMANDS and COMMANDS[name].keeps_run and bool(COMMANDS[name].groups)
    try:
        with lasting_streams(results_elsewhere=keeps_run and {"-h", "--help"}.isdisjoint(args)):
            return called(args)
    except OSError as error:
        print(f"ggscope: standard output: {error.strerror}; free some room there and start again", file=sys.stderr)
        return 2


def called(args: list[str]) -> int:
    """Do what the words say; returns the exit code."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if args[0] in ("-V", "--version"):
        from importlib import metadata

        print(f"ggscope {metadata.version('ggscope')}")
        return 0
    name = args.pop(0)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        print(
            f"ggscope: unknown command {name!r}; {f'did you mean {close[0]}?' if close else 'see ggscope --help'}",
            file=sys.stderr,
        )
        return 2
    for number in terminations():
        signal.signal(number, terminate)
    show_warnings()
    try:
        if any(arg in ("-h", "--help") for arg in args):
            print(help_of(name, *(composed(name) if COMMANDS[name].groups else ({}, {}))))
        elif not COMMANDS[name].groups:
            importlib.import_module(f"pipeline.stages.{name}").run(args)
        else:
            run_command(name, args)
    except SystemExit as error:  # Hydra's own flags (--cfg, --info) end this way
        return error.code if isinstance(error.code, int) else 0
    except BaseException as error:  # noqa: BLE001  the one place where every failure becomes a line and a code
        return exit_code_of(error, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
