"""Packages that only a part of the evaluation needs."""

from __future__ import annotations

import importlib
from typing import Any

from sae.errors import ConfigError


def needed(module: str, setting: str) -> Any:
    """The module; ConfigError that names the setting and the install command where the package is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise ConfigError(f"{setting} needs the package {package}: pip install 'ggscope[eval]'") from None
