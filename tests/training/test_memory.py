"""Batches that cannot be trained on are refused before anything is allocated."""

from __future__ import annotations

import pytest

from pipeline.config import TrainerConfig
from pipeline.training import memory
from pipeline.training.memory import available_memory, check_batch, check_memory
from sae.errors import ConfigError
from sae.train_config import TrainConfig
from tests.cli.conftest import ggscope, last_line

from .conftest import TRAIN


def test_a_batch_larger_than_all_rows_is_refused():
    check_batch(TrainerConfig(tokens=2048, batch_tokens=2048))
    with pytest.raises(ConfigError, match=r"trainer\.batch_tokens=2048 is more than trainer\.tokens=2047"):
        check_batch(TrainerConfig(tokens=2047, batch_tokens=2048))


def test_a_batch_larger_than_the_memory_is_refused_with_what_to_lower(monkeypatch):
    configs = {name: TrainConfig(num_latents=64, k=k, batch_tokens=1000) for name, k in (("a", 4), ("b", 16))}
    needed = 4 * 1000 * (4 * 256 + 3 * 16)
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    check_memory(configs, 256)
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match=r"batch_tokens=1000 rows of width 256 .* lower trainer\.batch_tokens"):
        check_memory(configs, 256)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    check_memory(configs, 256)


def test_the_memory_there_is_is_that_of_the_machine_or_of_the_container(monkeypatch, tmp_path):
    info, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(memory, "MEMINFO", info)
    monkeypatch.setattr(memory, "CGROUP_LIMIT", limit)
    info.write_text("MemTotal:       9000 kB\nMemAvailable:   8000 kB\n")
    assert available_memory() == 8000 * 1024
    limit.write_text("max\n")
    assert available_memory() == 8000 * 1024
    limit.write_text("4096\n")
    assert available_memory() == 4096


def test_a_training_that_no_memory_holds_ends_with_one_line(folder):
    huge = [*TRAIN, "trainer.batch_tokens=1000000000000", "trainer.tokens=1000000000000"]
    line = last_line(ggscope("train", *huge, cwd=folder, code=2))
    assert "lower trainer.batch_tokens" in line
    line = last_line(ggscope("train", *TRAIN, "trainer.batch_tokens=10000000", cwd=folder, code=2))
    assert "is more than trainer.tokens=7680" in line
    assert not list(folder.glob("runs/train/*"))
