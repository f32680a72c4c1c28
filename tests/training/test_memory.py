"""Batches that cannot be trained on are refused before anything is allocated."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config import TrainerConfig
from pipeline.training import memory
from pipeline.training.memory import STATES, available_memory, check_batch, check_memory, state_bytes
from sae.errors import ConfigError
from sae.train_config import TrainConfig
from sae.wiring import SAME, Wiring
from tests.cli.conftest import ggscope, last_line

from .conftest import TRAIN


def test_a_batch_larger_than_all_rows_is_refused():
    check_batch(TrainerConfig(tokens=2048, batch_tokens=2048))
    with pytest.raises(ConfigError, match=r"trainer\.batch_tokens=2048 is more than trainer\.tokens=2047"):
        check_batch(TrainerConfig(tokens=2047, batch_tokens=2048))


def test_a_batch_larger_than_the_memory_is_refused_with_what_to_lower(monkeypatch):
    configs = {name: TrainConfig(num_latents=64, k=k, batch_tokens=1000) for name, k in (("a", 4), ("b", 16))}
    needed = 4 * 1000 * (4 * 256 + 3 * 16) + 2 * 3 * 4 * 64 * 2 * 256
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    check_memory(configs, 256)
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match=r"2 SAEs of sae.num_latents=64 .* fewer values in together"):
        check_memory(configs, 256)
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 1000 * (4 * 256 + 3 * 16) - 1)
    with pytest.raises(ConfigError, match=r"batch_tokens=1000 rows of width 256 .* lower trainer\.batch_tokens"):
        check_memory(configs, 256)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    check_memory(configs, 256)


PAIRS = (("a", 8), ("b", 8))


@pytest.mark.parametrize(
    ("optimizer", "width", "wiring", "states"),
    [
        ("adam", 8, SAME, 3 * (8 + 8)),
        ("signum", 8, SAME, 3 * (8 + 8)),
        ("muon", 8, SAME, 2 * (8 + 8)),
        ("adam", 16, Wiring(kind="crosscoder", inputs=PAIRS), 3 * (16 + 16)),
        ("adam", 16, Wiring(kind="transcoder", inputs=PAIRS[:1], outputs=PAIRS[1:]), 3 * (8 + 8)),
        ("adam", 32, Wiring(kind="cross_layer", inputs=PAIRS, outputs=PAIRS), 3 * (8 + 16)),
    ],
)
def test_what_training_holds_is_the_least_that_a_learner_holds(optimizer, width, wiring, states):
    torch = pytest.importorskip("torch")
    from sae.learner import Learner, Subject

    config = TrainConfig(num_latents=32, k=2, batch_tokens=64, tokens=640, optimizer=optimizer, device="cpu")
    assert state_bytes(config, width, wiring, STATES) == 4 * 32 * states
    variances = (1.0,) * len((*wiring.inputs, *wiring.outputs))
    subject = Subject(
        d_in=width, mean_D=np.zeros(width), variance=1.0, hook="h", host={}, wiring=wiring, variances=variances
    )
    learner = Learner(config, subject, torch.device("cpu"))
    x_BD = np.random.default_rng(0).normal(size=(64, width)).astype(np.float32)
    learner.train(*learner.prepare(x_BD))
    held = {tensor.data_ptr(): tensor for tensor in found_tensors(torch, learner.tensors())}
    matrices = [tensor for tensor in held.values() if tensor.ndim == 2]
    assert sum(tensor.nbytes for tensor in matrices) >= 4 * 32 * states  # more: the mask of a cross-layer one


def found_tensors(torch, value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for child in values for tensor in found_tensors(torch, child)]


def test_an_sae_larger_than_the_memory_is_refused_with_what_to_lower(monkeypatch):
    configs = {"": TrainConfig(num_latents=4_194_304, k=8, batch_tokens=64)}
    monkeypatch.setattr(memory, "available_memory", lambda: 25_000_000_000)
    with pytest.raises(ConfigError) as refused:
        check_memory(configs, 256)
    assert str(refused.value) == (
        "an SAE of sae.num_latents=4194304 at width 256 needs at least 25.8 GB to train, 25.0 GB of memory are free; "
        "lower sae.num_latents"
    )
    check_memory(configs, 256, stays_here=False)  # on a GPU, say
    check_memory(dict.fromkeys("abc", configs[""]), 256, stays_here=False)  # there one after another
    monkeypatch.setattr(memory, "available_memory", lambda: 8_000_000_000)
    with pytest.raises(ConfigError, match=r"at least 8\.6 GB"):
        check_memory(configs, 256, stays_here=False)


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
    line = last_line(ggscope("train", *TRAIN, "sae.num_latents=2000000000", cwd=folder, code=2))
    assert "lower sae.num_latents" in line
    line = last_line(ggscope("train", *TRAIN, "trainer.batch_tokens=10000000", cwd=folder, code=2))
    assert "is more than trainer.tokens=7680" in line
    assert not list(folder.glob("runs/train/*"))
