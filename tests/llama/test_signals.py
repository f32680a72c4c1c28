"""A signal while llama.cpp computes: never lost inside a callback, whatever bytecode it strikes."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Hook, Session
from pipeline.llama.signals import deferred_signals
from tests.tiny_llama import write_tiny_llama


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    path = tmp_path_factory.mktemp("signals") / "tiny.gguf"
    write_tiny_llama(path)
    with Model(path) as model, Session(model, n_ctx=512, n_threads=1) as session:
        yield session


def decode(session, hooks):
    tokens = np.arange(3, 3 + 256) % session.model.n_vocab
    session.clear()
    return session.decode(tokens, np.zeros(256, int), np.arange(256), hooks=hooks, logits="last")


def test_ctrl_c_at_any_moment_of_a_decode_comes_out_as_keyboard_interrupt(session):
    calm = decode(session, ())
    hook = Hook(point=HookPoint.parse("blocks.1.hook_resid_post"), read=lambda rows: None, edit=None)
    rng = np.random.default_rng(0)
    struck = 0
    for _ in range(60):
        timer = threading.Timer(float(rng.uniform(0, 0.02)), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()  # inside: a short timer strikes before it returns
            for _ in range(1000):
                decode(session, (hook,))
        except KeyboardInterrupt:
            struck += 1
        timer.join()
    assert struck == 60
    assert np.array_equal(decode(session, ()), calm)


def test_the_real_handler_runs_after_the_block_and_is_back_in_place():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with deferred_signals(lambda: seen.append("noted")):
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 5
            while not seen and time.monotonic() < deadline:
                time.sleep(0.001)
            assert seen == ["noted"]
        assert seen == ["noted", signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["noted", signal.SIGTERM, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
