"""A tiny model and the store that an undisturbed local run makes of it."""

from __future__ import annotations

import pytest

from tests.executors.capture_work import extract_with
from tests.store.helpers import files_of
from tests.tiny_llama import write_tiny_llama


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("executor_model") / "tiny.gguf"
    write_tiny_llama(path)
    return path


@pytest.fixture(scope="session")
def straight(model_path, tmp_path_factory):
    """Files of the store of an undisturbed run in one process."""
    folder = tmp_path_factory.mktemp("straight")
    extract_with(None, model_path, folder)
    return files_of(folder / "store")
