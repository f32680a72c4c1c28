"""The words of the command line that are no settings of Hydra's: verb, paths, texts."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from pathlib import Path

from sae.errors import ConfigError

from .commands import COMMANDS
from .config import Config
from .help import takes_several


def read_text(source: str) -> str:
    """The text of a file, or of standard input for `-`; exactly one trailing newline is dropped."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a readable UTF-8 text file, got {source}: {error}") from None
    return text.removesuffix("\n")


def take_texts(name: str, args: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split the prompt flags off: `{config key: text}` and the arguments that are Hydra's."""
    flags = dict(COMMANDS[name].prompts)
    texts: dict[str, str] = {}
    rest: list[str] = []
    queue = list(args)
    while queue:
        arg = queue.pop(0)
        flag, sign, value = arg.partition("=") if arg.startswith("--") else (arg, "", "")
        base = flag.removesuffix("-file")
        if arg == "-" and flags:
            texts[next(iter(flags.values()))] = read_text("-")
        elif base in flags:
            if not sign and not queue:
                raise ConfigError(f"{flag}: expected a text after it, e.g. {flag} 'import os'")
            value = value if sign else queue.pop(0)
            texts[flags[base]] = read_text(value) if flag.endswith("-file") else value
        else:
            rest.append(arg)
    return texts, rest


def take_words(name: str, args: list[str]) -> tuple[str, list[str], list[str]]:
    """Split the verb and the paths off: `(verb, paths, the rest)`. Paths are the words before the first setting."""
    command, rest = COMMANDS[name], list(args)
    verb = ""
    if command.verbs:
        word = rest[0] if rest else ""
        close = difflib.get_close_matches(word, command.verbs, 1)
        if word in command.verbs or not command.verb_optional or (close and not Path(word).exists()):
            verb = word
            rest = rest[1:]
        if verb not in command.verbs and (verb or not command.verb_optional):
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"expected `ggscope {name} {'|'.join(command.verbs)} ...`, got {verb or 'nothing'!r}{hint}"
            )
    paths = []
    while command.path_key and rest and not rest[0].startswith("-") and "=" not in rest[0]:
        paths.append(rest.pop(0))
    return verb, paths, rest


def with_paths(name: str, config: Config, paths: list[str]) -> Config:
    """The settings with the paths of the command line put where the command wants them."""
    if not paths:
        return config
    group, item = COMMANDS[name].path_key.split(".")
    several = takes_several(COMMANDS[name].path_key)
    if not several and len(paths) > 1:
        raise ConfigError(f"`ggscope {name}` takes one path, got {len(paths)}: {' '.join(paths)}")
    value = paths if several else paths[0]
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{item: value})})


def with_texts(config: Config, texts: dict[str, str]) -> Config:
    for key, text in texts.items():
        group, item = key.split(".")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{item: text})})
    return config
