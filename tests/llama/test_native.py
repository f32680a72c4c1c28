"""The compiled filter in front of the callback: the same values, far fewer questions, and nothing lost without a compiler."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from pipeline.llama import native
from pipeline.llama.session import Session, capture
from tests.llama.support import exact, points, sequences, tiny


@pytest.mark.parametrize("n_ubatch", [512, 16])
def test_every_value_is_the_same_with_and_without_the_filter(monkeypatch, n_ubatch):
    with exact(n_ubatch=n_ubatch) as session:
        compiled = capture(session, sequences(), points(session), stop_early=False)
    monkeypatch.setattr(native, "ask_function", lambda: None)
    with exact(n_ubatch=n_ubatch) as session:
        plain = capture(session, sequences(), points(session), stop_early=False)
    for mine, theirs in zip(compiled, plain, strict=True):
        assert set(mine) == set(theirs)
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_python_is_asked_about_the_watched_nodes_and_a_few_more(monkeypatch):
    def asked():
        with exact() as session:
            chosen = [point for point in points(session) if str(point) == "blocks.2.hook_resid_post"]
            calls, entry = [0], session._callback._ask

            def counting(address):
                calls[0] += 1
                return entry(address)

            session._callback._ask = counting
            capture(session, sequences()[:1], chosen, stop_early=False)
            return calls[0], len(session.graph.nodes)

    few, nodes = asked()
    monkeypatch.setattr(native, "ask_function", lambda: None)
    every, _ = asked()
    assert every == nodes
    assert few <= 5 + nodes // native.PYTHON_EVERY  # the first, three named alike that tell positions, the hook


def test_more_names_than_the_filter_holds_are_all_asked_about():
    watched = native.AskFilter(lambda_callback())
    assert watched.watch(b"node_%d" % i for i in range(native.MAX_NAMES))
    assert watched.count == native.MAX_NAMES
    assert not watched.watch(b"node_%d" % i for i in range(native.MAX_NAMES + 1))


def lambda_callback():
    from pipeline.llama.symbols import lc

    return lc.ggml_backend_sched_eval_callback(lambda address, ask, data: False)


def test_without_a_compiler_there_is_no_filter_and_capture_works(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(native, "ask_function", native.ask_function.__wrapped__)
    assert native.ask_function() is None
    with Session(tiny()[0], n_ctx=64, n_threads=1) as session:
        assert session._callback.user_data is None
        (values,) = capture(session, sequences()[:1], points(session))
    assert values["blocks.1.hook_resid_post"].shape == (17, 64)


def test_the_filter_is_built_once_into_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = native._built()
    assert built is not None
    stamp = built.stat().st_mtime_ns
    assert native._built() == built
    assert built.stat().st_mtime_ns == stamp
    assert [path.name for path in built.parent.iterdir()] == [built.name]


def test_without_a_home_folder_there_is_no_filter_and_no_error(tmp_path):
    code = (
        "import os; os.environ.pop('HOME', None); os.environ.pop('XDG_CACHE_HOME', None)\n"
        "import pathlib\n"
        "def none(cls): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = classmethod(none)\n"
        "from pipeline.llama import native\n"
        "assert native.ask_function() is None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
