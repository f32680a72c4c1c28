"""A tiny model and the store that an undisturbed local run makes of it."""

from __future__ import annotations

import pytest

from pipeline.config import ExecutorConfig
from pipeline.executors import open_executor
from tests.executors.capture_work import make_work
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
    work = make_work(model_path, tmp_path_factory.mktemp("straight"))
    open_executor(ExecutorConfig(kind="local", threads_per_worker=1), work.log).run(work)
    return files_of(work.store)
