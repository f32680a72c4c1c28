"""Where the libraries are that ggscope is held against: in environments of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def peers() -> str:
    """The Python of the trainers: GGSCOPE_PEERS, else that of `make bench-env`; skips the test where there is neither."""
    return _python("GGSCOPE_PEERS", ".venv-bench-train", "sae-lens, eai-sparsify and dictionary-learning")


def interop_peers(library: str) -> str:
    """The Python that has `library`: GGSCOPE_INTEROP, else that of `make bench-env`; skips the test where none has it."""
    python = _python("GGSCOPE_INTEROP", ".venv-bench-interop", library)
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{library}') is None)"
    if subprocess.run([python, "-c", find], env=without_ggscope(), check=False).returncode:
        pytest.skip(f"{python} has no {library}")
    return python


def without_ggscope() -> dict[str, str]:
    """The environment, less the path that would find our packages in theirs."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def _python(variable: str, folder: str, what: str) -> str:
    ours = ROOT / folder / "bin" / "python"
    python = os.environ.get(variable, "") or str(ours if ours.exists() else "")
    if not python:
        pytest.skip(f"no Python with {what}: `make bench-env`, or {variable}")
    return python
