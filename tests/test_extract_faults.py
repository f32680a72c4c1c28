"""What a capture does when it is interrupted or killed, when values overflow or are not finite, when the disk is full."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from pipeline.corpus.windows import (
    FLAG_NOT_FINITE,
    FLAGS_ALL,
)
from pipeline.extract import Estimate
from pipeline.llama.model import Model
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import invalidate
from sae.errors import LlamaError, StoreError
from tests.extracting import DOCUMENTS, POINTS, run
from tests.store.helpers import files_of
from tests.tiny_llama import write_tiny_llama


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_llama(path)
    return path


@pytest.fixture(scope="module")
def model(model_path):
    with Model(model_path) as model:
        yield model


def test_an_interrupted_run_keeps_its_shards_and_a_resumed_one_ends_byte_identical(model, tmp_path):
    run(model, tmp_path / "straight")

    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "broken", progress=interrupt)
    assert ActivationStore(tmp_path / "broken").n_rows > 0
    assert not ActivationStore(tmp_path / "broken").complete
    _, summary = run(model, tmp_path / "broken")
    assert summary["shards_skipped"] > 0
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "straight")


def test_shards_taken_back_are_captured_again_to_the_same_bytes(model, tmp_path):
    _, summary = run(model, tmp_path)
    whole = files_of(tmp_path)
    for shard in (1, 2, 4):
        (tmp_path / f"hooks/{POINTS[0]}/acts/c/{shard}/0").write_bytes(b"damaged")
        invalidate(tmp_path, shard)
    _, again = run(model, tmp_path)
    assert (again["shards_done"], again["shards_skipped"]) == (3, summary["shards_done"] - 3)
    assert files_of(tmp_path) == whole


def test_a_plan_that_does_not_fit_the_disk_is_refused_with_the_numbers_before_anything_is_written(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.store.backends.LocalBackend.free_bytes", lambda _backend: 1000)
    with pytest.raises(StoreError, match=r"too full: 0\.\d\d GB needed, 0\.00 GB free; .*lower corpus.max_tokens"):
        run(model, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_too_little_room_is_never_said_to_be_enough(tmp_path):
    plan = Estimate(
        rows=1, rows_missing=1, shards_missing=1, bytes_missing=9_800_000, free_bytes=9_500_000, tokens_per_s=1
    )
    with pytest.raises(StoreError, match=r"0\.01 GB needed, 0\.00 GB free"):
        plan.check(tmp_path)


def edited_model(source, target, edit):
    """A copy of a GGUF whose token embeddings (V, D) were changed in place."""
    target.write_bytes(source.read_bytes())
    reader = gguf.GGUFReader(target, "r+")
    tensor = next(t for t in reader.tensors if t.name == "token_embd.weight")
    edit(tensor.data)
    tensor.data.base.flush() if isinstance(tensor.data.base, np.memmap) else reader.data.flush()
    return target


def rare_token(model):
    """A token of the last document that no other document has."""
    seen = [set(model.tokenize(d.text.encode()).tolist()) for d in DOCUMENTS]
    return sorted(seen[-1] - set().union(*seen[:-1]))[0]


def test_large_activations_choose_bfloat16_and_float16_is_refused(model, model_path, tmp_path):
    def scale(table_VD):
        table_VD *= 1e5

    with Model(edited_model(model_path, tmp_path / "large.gguf", scale)) as large:
        _, summary = run(large, tmp_path / "auto", dtype="auto")
        assert summary["dtype"] == "bfloat16, float16"  # the residual stream is large, mlp_out comes after a norm
        with pytest.raises(StoreError, match=r"more than float16 holds.*document '.*set extract.dtype=bfloat16"):
            run(large, tmp_path / "half", dtype="float16")
    _, summary = run(model, tmp_path / "plain", dtype="auto")
    assert summary["dtype"] == "float16"


def test_an_overflow_after_calibration_raises_and_names_the_document(model, model_path, tmp_path):
    token = rare_token(model)

    def spike(table_VD):
        table_VD[token] *= 1e6

    documents = [*DOCUMENTS[:3] * 4, DOCUMENTS[3], *DOCUMENTS[:3] * 4]
    with (
        Model(edited_model(model_path, tmp_path / "spike.gguf", spike)) as spiked,
        pytest.raises(StoreError, match=r"more than float16 holds.*document 'more.py'"),
    ):
        run(spiked, tmp_path / "store", documents=documents, calibration_tokens=1)
    assert ActivationStore(tmp_path / "store").n_rows > 0


def test_rows_that_are_not_finite_are_named_counted_and_flagged_and_the_rest_is_kept(model, model_path, tmp_path):
    token = rare_token(model)

    def poison(table_VD):
        table_VD[token] = np.nan

    run(model, tmp_path / "clean", dtype="float32")
    with Model(edited_model(model_path, tmp_path / "nan.gguf", poison)) as poisoned:
        table, summary = run(poisoned, tmp_path / "store", dtype="float32")
    clean, store = ActivationStore(tmp_path / "clean"), ActivationStore(tmp_path / "store")
    spoiled = np.unique(table.window_N[table.token_N == token])
    flagged_N = store.column("flags") & FLAG_NOT_FINITE > 0
    assert set(np.unique(table.window_N[flagged_N])) == set(spoiled)
    assert flagged_N[table.token_N == token].all()
    assert summary["not_finite_rows"] == flagged_N.sum() > 0
    assert summary["not_finite"][0] == ("more.py", spoiled[0])
    for point in POINTS:  # its neighbours in the batch are innocent and hold what they hold without it
        mine, theirs = store.rows(point, 0, table.rows), clean.rows(point, 0, table.rows)
        innocent = ~np.isin(table.window_N, spoiled)
        assert np.linalg.norm(mine[innocent] - theirs[innocent]) < 1e-5 * np.linalg.norm(theirs[innocent])
        assert np.isfinite(mine).all()
        assert store.stats(point).count == (store.column("flags") & FLAGS_ALL == 0).sum()
    before = files_of(tmp_path / "store")
    invalidate(tmp_path / "store", 5)
    with Model(tmp_path / "nan.gguf") as poisoned:
        run(poisoned, tmp_path / "store", dtype="float32")
    assert files_of(tmp_path / "store") == before


def test_a_model_without_a_finite_value_is_refused(model_path, tmp_path):
    def poison(table_VD):
        table_VD[:] = np.nan

    with (
        Model(edited_model(model_path, tmp_path / "nan.gguf", poison)) as poisoned,
        pytest.raises(LlamaError, match=r"not finite at blocks.*in all of the \d+ rows tried .*document '"),
    ):
        run(poisoned, tmp_path / "store")
    assert not (tmp_path / "store").exists()


CHILD = """
import sys
from pathlib import Path
from pipeline.config import CorpusConfig, ExtractConfig, ModelConfig, StoreConfig
from pipeline.corpus.readers import read_documents
from pipeline.corpus.windows import windows
from pipeline.extract import Estimate, extract, plan_extraction
from pipeline.extract import Estimate
from pipeline.llama.model import Model

def progress(done, total):
    sys.stdout.write(f"{done}\\n")
    sys.stdout.flush()

with Model(sys.argv[1]) as model:
    table = windows(model, read_documents(CorpusConfig(max_documents=40)), 64, 6000)
    config = ExtractConfig(batch_tokens=200, ubatch_tokens=64, calibration_tokens=1000)
    plan = plan_extraction(model, table, sys.argv[3:], extract=config, store=StoreConfig(shard_rows=512))
    extract(model, table, plan, config=config, model_config=ModelConfig(n_threads=1), store_path=Path(sys.argv[2]),
            progress=progress)
assert "torch" not in sys.modules
"""


def child(model_path, store, **options):
    command = [sys.executable, "-c", CHILD, str(model_path), str(store), *POINTS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], text=True, **options)


def kill_at_random_moments(model_path, folder, kills):
    """SIGKILL real runs; every store that reaches its end must hold the bytes of the undisturbed one."""
    started = time.monotonic()
    with child(model_path, folder / "straight") as straight:
        straight.stdout.readline()
        first_row = time.monotonic()
        straight.stdout.read()
    assert straight.returncode == 0
    whole, running = files_of(folder / "straight"), time.monotonic() - first_row
    rng = np.random.default_rng(int(started * 1000) % 2**32)
    killed = finished = 0
    resumed_from: set[int] = set()
    while killed < kills or not finished:
        store = folder / f"broken{finished}"
        with child(model_path, store) as broken:
            if killed < kills and rng.random() < 0.2:
                time.sleep(rng.uniform(0.2, 1.5))  # before the first row: while the store is made or calibrated
            else:
                resumed_from.add(int(broken.stdout.readline() or 0))
                time.sleep(rng.uniform(0, running / 2) if killed < kills else 0)
            if killed < kills and broken.poll() is None:
                broken.send_signal(signal.SIGKILL)
                killed += 1
            broken.stdout.read()
        if broken.returncode == 0:
            assert files_of(store) == whole
            finished += 1
        else:
            assert broken.returncode == -signal.SIGKILL
    assert ActivationStore(folder / "straight").verify() == []
    return resumed_from


def test_runs_killed_at_random_moments_end_with_the_bytes_of_an_undisturbed_one(model_path, tmp_path):
    kill_at_random_moments(model_path, tmp_path, 5)


@pytest.mark.long
def test_fifty_kills_at_random_moments_leave_no_trace(model_path, tmp_path):
    resumed_from = kill_at_random_moments(model_path, tmp_path, 50)
    assert len(resumed_from) > 5  # runs did go on from different shards
