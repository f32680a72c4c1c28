"""What `--help` prints: pure text from the commands, the defaults and the choices."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from .commands import COMMANDS
from .config import Config
from .meanings import meanings
from .ranges import CHOICES

INTRO = "ggscope: train k-sparse autoencoders on what llama.cpp computes, and run them back inside it."
WIDTH = 36  # of `key=default`, beside which choices and meaning stand
LEAST_COLUMNS = 80


def overview() -> str:
    lines = [INTRO, "", "usage: ggscope COMMAND [key=value ...]", ""]
    lines += [f"  {name:<11}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "ggscope COMMAND --help shows its settings and examples; --version prints the version."]
    return "\n".join(lines)


def help_of(name: str, defaults: Mapping[str, str], groups: Mapping[str, tuple[str, Sequence[str]]]) -> str:
    """Usage, examples, and every setting of one command with its default, choices and meaning.

    `groups`: a folder of conf to the file taken by default and all there are.
    """
    command = COMMANDS[name]
    lines = [f"ggscope {name}: {command.summary}", "", *usage(name)]
    lines += ["examples:", *(f"  {example}" for example in command.examples)]
    if command.prompts:
        lines += ["", "texts:"]
        lines += [f"  {flag} TEXT, {flag}-file FILE" for flag, _ in command.prompts]
        lines.append("  - reads the first of them from standard input")
    if command.groups:
        own = (*command.groups, "experiment", *(["sweep"] if command.keeps_run else []))
        named = [(g, *groups[g]) for g in groups if g in own and len(groups[g][1]) > 1]
        if named:
            lines += ["", "sets of settings, each a file of conf/ (or of your --config-dir):"]
            lines += [with_choices(f"{group}={chosen}", there) for group, chosen, there in named]
        lines += ["", "settings:"]
        said = meanings()
        for key in settings_of(name, defaults):
            lines += explained(f"{key}={defaults[key]}", CHOICES.get(key, ()), said.get(key, ""))
        lines += ["", *footer(name)]
    return "\n".join(lines)


def usage(name: str) -> list[str]:
    """How words follow the command; nothing for one that takes settings only."""
    command = COMMANDS[name]
    verbs = "|".join(command.verbs)
    words = [f"[{verbs}]" if command.verb_optional else verbs] if verbs else []
    if command.path_key:
        words.append("[PATH...]" if takes_several(command.path_key) else "[PATH]")
    if not words:
        return []
    return [f"usage: ggscope {name} {' '.join(words)} [key=value ...]; PATH sets {command.path_key}", ""]


def footer(name: str) -> list[str]:
    lines = [
        "-m runs every combination of comma-separated values; -m sweep=optuna sweep.trials=N searches;",
        "experiment=NAME loads conf/experiment/NAME.yaml;",
        "--config-dir FOLDER adds your own yaml files",
    ]
    if COMMANDS[name].keeps_run:
        again = "continues" if COMMANDS[name].continues else "starts again with a run's settings"
        lines[-1] += f"; resume=RUN|latest {again}; run_dir=FOLDER names the run folder"
    return [*lines[:-1], lines[-1] + "."]


def with_choices(setting: str, choices: Sequence[str]) -> str:
    shown = listed(choices)
    return f"  {setting:<{WIDTH}}{shown}" if shown else f"  {setting}"


def listed(choices: Sequence[str]) -> str:
    """`(a | b)`; nothing where there is no choice."""
    shown = " | ".join(choice for choice in choices if choice)
    return f"({shown})" if shown else ""


def explained(setting: str, choices: Sequence[str], meaning: str) -> list[str]:
    """The setting with its choices and its meaning beside it, as the terminal is wide."""
    said = " ".join(part for part in (listed(choices), meaning) if part)
    columns = max(LEAST_COLUMNS, shutil.get_terminal_size((140, 24)).columns) - WIDTH - 2
    first, *further = textwrap.wrap(said, columns) or [""]
    return [
        f"  {setting:<{WIDTH}}{'' if len(setting) < WIDTH else ' '}{first}".rstrip(),
        *(f"{'':<{WIDTH + 2}}{line}" for line in further),
    ]


def settings_of(name: str, defaults: Iterable[str]) -> list[str]:
    """The settings that a command reads, in the order of the schema."""
    command = COMMANDS[name]
    return [
        k
        for k in defaults
        if k in command.also_reads or (k.split(".")[0] in command.groups and not k.startswith(command.not_read))
    ]


def takes_several(path_key: str) -> bool:
    """Whether the setting is a list, so that several paths may follow the command."""
    group, item = path_key.split(".")
    return isinstance(getattr(getattr(Config(), group), item), list)
