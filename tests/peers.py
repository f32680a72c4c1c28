"""Where the libraries are that ggscope is held against: in an environment of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

OURS = Path(__file__).parents[1] / ".venv-bench-train" / "bin" / "python"


def peers() -> str:
    """Their Python: GGSCOPE_PEERS, else that of `make bench-env`; skips the test where there is neither."""
    python = os.environ.get("GGSCOPE_PEERS", "") or str(OURS if OURS.exists() else "")
    if not python:
        pytest.skip("no Python with sae-lens, eai-sparsify and dictionary-learning: `make bench-env`, or GGSCOPE_PEERS")
    return python


def without_ggscope() -> dict[str, str]:
    """The environment, less the path that would find our packages in theirs."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
