"""HF's tiny twins on one thread: torch's idle threads would wait spinning, against llama.cpp's and the machine's."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="package")
def one_torch_thread():
    import pipeline.llama.symbols  # noqa: F401 - llama.cpp is mapped before torch

    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
