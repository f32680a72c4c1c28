"""Chat messages in a model's own template: Jinja as HF transformers and llama.cpp's --jinja render it.

A template comes with the model file, so it is not trusted: it runs in Jinja's sandbox, what it can make is bounded, and
whatever goes wrong in it is one ConfigError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sae.errors import ConfigError

SPARE = 1 << 20  # characters a template may add to the messages
REPEATS = 4  # times it may write them
STEPS = 1 << 20  # of all its ranges together
LONGEST_REASON = 200


class MessagesRefusedError(ConfigError):
    """The template itself says that it has no form for these messages."""


class ChatTemplate:
    """One model's template. `name`: the model, for messages; `bos`, `eos`: how its tokens are spelled, "" for none.

    ConfigError for a template that Jinja cannot read.
    """

    def __init__(self, text: str, *, name: str, bos: str, eos: str) -> None:
        self._name, self._given = name, {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
        self._environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        try:
            self._template = self._environment.from_string(text)
        except Exception as error:  # noqa: BLE001 - a template can make Jinja and Python's compiler raise anything
            raise self._fault(error) from None

    def render(self, messages: Sequence[Mapping[str, str]], *, add_assistant: bool = True) -> str:
        """The messages as one text, ready for the answer where asked for.

        MessagesRefusedError where the template raises an exception of its own; ConfigError for any other fault of it.
        """
        most = SPARE + REPEATS * sum(len(text) for message in messages for text in message.values())
        kept = [dict(message) for message in messages]
        self._environment.begin(most)
        parts, length = [], 0
        try:
            for part in self._template.generate(messages=kept, add_generation_prompt=add_assistant, **self._given):
                parts.append(part)
                length += len(part)
                if length > most:
                    raise SecurityError(f"it writes more than {most} characters")
        except _RaisedError as error:
            raise MessagesRefusedError(
                f"the chat template of {self._name} refuses the messages ({_said(error)})"
            ) from None
        except Exception as error:  # noqa: BLE001 - see above
            raise self._fault(error) from None
        return "".join(parts)

    def _fault(self, error: Exception) -> ConfigError:
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        return ConfigError(
            f"the chat template of {self._name} cannot be used: {_said(error)}{where}; give a plain prompt"
        )


class _RaisedError(TemplateError):
    """What `raise_exception` of a template raises."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with the names that templates expect, and bounds on what they can make."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._most, self._steps = SPARE, 0
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "range": self._range}

    def begin(self, most: int) -> None:
        """A new text of at most `most` characters."""
        self._most, self._steps = most, 0

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > self._most:
            raise SecurityError(f"`{operator}` makes more than {self._most} characters")
        return super().call_binop(context, operator, left, right)

    def _range(self, *args: int) -> range:
        found = range(*args)
        self._steps += len(found)
        if self._steps > STEPS:
            raise SecurityError(f"its ranges have more than {STEPS} steps")
        return found


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's words for trainers: what is in it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _size(operator: str, left: Any, right: Any) -> int:
    """At least the length of what the operator makes; 0 where it cannot be long."""
    if operator == "**":
        return left.bit_length() * right if isinstance(left, int) and isinstance(right, int) else 0
    if isinstance(left, int):
        left, right = right, left
    return len(left) * right if isinstance(left, str | list | tuple) and isinstance(right, int) else 0


def _raise_exception(message: str) -> None:
    raise _RaisedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as HF has it: nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _said(error: Exception) -> str:
    """What an error says, on one line, not longer than a reader wants."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."
