"""Who may import whom (docs/architecture.md), read from the syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("sae", "convert", "pipeline", "conf") for path in (ROOT / package).rglob("*.py"))
ALLOWED_UP = {
    "sae": {"sae"},
    "convert": {"convert", "sae"},
    "pipeline": {"pipeline", "convert", "sae", "conf"},
    "conf": {"conf"},
}
ONLY_IN = {
    "llama_cpp": ("pipeline/llama/",),
    "zarr": ("pipeline/store/",),
    "ray": ("pipeline/executors/ray.py",),
    "submitit": ("pipeline/executors/submitit.py",),
    "hydra": ("pipeline/cli.py", "pipeline/sweep/points.py"),
    "optuna": ("pipeline/sweep/search.py",),
    "omegaconf": ("pipeline/cli.py",),
    "jinja2": ("pipeline/chat.py",),
    "triton": ("sae/gpu/kernels.py", "sae/gpu/check.py"),
    "scipy": (),  # by name, where it is needed: pipeline/evaluation/optional.py
    "sklearn": (),
    "torch": ("sae/", "pipeline/stages/train.py", "pipeline/loggers.py", "convert/interop/reading.py"),
}


def imported(path: Path) -> set[str]:
    """Top-level names of every absolute import of a file, type-checking imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_its_layer_allows(path):
    relative = path.relative_to(ROOT).as_posix()
    package, names = relative.split("/")[0], imported(path)
    assert not (names & set(ALLOWED_UP)) - ALLOWED_UP[package]
    for name, places in ONLY_IN.items():
        assert name not in names or relative.startswith(places), f"{relative} imports {name}"


def test_the_packages_in_use_are_the_ones_beside_each_other():
    import conf
    import convert
    import pipeline
    import sae

    assert {Path(str(m.__file__)).parents[1] for m in (conf, convert, pipeline, sae)} == {ROOT}
