"""Conditions on the fields of a record: `lang==en`, `score>=0.5`, `license!=gpl`, `name~^test_`.

FIELD OPERATOR VALUE; the field may be a path into nested records (`meta.lang`). A value that reads as a
number, `true`, `false` or `null` is one unless the field holds a string. `~` searches a regular expression.
Nothing is evaluated.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae.errors import ConfigError

from .documents import NotMatchedError, UnusableError

_FORM = re.compile(r"\s*([^\s=!<>~]+)\s*(==|!=|>=|<=|>|<|~)\s*(.*?)\s*", re.DOTALL)
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_WORDS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    text: str
    path: tuple[str, ...]
    sign: str
    value: str
    pattern: re.Pattern[str] | None = None

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Raises UnusableError where the field is missing or cannot be compared with the value."""
        found = self._field(record)
        if self.pattern is not None:
            if not isinstance(found, str):
                raise UnusableError(
                    f"field {'.'.join(self.path)!r} is a {type(found).__name__}, which has no text to search"
                )
            return self.pattern.search(found) is not None
        wanted = self.value if isinstance(found, str) else _literal(self.value)
        if self.sign in ("==", "!="):
            return (found == wanted) == (self.sign == "==")
        if not _comparable(found, wanted):
            kind = "null" if found is None else f"a {type(found).__name__}"
            raise UnusableError(f"field {'.'.join(self.path)!r} is {kind}, which has no order to {self.value!r}")
        return _ORDER[self.sign](found, wanted)

    def _field(self, record: Any) -> Any:
        for key in self.path:
            if not isinstance(record, Mapping) or key not in record:
                raise UnusableError(f"no field {'.'.join(self.path)!r} (corpus.filter)")
            record = record[key]
        return record


def parse_conditions(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Raises ConfigError for a text that is no condition."""
    return tuple(_parse(text) for text in texts)


def require(conditions: Sequence[Condition], record: Mapping[str, Any]) -> None:
    """NotMatchedError where one of the conditions does not hold."""
    for condition in conditions:
        if not condition.holds(record):
            raise NotMatchedError(condition.text)


def _parse(text: str) -> Condition:
    match = _FORM.fullmatch(text)
    if match is None or (not match[3] and match[2] not in ("==", "!=")):
        raise ConfigError(
            f"corpus.filter: {text!r} is no condition; expected FIELD OPERATOR VALUE with one of == != > >= < <= ~, "
            f"as lang==en"
        )
    pattern = None
    if match[2] == "~":
        try:
            pattern = re.compile(match[3])
        except re.error as error:
            raise ConfigError(f"corpus.filter: {text!r} has no regular expression after ~ ({error})") from None
    return Condition(text=text, path=tuple(match[1].split(".")), sign=match[2], value=match[3], pattern=pattern)


def _literal(value: str) -> Any:
    if value in _WORDS:
        return _WORDS[value]
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _comparable(found: Any, wanted: Any) -> bool:
    if isinstance(found, str):
        return isinstance(wanted, str)
    return isinstance(found, int | float) and isinstance(wanted, int | float)
