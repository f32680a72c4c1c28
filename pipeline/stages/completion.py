"""`ggscope completion SHELL`: a completion script made from the commands, their settings and the choices of these."""

from __future__ import annotations

import sys
from importlib import resources

from sae.errors import ConfigError

from ..cli import composed, flat_defaults
from ..commands import COMMANDS
from ..help import settings_of
from ..ranges import CHOICES
from ..setting_errors import kind_of

SHELLS = ("bash", "zsh", "fish")
EVERYWHERE = ("-m", "--config-dir", "--help")
OPEN = {"str", "list[str]"}  # types whose values may be paths
FISH_COMMAND = "complete -c ggscope -n __fish_use_subcommand -a {name} -d '{summary}'"
FISH_WORDS = "complete -c ggscope -n '__fish_seen_subcommand_from {name}' -a '{words}'"
FISH_VERBS = "complete -c ggscope -n '__fish_seen_subcommand_from {name}; and not __fish_seen_subcommand_from {verbs}' -a '{verbs}'"


def keys_of(name: str) -> list[str]:
    """What may follow a command: its settings and sets of settings, and flags; first of all, its verbs (see `script`)."""
    command = COMMANDS[name]
    if not command.groups:
        return list(SHELLS) if name == "completion" else []
    found = [*settings_of(name, flat_defaults(name)), *sets_of(name), *(["format"] if formats_of(name) else [])]
    found += ["resume", "run_dir"] if command.keeps_run else []
    texts = [word for flag, _ in command.prompts for word in (flag, f"{flag}-file")]
    return [*(f"{key}=" for key in found), *texts, *EVERYWHERE]


def sets_of(name: str) -> dict[str, list[str]]:
    """The folders of conf/ that a command takes a file of, and these files."""
    command = COMMANDS[name]
    own = (*command.groups, "experiment", *(["sweep"] if command.keeps_run else []))
    return {group: there for group, (_, there) in composed(name)[1].items() if group in own}


def formats_of(name: str) -> tuple[str, ...]:
    """What `format=` may be, which is short for the command's own."""
    return CHOICES.get(f"{name}.format", ())


def choices_of(name: str) -> dict[str, list[str]]:
    """The values of each setting that has some to choose from."""
    found = {key: [c for c in CHOICES[key] if c] for key in settings_of(name, flat_defaults(name)) if key in CHOICES}
    found |= {k: ["true", "false"] for k in settings_of(name, flat_defaults(name)) if kind_of(k) == "bool"}
    found |= sets_of(name) | ({"format": list(formats_of(name))} if formats_of(name) else {})
    return found | ({"resume": ["latest"]} if COMMANDS[name].keeps_run else {})


def paths_of(name: str) -> list[str]:
    """The settings whose value may be a path: every text without choices."""
    known = choices_of(name)
    found = [k for k in settings_of(name, flat_defaults(name)) if kind_of(k) in OPEN and k not in known]
    return found + (["resume", "run_dir"] if COMMANDS[name].keeps_run else [])


def script(shell: str) -> str:
    """The text to source in `shell` (bash, zsh or fish)."""
    return fish() if shell == "fish" else bash(zsh=shell == "zsh")


def fish() -> str:
    """fish itself completes files after `=`."""
    lines = [FISH_COMMAND.format(name=n, summary=c.summary.replace("'", "")) for n, c in COMMANDS.items()]
    for name, command in COMMANDS.items():
        values = choices_of(name) if command.groups else {}
        words = [*keys_of(name), *(f"{key}={value}" for key, choices in values.items() for value in choices)]
        lines += [FISH_WORDS.format(name=name, words=" ".join(words))] if words else []
    lines += [FISH_VERBS.format(name=n, verbs=" ".join(c.verbs)) for n, c in COMMANDS.items() if c.verbs]
    return "\n".join(lines) + "\n"


def bash(*, zsh: bool) -> str:
    """Two functions that look up words and values, and the one that bash, or zsh as bash, calls (completion.bash)."""
    words, values = [], []
    for name, command in COMMANDS.items():
        flags = "|".join(f"{name}:*:{flag}" for flag, _ in command.prompts)
        words += [f"    {flags}) ;;"] if flags else []  # a text of the user's
        files = "; files=1" if command.path_key else ""
        keys = " ".join(keys_of(name))
        if command.verbs:
            more = f" {keys}" if command.verb_optional else ""
            words.append(f'    {name}:2:*) words="{" ".join(command.verbs)}{more}"{files if more else ""} ;;')
        words.append(f'    {name}:*) words="{keys}"{files} ;;')
        if not command.groups:
            continue
        paths = paths_of(name)
        for key, choices in choices_of(name).items():
            values.append(f'    {name}:{key}) words="{" ".join(choices)}"{"; files=1" if key in paths else ""} ;;')
        if closed := [f"{name}:{key}" for key in paths if key not in choices_of(name)]:
            values.append(f"    {'|'.join(closed)}) files=1 ;;")
    lines = [
        f'_ggscope_commands="{" ".join(COMMANDS)}"',
        "_ggscope_words() {\n  case $1:$2:$3 in", *words, "  esac\n}",
        "_ggscope_values() {\n  case $1:$2 in", *values, "  esac\n}",
    ]  # fmt: skip
    body = (resources.files("pipeline") / "data" / "completion.bash").read_text(encoding="utf-8")
    start = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    option = "-o nospace " if zsh else ""  # there it cannot be chosen word by word
    return start + "\n".join(lines) + f"\n{body}complete {option}-F _ggscope ggscope\n"


def run(args: list[str]) -> None:
    if len(args) != 1 or args[0] not in SHELLS:
        raise ConfigError("expected `ggscope completion bash`, `zsh` or `fish`")
    sys.stdout.write(script(args[0]))
