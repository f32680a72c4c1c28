"""Ctrl-C before a command has begun."""

from __future__ import annotations

import signal

import pytest

from pipeline import cli, start


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def during(monkeypatch):
    """The handlers that `main` finds, and finds after `interruptible`."""
    found = []

    def main():
        found.append(signal.getsignal(signal.SIGINT))
        start.interruptible()
        found.append(signal.getsignal(signal.SIGINT))
        return 7

    monkeypatch.setattr(cli, "main", main)
    assert start.main() == 7
    return found


def test_it_ends_the_process_until_there_is_something_to_end_in_order(monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert during(monkeypatch) == [signal.SIG_DFL, signal.default_int_handler]


def test_where_it_is_ignored_it_stays_so(monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert during(monkeypatch) == [signal.SIG_IGN, signal.SIG_IGN]
