"""`ggscope completion SHELL`: a completion script made from the commands and their settings."""

from __future__ import annotations

import sys

from sae.errors import ConfigError

from ..cli import flat_defaults
from ..commands import COMMANDS
from ..help import settings_of

BASH = """_ggscope() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}}
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{commands}" -- "$cur")); return; fi
  case ${{COMP_WORDS[1]}}:$COMP_CWORD in
{cases}
  esac
  case $cur in *=) ;; *) compopt -o nospace ;; esac
}}
complete -o default -F _ggscope ggscope
"""
FISH_COMMAND = "complete -c ggscope -n __fish_use_subcommand -a {name} -d '{summary}'"
FISH_KEYS = "complete -c ggscope -n '__fish_seen_subcommand_from {name}' -a '{keys}'"
FISH_VERBS = "complete -c ggscope -n '__fish_seen_subcommand_from {name}; and not __fish_seen_subcommand_from {verbs}' -a '{verbs}'"
BASH_VERBS = '    {name}:2) COMPREPLY=($(compgen -W "{verbs}" -- "$cur")); return ;;'
BASH_KEYS = '    {name}:*) COMPREPLY=($(compgen -W "{keys}" -- "$cur")) ;;'


def keys_of(name: str) -> list[str]:
    """What may follow a command: its settings and text flags; first of all, its verbs (see `script`)."""
    found = [f"{key}=" for key in settings_of(name, flat_defaults(name))] if COMMANDS[name].groups else []
    return found + [flag for flag, _ in COMMANDS[name].prompts]


def script(shell: str) -> str:
    """The text to source in `shell` (bash, zsh or fish)."""
    if shell == "fish":
        lines = [FISH_COMMAND.format(name=n, summary=c.summary.replace("'", "")) for n, c in COMMANDS.items()]
        lines += [FISH_KEYS.format(name=n, keys=" ".join(keys_of(n))) for n in COMMANDS if keys_of(n)]
        lines += [FISH_VERBS.format(name=n, verbs=" ".join(c.verbs)) for n, c in COMMANDS.items() if c.verbs]
        return "\n".join(lines) + "\n"
    cases = [BASH_VERBS.format(name=n, verbs=" ".join(c.verbs)) for n, c in COMMANDS.items() if c.verbs]
    cases += [BASH_KEYS.format(name=n, keys=" ".join(keys_of(n))) for n in COMMANDS]
    bash = BASH.format(commands=" ".join(COMMANDS), cases="\n".join(cases))
    return bash if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{bash}"


def run(args: list[str]) -> None:
    if len(args) != 1 or args[0] not in ("bash", "zsh", "fish"):
        raise ConfigError("expected `ggscope completion bash`, `zsh` or `fish`")
    sys.stdout.write(script(args[0]))
