"""Hydra's errors in one line of ours: which setting, what it takes, what to type."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
from collections.abc import Sequence

from . import config
from .config import Config
from .ranges import CHOICES
from .unread import every_setting

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list[str]": "a list",
    "list[int]": "a list of whole numbers",
    "list[float]": "a list of numbers",
}
# what Hydra runs and chooses points with, and what does it here
PLUGINS = {
    "hydra.launcher": "points are run by executor=pool (processes of this machine), executor=ray or executor=submitit",
    "hydra.sweeper": "points are chosen by sweep=grid (every combination) or sweep=optuna",
}
TAIL = "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."


def one_line(message: str, name: str, known: Sequence[str]) -> str:
    """The message of an error of Hydra's for the command `name`, whose settings are `known`."""
    text = " ".join(line.strip() for line in message.splitlines() if line.strip())
    if found := re.search(r"Could not find '([^']+)/([^'/]+)' Available options in '[^']+': (.*?) Config search", text):
        return no_such_file(*found.groups())
    if found := re.search(r"Sweep parameters '(.+)' requires --multirun", text):
        swept = found.group(1)
        search = "sweep=optuna " if "interval(" in swept else ""
        return f"{swept}: expected one value; several are for a sweep: -m {search}{shlex.quote(swept)}"
    if found := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", text):
        return several_values(*found.groups())
    if found := re.search(r"In '([^']+)/([^']+)': .*Key '\1' not in 'Config'", text):
        return without_package(*found.groups())
    if found := re.search(r"full_key: (\w+) reference_type=(\w+)", text):
        return wrong_item(*found.groups())
    key = re.search(r"Key '([^']+)' (?:is )?not in '?(\w+)'?", text) or re.search(r"Could not override '([^']+)'", text)
    if key:
        full = re.search(r"full_key: ([\w.]+)", text) or re.search(r"Could not override '([^']+)'", text)
        return unknown(full.group(1) if full else key.group(1), name, known)
    if found := re.search(r"Error merging override ([\w.]+)=(.*?) (?:Invalid|Value|Cannot|[Ff]ield) ", text):
        said = wrong_value(found.group(1), found.group(2).strip("\"'"))
        return said or text
    return text.removesuffix(TAIL).strip()


def no_such_file(group: str, value: str, there: str) -> str:
    """A group without such a file in conf/."""
    names = there.split()
    close = difflib.get_close_matches(value.removesuffix(".yaml"), names, 1, 0.5)
    hint = f"; did you mean {group}={close[0]}?" if close else ""
    article = "an" if group[0] in "aeiou" else "a"
    return f"{group}={value}: expected {' or '.join(names)}, or {article} {group}/NAME.yaml of your own with --config-dir{hint}"


def without_package(group: str, value: str) -> str:
    """A file of settings of all groups, such as an experiment, that Hydra took for settings of `group` itself."""
    return f'{group}={value}: expected "# @package _global_" as the first line of {group}/{value}.yaml, which sets other groups'


def several_values(key: str, value: str) -> str:
    """Values with commas that are neither a list nor a sweep."""
    if kind_of(key).startswith("list"):
        return f"{key} is a list: type {as_list(key, value)}"
    return f"{key}={value}: expected one value; a run for each is -m {shlex.quote(f'{key}={value}')}"


def unknown(key: str, name: str, known: Sequence[str]) -> str:
    """A setting that is misspelt."""
    dotted = key.replace("/", ".")
    for plugin, instead in PLUGINS.items():
        if f"{dotted}.".startswith(f"{plugin}."):
            return f"{key}: no plugins of Hydra's are used here; {instead}"
    close = [dotted] if dotted in known else difflib.get_close_matches(dotted, known, 3, 0.5)
    close += [k for k in known if k.split(".")[-1] == dotted.split(".")[-1] and k not in close and dotted not in known]
    hint = f"did you mean {' or '.join(close[:3])}?" if close else f"see `ggscope {name} --help`"
    return f"unknown setting {key!r}; {hint}"


def wrong_item(key: str, kind: str) -> str:
    """A key of an item of a list, misspelt or with a value of another type; `kind`: the item's class in config.py."""
    known = {field.name: str(field.type).removesuffix(" | None") for field in dataclasses.fields(getattr(config, kind))}
    place = next(setting for setting in every_setting() if kind_of(setting) == f"list[{kind}]")
    if key in known:
        return f"{key} in {place}: expected {KINDS[known[key]]}"
    close = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(known)}"
    return f"unknown setting {key!r} in {place}; {hint}"


def wrong_value(key: str, value: str) -> str:
    """A value of another type; "" for a key that is no setting of ours."""
    kind = kind_of(key)
    if kind == "group":
        options = [k for k, choices in CHOICES.items() if k.startswith(f"{key}.") and value in choices]
        items = [f"{key}.{field.name}" for field in dataclasses.fields(getattr(Config(), key))]
        hint = f"did you mean {options[0]}={value}?" if options else f"give one of them: {', '.join(items[:6])}, ..."
        return f"{key}={value}: {key} is a group of settings; {hint}"
    if kind.startswith("list") and not (value.startswith("[") and value.endswith("]")):
        return f"{key} is a list: type {as_list(key, value)}"
    return f"{key}={value}: expected {KINDS[kind]}" if kind else ""


def as_list(key: str, value: str) -> str:
    """The setting as it is typed, quoted for every shell."""
    return shlex.quote(f"{key}=[{value.strip('[]')}]")


def kind_of(key: str) -> str:
    """The type of a setting as config.py writes it, "group" for a group of them, "" for neither."""
    node: object = Config()
    *groups, item = key.split(".")
    for group in groups:
        node = getattr(node, group, None)
    if not dataclasses.is_dataclass(node) or not hasattr(node, item):
        return ""
    if dataclasses.is_dataclass(getattr(node, item)):
        return "group"
    return next(str(f.type).removesuffix(" | None") for f in dataclasses.fields(node) if f.name == item)
