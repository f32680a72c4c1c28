"""What the clock of a training counts."""

from __future__ import annotations

import pytest

from sae import clock
from sae.clock import Clock


def test_seconds_are_those_between_start_and_stop_taken_or_not(monkeypatch):
    now = iter([0.0, 2.0, 10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    found = Clock()
    found.start()
    found.stop()
    assert found.take() == (2.0, 0.0)
    found.start()
    found.stop()
    assert found.seconds == pytest.approx(5.0)  # logs and checkpoints between 2 and 10 are not training
    assert found.take() == (3.0, 0.0)
    found.start()
    found.stop()
    assert found.seconds == pytest.approx(9.0)
