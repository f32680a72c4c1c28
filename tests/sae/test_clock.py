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


def test_the_first_wait_is_left_out_of_the_share_of_waiting_and_of_the_time_it_is_a_share_of(monkeypatch):
    now = iter([0.0, 0.0, 6.0, 6.0, 7.0, 10.0, 10.0, 12.0, 15.0, 20.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    found = Clock()
    found.start()
    for _ in range(2):  # 0 to 6, 6 to 7
        with found.waiting():
            pass
    found.stop()
    assert found.wait_share == pytest.approx(1 / 4)
    assert found.take() == (10.0, 7.0)
    found.start()
    with found.waiting():  # 12 to 15
        pass
    found.stop()
    assert found.wait_share == pytest.approx((1 + 3) / (4 + 10))
    assert found.take() == (10.0, 3.0)


def test_before_anything_ran_nothing_was_waited_for():
    assert Clock().wait_share == 0
