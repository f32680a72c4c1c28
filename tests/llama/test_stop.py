"""Early stop, exceptions in hooks, and calls that must be refused: nothing stale is ever handed out."""

from __future__ import annotations

import ctypes
import sys
import threading

import numpy as np
import pytest

from pipeline.llama import native
from pipeline.llama.callback import DecodePlan
from pipeline.llama.hooks import HookPoint
from pipeline.llama.session import Hook, Session, capture
from pipeline.llama.symbols import GgmlTensor
from sae.errors import ConfigError, HookError, LlamaError, ShapeError
from tests.llama.support import collect, exact, flat, points, sequences, tiny

BATCH = flat(sequences())
POINT = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True, params=["compiled", "python"])
def asking(request, monkeypatch):
    """Both ways of asking: through the compiled filter, and Python about every node."""
    assert native.ask_function() is not None
    if request.param == "python":
        monkeypatch.setattr(native, "ask_function", lambda: None)
    return request.param


def asked(session: Session, **options) -> int:
    """How often llama.cpp asks for a node during a decode."""
    count, ask = [0], session._callback._ask

    def counting(address):
        count[0] += 1
        return ask(address)

    session._callback._ask = counting
    session.decode(*BATCH, **options)
    session._callback._ask = ask
    return count[0]


@pytest.mark.parametrize("n_ubatch", [512, 16])
def test_reads_before_an_early_stop_equal_those_of_the_full_run(n_ubatch):
    with exact(n_ubatch=n_ubatch) as session:
        for point in (POINT, "blocks.0.attn.hook_q", "blocks.3.hook_attn_out"):
            full, stopped = (
                capture(session, sequences(), [HookPoint.parse(point)], stop_early=stop) for stop in (False, True)
            )
            for a, b in zip(full, stopped, strict=True):
                assert np.array_equal(a[point], b[point])


@pytest.mark.parametrize("n_ubatch", [512, 16])
def test_early_stop_gives_no_logits_and_clears_the_kv(n_ubatch):
    with exact(n_ubatch=n_ubatch) as session:
        expected = session.decode(*BATCH, logits="all")
        session.clear()
        hook, rows = collect(POINT)
        assert session.decode(*BATCH, hooks=[hook], logits="all", stop_early=True) is None
        assert len(rows) == len(BATCH[0])
        assert not session.n_past.any()
        assert np.array_equal(session.decode(*BATCH, logits="all"), expected)


def test_early_stop_runs_each_pass_only_as_far_as_the_deepest_hook(asking):
    with exact(n_ubatch=16) as session:
        passes = -(-len(BATCH[0]) // 16)
        nodes = len(session.graph.nodes)
        deepest = session.graph.find(HookPoint.parse(POINT)).index
        full = asked(session, hooks=[collect(POINT)[0]])
        session.clear()
        stopped = asked(session, hooks=[collect(POINT)[0], collect("blocks.0.hook_mlp_out")[0]], stop_early=True)
    if asking == "python":
        assert full == passes * nodes
        assert stopped == passes * (deepest + 1)
    else:  # the first node, those named like the one that reads the positions (3), the hooks, every 64th node
        assert passes * 3 <= full <= passes * 5 + passes * nodes // native.PYTHON_EVERY
        assert passes * 3 <= stopped <= passes * 6 + passes * (deepest + 1) // native.PYTHON_EVERY


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("n_ubatch", [512, 16])
def test_an_exception_in_a_hook_comes_out_as_raised_and_the_session_goes_on(error, n_ubatch):
    calls = []

    def read(rows):
        calls.append(rows.index_N[0])
        raise error

    with exact(n_ubatch=n_ubatch) as session:
        expected = session.decode(*BATCH, logits="all")
        session.clear()
        interval = sys.getswitchinterval()
        with pytest.raises(type(error)) as caught:
            session.decode(*BATCH, hooks=[Hook(HookPoint.parse(POINT), read=read)], logits="all")
        assert caught.value is error
        assert calls == [0]  # not called again for the passes after
        assert not session.n_past.any()
        assert sys.getswitchinterval() == interval
        assert np.array_equal(session.decode(*BATCH, logits="all"), expected)


def test_the_switch_interval_is_small_during_a_hooked_decode_only():
    seen = []
    before = sys.getswitchinterval()
    hook = Hook(HookPoint.parse(POINT), read=lambda rows: seen.append(sys.getswitchinterval()))
    with exact() as session:
        session.decode(*BATCH, hooks=[hook])
    assert seen == [pytest.approx(1e-5)]
    assert sys.getswitchinterval() == before


def test_a_busy_python_thread_does_not_change_what_is_captured():
    stop = threading.Event()

    def burn():
        while not stop.is_set():
            sum(range(1000))

    with exact() as session:
        chosen = points(session)
        quiet = capture(session, sequences(), chosen)
        thread = threading.Thread(target=burn)
        thread.start()
        try:
            busy = capture(session, sequences(), chosen)
        finally:
            stop.set()
            thread.join()
    for a, b in zip(quiet, busy, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("point", ["blocks.3.hook_resid_post", "blocks.3.hook_mlp_out", "ln_final.hook_normalized"])
def test_rows_that_exist_only_with_logits_are_an_error_without(point):
    with exact() as session:
        with pytest.raises(LlamaError, match="pass logits='all' or 'last'"):
            session.decode(*BATCH, hooks=[collect(point)[0]])
        hook, rows = collect(point)
        session.decode(*BATCH, hooks=[hook], logits="last")
        assert set(rows) == {(s, len(tokens) - 1) for s, tokens in enumerate(sequences())}


def test_a_last_block_hook_sees_its_rows_when_only_some_passes_have_any():
    with exact(n_seq_max=1, n_ubatch=8) as session:
        hook, rows = collect("blocks.3.hook_resid_post")
        session.decode(BATCH[0][:17], np.zeros(17, int), np.arange(17), hooks=[hook], logits="last")
    assert set(rows) == {(0, 16)}


def test_a_point_that_does_not_exist_is_refused_with_those_that_do():
    with exact() as session:
        for name, message in {
            "blocks.4.hook_resid_post": r"no hook point 'blocks.4.hook_resid_post'; .*blocks 0\.\.3.*hook_resid_pre",
            "ggml:l_out-40": r"no tensor 'l_out-40' .*l_out-0",
        }.items():
            with pytest.raises(HookError, match=message):
                session.decode(*BATCH, hooks=[collect(name)[0]])
    with exact(flash_attn="on") as session, pytest.raises(HookError, match="flash_attn=off"):
        session.decode(*BATCH, hooks=[collect("blocks.0.attn.hook_pattern")[0]])


def test_a_tensor_that_has_no_row_per_token_is_refused():
    with exact() as session, pytest.raises(LlamaError, match="no row for each of 86 tokens"):
        session.decode(*BATCH, hooks=[collect("ggml:kq-0")[0]])
    with exact(kv_type="f16") as session, pytest.raises(LlamaError, match="f16 values; only F32"):
        session.decode(*BATCH, hooks=[collect("ggml:cache_k_l0 (view)#0")[0]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], [], []), ShapeError, "expected 1 to 512"),
        (([1, 2], [0], [0]), ShapeError, "not as many"),
        (([1.5], [0], [0]), ShapeError, "integers"),
        (([512], [0], [0]), ShapeError, "vocabulary of 512"),
        (([-1], [0], [0]), ShapeError, "vocabulary of 512"),
        (([1], [5], [0]), ShapeError, r"0\.\.4"),
        (([1], [0], [3]), ShapeError, "consecutive ones from 0 on"),
        (([1, 1], [0, 0], [1, 0]), ShapeError, "consecutive"),
        ((np.ones(513, int), np.zeros(513, int), np.arange(513)), ShapeError, "expected 1 to 512"),
    ],
)
def test_arrays_that_llama_would_abort_on_are_refused(arguments, error, message):
    with exact() as session, pytest.raises(error, match=message):
        session.decode(*arguments)


def test_a_full_context_is_refused_before_anything_is_computed():
    with exact(n_ctx=256, n_batch=200) as session:
        session.decode(np.ones(200, int), np.zeros(200, int), np.arange(200))
        with pytest.raises(LlamaError, match="would have 300 tokens together, the context holds 256"):
            session.decode(np.ones(100, int), np.ones(100, int), np.arange(100))
        with pytest.raises(LlamaError, match="sequence 0 would have 300 tokens"):
            session.decode(np.ones(100, int), np.zeros(100, int), np.arange(200, 300))
        assert session.decode(np.ones(56, int), np.ones(56, int), np.arange(56), logits="last").shape == (1, 512)


def test_settings_that_do_not_exist_name_those_that_do():
    model = tiny()[0]
    for options, message in {
        ("kv_type", "q4"): "expected f32, f16",
        ("flash_attn", "yes"): "expected auto, off, on",
        ("n_seq_max", 0): "expected 1 to 256",
        ("n_ctx", 0): "n_ctx=0",
    }.items():
        with pytest.raises(ConfigError, match=message):
            Session(model, **({"n_ctx": 64} | dict([options])))
    with exact() as session, pytest.raises(ConfigError, match="none, last or all"):
        session.decode([0], [0], [0], logits="some")


def test_a_closed_session_says_so():
    session = exact()
    session.close()
    session.close()
    with pytest.raises(LlamaError, match="the session is closed"):
        session.decode([0], [0], [0])


def test_every_later_part_of_the_graph_is_refused_after_a_stop_until_the_next_pass():
    """On several devices a pass has several parts; the CPU has one, so the callback is driven by hand here."""
    with exact() as session:
        callback, target = session._callback, session.graph.find(HookPoint.parse(POINT))
        tensors = [(GgmlTensor * 1)() for _ in range(2)]
        for tensor, name in zip(tensors, (b"l_out-2", session.graph.first.encode()), strict=True):
            tensor[0].name = name
        later, first = (ctypes.addressof(tensor) for tensor in tensors)
        piece = np.arange(3)
        plan = DecodePlan(
            piece, piece * 0, piece, piece * 0, [piece, piece], {target: [collect(POINT)[0]]}, stop_early=True
        )
        callback.arm(plan, session.graph)
        assert callback._entry(first, True, None) is False  # a pass begins
        assert callback._entry(later, True, None) is False  # not hooked: computed, not handed over
        callback._stopped = True
        assert callback._entry(later, True, None) is True  # the next part's first node is taken ...
        assert callback._entry(later, False, None) is False  # ... and refused
        assert callback._entry(first, True, None) is False  # the next pass runs again
        assert callback._entry(later, True, None) is False
        callback.error = ValueError()
        assert callback._entry(first, True, None) is True  # after an exception no pass does
        assert callback._entry(first, False, None) is False
        callback.abandon()
        session.clear()
