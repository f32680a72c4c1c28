"""Every format there is, how one is recognised, and the import of an SAE.

Recognition looks at the names of files, at settings in JSON and at the names of tensors; torch files are read with
`weights_only=True` for it. Formats are asked in the order of FORMATS; the first that says yes reads the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from sae.errors import ConfigError, FormatError

from . import circuit_tracer, dictionary_learning, openai, qwen_scope, saelens, sparsify
from .building import Foreign, Imported, build
from .gemma_scope import GemmaScope1, GemmaScope2
from .llama_scope import LlamaScope, Llamascopium
from .plain_relu import Goodfire, R1Distill
from .source import Source


class Format(Protocol):
    """`FILES`: what is fetched of a folder on the hub."""

    NAME: str
    FILES: tuple[str, ...]

    @staticmethod
    def recognises(source: Source) -> bool: ...

    @staticmethod
    def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign: ...


FORMATS: tuple[Format, ...] = (
    saelens, GemmaScope1, GemmaScope2, sparsify, LlamaScope, Llamascopium, Goodfire, openai, qwen_scope,
    dictionary_learning, R1Distill, circuit_tracer,
)  # type: ignore[assignment]  # fmt: skip
NAMES = tuple(found.NAME for found in FORMATS)
HUB_FILES = tuple(dict.fromkeys(name for found in FORMATS for name in found.FILES))


def recognise(source: Source) -> Format:
    """The format of the files. FormatError where none is recognised."""
    for candidate in FORMATS:
        if candidate.recognises(source):
            return candidate
    held = ", ".join(sorted(path.name[:60] for path in source.folder.iterdir())[:8]) or "nothing"
    raise FormatError(
        f"{source.path} is no SAE of a known format (it holds {held}); name it with convert.format= ({', '.join(NAMES)})"
    )


def import_sae(path: Path, *, label: str = "", format_name: str = "", hook: str = "", hook_out: str = "") -> Imported:
    """A published SAE in raw model units.

    `label`: where it was published, for formats that say layer, site or k by the name of the place only. `hook` and
    `hook_out` win over what the files say.

    ConfigError for an unknown format name; FormatError for files that cannot be used.
    """
    if format_name and format_name not in NAMES:
        raise ConfigError(f"convert.format={format_name!r}; expected one of {', '.join(NAMES)}")
    source = Source(path, label)
    with np.errstate(all="ignore"):  # what overflows is refused by `build`
        chosen = next((f for f in FORMATS if format_name == f.NAME), None) or recognise(source)
        return build(chosen.load(source, hook, hook_out), chosen.NAME, source.label)
