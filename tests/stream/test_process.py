"""The capturing child: its errors, its end, its bounds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import HookConfig, ModelConfig
from pipeline.stream.batches import StreamBatches
from pipeline.stream.process import CaptureProcess
from sae.errors import ConfigError, HookError, LlamaError

from .conftest import TEXT, settings

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_blocks_come_in_the_order_asked_for_and_the_same_when_asked_for_again(capture):
    capture.follow([3, 1, 4, 1, 5])
    seen = []
    for block in (3, 1, 4, 1, 5):
        captured = capture.take()
        assert captured.block == block
        seen.append(captured.stored_nD.copy())
        np.testing.assert_allclose(captured.sum_D, seen[-1].astype(np.float64).sum(axis=0), rtol=1e-9, atol=1e-9)
        capture.release(captured)
    np.testing.assert_array_equal(seen[1], seen[3])
    assert not np.array_equal(seen[0][:10], seen[1][:10])


def test_no_more_blocks_are_captured_than_the_queue_holds(capture):
    capture.follow(range(20))
    held = [capture.take() for _ in range(3)]  # queue_batches
    time.sleep(0.5)
    assert not capture.ready()
    kept = [block.stored_nD.copy() for block in held]
    capture.release(held[0])
    assert capture.take().block == 3
    np.testing.assert_array_equal(held[1].stored_nD, kept[1])  # the slots that were not given back
    np.testing.assert_array_equal(held[2].stored_nD, kept[2])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": ModelConfig(path="missing.gguf")}, Exception, "missing.gguf"),
        ({"hook": HookConfig(points=["blocks.9.hook_resid_post"])}, HookError, "blocks"),
        ({"hook": HookConfig(points=["blocks.1.attn.hook_pattern"])}, HookError, "cannot be stored"),
    ],
)
def test_an_error_of_the_child_comes_out_as_it_was_raised(folder, tmp_path, change, error, text):
    with pytest.raises(error, match=text) as caught:
        CaptureProcess(replace(settings(folder), **change), tmp_path)
    assert getattr(caught.value, "exit_code", 0) == 2


def test_a_child_with_the_blocks_it_needs_captures_the_bits_of_one_with_all(folder, tmp_path):
    found = []
    for load in ("auto", "whole"):
        config = settings(folder)
        config = replace(
            config, hook=HookConfig(points=["blocks.0.hook_resid_post"]), extract=replace(config.extract, load=load)
        )
        (tmp_path / load).mkdir()
        with CaptureProcess(config, tmp_path / load) as process:
            process.follow(range(3))
            rows = [process.take() for _ in range(3)]
            stored = [row.stored_nD.tobytes() for row in rows]
            found.append((process.header.model, process.header.calibration.as_dict(), stored))
    assert found[0] == found[1]
    assert min(map(len, found[0][2])) > 0


def test_windows_the_model_cannot_take_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="context_tokens=1024 is more than the 512"):
        CaptureProcess(settings(folder, context_tokens=1024), tmp_path)


def test_a_killed_child_is_named_and_nothing_hangs(folder, tmp_path):
    with CaptureProcess(settings(folder), tmp_path) as process:
        batches = StreamBatches(process, batch_rows=64, seed=0, buffer_rows=500)
        batches.next()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(LlamaError, match="the capture process died: SIGKILL"):
            all(len(batches.next()) for _ in range(1000))


PARENT = """
import sys, time
from pathlib import Path
from pipeline.stream.process import CaptureProcess
from tests.stream.conftest import settings
process = CaptureProcess(settings(Path(sys.argv[1])), Path(sys.argv[1]))
process.follow(range(1000))
process.take()
sys.stdout.write(f"{process.pid}\\n")
sys.stdout.flush()
time.sleep(60)
"""


@linux
def test_the_child_dies_with_its_parent(folder):
    command = [sys.executable, "-c", PARENT, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as parent:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10
        while alive(child):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def peak_bytes(pid):
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


def memory_of(folder, run):
    """Peak of the child, growth of this process and rows, when all rows of a corpus were taken once."""
    run.mkdir()
    config = settings(folder)
    with CaptureProcess(replace(config, extract=replace(config.extract, batch_tokens=1000)), run) as process:
        batches = StreamBatches(process, batch_rows=256, seed=0, buffer_rows=2000)
        batches.next()
        before = peak_bytes(os.getpid())
        for _ in range(process.header.unflagged_rows // 256):
            batches.next()
        return peak_bytes(process.pid), peak_bytes(os.getpid()) - before, process.header.unflagged_rows


@linux
def test_memory_does_not_grow_with_the_rows(folder, tmp_path):
    peaks = {}
    for name, repeats in (("once", 50), ("often", 600)):
        (tmp_path / name).mkdir()
        os.link(folder / "tiny.gguf", tmp_path / name / "tiny.gguf")
        for number in range(4):
            (tmp_path / name / f"{number}.txt").write_text(TEXT.format(number) * repeats)
        peaks[name] = memory_of(tmp_path / name, tmp_path / f"run-{name}")
    rows = peaks["often"][2]
    assert rows > 10 * peaks["once"][2]
    row_bytes = 2 * 64  # float16
    assert peaks["often"][1] < rows * row_bytes / 4
    assert peaks["often"][0] - peaks["once"][0] < rows * row_bytes / 2
