"""Capture into a store: the right rows, the same bytes after any kill, and plain words when it cannot go on."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from pipeline.config import CorpusConfig, ExtractConfig, ModelConfig, StoreConfig
from pipeline.corpus.readers import Document, ReadReport, read_documents
from pipeline.corpus.windows import (
    FLAG_BOS,
    FLAG_FIRST,
    FLAG_NOT_FINITE,
    FLAG_OUTLIER,
    FLAG_SPECIAL,
    FLAGS_ALL,
    windows,
)
from pipeline.extract import estimate, extract, hook_widths, plan_extraction
from pipeline.llama.halves import to_float16
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Session, capture
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import invalidate
from sae.errors import ConfigError, HookError, LlamaError, StoreError
from tests.store.helpers import files_of
from tests.tiny_llama import write_tiny_llama

POINTS = ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"]
EXACT = ModelConfig(n_threads=1, kv_type="f32", flash_attn="off")
DOCUMENTS = [
    Document(name="long.py", text="def walk(tree):\n    return [node for node in tree]\n" * 9),
    Document(name="short.py", text="x = 1\n"),
    Document(name="odd.txt", text="Grüße, 世界 🙂 <|bos|> <|eos|>\r\n\ttail"),
    Document(name="more.py", text="import argparse\nparser = argparse.ArgumentParser()\n" * 5),
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_llama(path)
    return path


@pytest.fixture(scope="module")
def model(model_path):
    with Model(model_path) as model:
        yield model


def run(model, path, *, documents=DOCUMENTS, points=POINTS, model_config=EXACT, progress=None, shard_rows=64, **config):
    settings = ExtractConfig(**{"batch_tokens": 100, "ubatch_tokens": 32, "calibration_tokens": 200, **config})
    table = windows(model, documents, 24)
    plan = plan_extraction(model, table, points, extract=settings, store=StoreConfig(shard_rows=shard_rows))
    summary = extract(
        model, table, plan, config=settings, model_config=model_config, store_path=path, progress=progress
    )
    return table, summary


def test_every_row_is_the_models_own_value_for_its_token_and_place(model, tmp_path):
    points = [*POINTS, "blocks.3.hook_resid_post", "blocks.0.attn.hook_z"]  # the last block too
    table, summary = run(model, tmp_path, points=points, dtype="float32")
    store = ActivationStore(tmp_path)
    assert summary["rows"] == summary["rows_captured"] == store.n_rows == table.rows
    assert summary["dtype"] == "float32"
    for name in ("doc", "window", "pos", "token", "byte_offset"):
        np.testing.assert_array_equal(store.column(name), table.columns()[name])
    with Session(model, n_ctx=32, kv_type="f32", flash_attn="off", n_threads=1) as session:
        for window in range(table.n_windows):
            alone = capture(session, [table.window_tokens(window)], [HookPoint.parse(p) for p in points])[0]
            for point in points:
                stored = store.rows(point, table.window_starts[window], table.window_starts[window + 1])
                error = np.linalg.norm(stored - alone[point]) / np.linalg.norm(alone[point])
                assert error < 1e-5, (window, point, error)


def test_the_text_of_every_document_can_be_rebuilt_from_the_store(model, tmp_path):
    run(model, tmp_path)
    store = ActivationStore(tmp_path)
    for index, document in enumerate(DOCUMENTS):
        here = (store.column("doc") == index) & (store.column("flags") & FLAG_BOS == 0)
        pieces = [model.piece(token) for token in store.column("token")[here].tolist()]
        assert b"".join(pieces).decode() == document.text
        ends = np.cumsum([len(piece) for piece in pieces])
        np.testing.assert_array_equal(store.column("byte_offset")[here], [0, *ends[:-1]])
        assert store.documents[index]["name"] == document.name
        assert store.documents[index]["exact_offsets"]


def test_bos_rows_are_flagged_and_spelled_out_specials_are_text(model, tmp_path):
    table, _ = run(model, tmp_path)
    flags = ActivationStore(tmp_path).column("flags") & (FLAGS_ALL ^ FLAG_OUTLIER)
    expected = np.where(table.pos_N == 0, FLAG_BOS | FLAG_SPECIAL | FLAG_FIRST, 0)
    np.testing.assert_array_equal(flags, expected)


def test_outliers_are_the_rows_above_the_stored_thresholds_at_any_hook(model, tmp_path):
    table, summary = run(model, tmp_path, dtype="float32", outlier_factor=1.1, calibration_tokens=10**6)
    store = ActivationStore(tmp_path)
    outlier = np.zeros(table.rows, bool)
    for name, hook in store.hooks.items():
        norm = np.linalg.norm(store.rows(name, 0, table.rows).astype(np.float64), axis=1)
        np.testing.assert_allclose(hook.outlier_threshold, 1.1 * np.median(norm[table.flags_N == 0]), rtol=1e-9)
        outlier |= norm > hook.outlier_threshold
    flagged = store.column("flags") & FLAG_OUTLIER > 0
    assert 0 < flagged.sum() < table.rows
    np.testing.assert_array_equal(flagged, outlier)
    np.testing.assert_allclose(summary["flagged_share"], (outlier | (table.flags_N > 0)).mean())


def test_a_second_run_has_nothing_to_do_and_progress_counts_every_row(model, tmp_path):
    calls = []
    table, first = run(model, tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (0, table.rows)
    assert calls[-1] == (table.rows, table.rows)
    assert calls == sorted(calls)
    before = files_of(tmp_path)
    _, second = run(model, tmp_path)
    assert (first["shards_skipped"], second["shards_done"]) == (0, 0)
    assert second["shards_skipped"] == first["shards_done"] > 3
    assert second["rows_captured"] == 0
    assert files_of(tmp_path) == before


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


def test_a_store_of_another_model_corpus_or_setting_is_refused_with_the_difference(model, model_path, tmp_path):
    run(model, tmp_path / "store")
    before = files_of(tmp_path / "store")
    other_path = tmp_path / "other.gguf"
    write_tiny_llama(other_path, seed=1)
    with Model(other_path) as other, pytest.raises(StoreError, match=r"model\.sha256"):
        run(other, tmp_path / "store")
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(model_path.read_bytes())
    with Model(renamed) as same:
        run(same, tmp_path / "store")
    for change, named in (
        ({"documents": DOCUMENTS[:3]}, "corpus_hash"),
        ({"batch_tokens": 50}, r"config\.batch_tokens: 100, not 50"),
        ({"outlier_factor": 3.0}, r"config\.outlier_factor: 10.0, not 3.0"),
        ({"dtype": "float32"}, r"config\.dtype: auto, not float32"),
        ({"points": POINTS[:1]}, r"hooks\.1\.name: blocks\.2\.hook_mlp_out, not absent"),
        ({"model_config": replace(EXACT, kv_type="f16")}, r"config\.kv_type: f32, not f16"),
    ):
        with pytest.raises(StoreError, match="other settings") as caught:
            run(model, tmp_path / "store", **change)
        assert re.search(named, str(caught.value))
    assert files_of(tmp_path / "store") == before


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


def test_the_last_block_is_captured_in_parts_whose_logits_fit_and_gives_the_same_rows(model, tmp_path, monkeypatch):
    points = ["blocks.3.hook_resid_post", "blocks.1.hook_resid_post"]
    table, _ = run(model, tmp_path / "whole", points=points, dtype="float32")
    decoded = []
    whole = Session.decode

    def counted(self, tokens_N, *args, **options):
        decoded.append(len(tokens_N))
        return whole(self, tokens_N, *args, **options)

    monkeypatch.setattr(Session, "decode", counted)
    monkeypatch.setattr("pipeline.capture.capturer.LOGIT_BYTES", 4 * model.n_vocab * 50)
    run(model, tmp_path / "parts", points=points, dtype="float32")
    assert max(decoded) <= 50
    a, b = (ActivationStore(tmp_path / name) for name in ("whole", "parts"))
    for point in points:
        mine, theirs = a.rows(point, 0, table.rows), b.rows(point, 0, table.rows)
        assert np.linalg.norm(mine - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("points", [["blocks.0.hook_resid_post", "blocks.3.hook_resid_pre"]])
def test_layer_inputs_give_the_store_of_the_callback(model, tmp_path, points):
    for backend in ("callback", "layer_inp"):
        run(model, tmp_path / backend, points=points, backend=backend)
    assert files_of(tmp_path / "callback") == files_of(tmp_path / "layer_inp")
    with pytest.raises(HookError, match=r"not the input of a block.*extract\.backend=callback"):
        run(model, tmp_path / "other", backend="layer_inp")


def test_the_plan_says_what_a_capture_will_cost_and_what_is_left_of_it(model, tmp_path):
    settings, layout = ExtractConfig(batch_tokens=100, ubatch_tokens=32), StoreConfig(shard_rows=64)
    table = windows(model, DOCUMENTS, 24)
    plan = plan_extraction(model, table, POINTS, extract=settings, store=layout)
    arguments = {"config": settings, "model_config": EXACT, "store_path": tmp_path / "store"}
    cost = estimate(model, table, plan, **arguments)
    assert not (tmp_path / "store").exists()
    assert cost.rows == cost.rows_missing == table.rows
    assert cost.shards_missing == plan.n_shards
    assert cost.seconds == pytest.approx(table.rows / cost.tokens_per_s)
    seen = []
    extract(model, table, plan, **arguments, planned=seen.append)
    written = sum(f.stat().st_size for f in (tmp_path / "store").rglob("c/*/0") if "hooks" in f.parts)
    columns = sum(f.stat().st_size for f in (tmp_path / "store").glob("columns/*/c/*"))
    assert seen[0].bytes_missing == cost.bytes_missing == written + columns
    invalidate(tmp_path / "store", 2)
    left = estimate(model, table, plan, **arguments)
    assert (left.rows_missing, left.shards_missing) == (64, 1)


def test_a_plan_that_does_not_fit_the_disk_is_refused_with_the_numbers_before_anything_is_written(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.store.backends.LocalBackend.free_bytes", lambda _backend: 1000)
    with pytest.raises(StoreError, match=r"too full: 0\.\d\d GB needed, 0\.00 GB free; .*lower corpus.max_tokens"):
        run(model, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_float16_is_what_numpy_rounds_to():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    ties = np.convolve(halves[np.isfinite(halves)].astype(np.float32), [0.5, 0.5], "valid")
    for x in (bits[~np.isnan(bits)], ties, ties * np.float32(1 + 2**-23), rng.standard_normal((7, 33), np.float32)):
        mine, overflow = to_float16(x)
        with np.errstate(over="ignore"):
            theirs = x.astype(np.float16)
        np.testing.assert_array_equal(mine.view(np.uint16), theirs.view(np.uint16))
        assert overflow == bool(np.isinf(theirs).any())


def test_hooks_and_windows_the_model_cannot_take_are_refused(model, tmp_path):
    with pytest.raises(HookError, match="cannot be stored"):
        hook_widths(model, ["blocks.0.attn.hook_pattern"])
    with pytest.raises(HookError, match=r"blocks 0\.\.3"):
        hook_widths(model, ["blocks.9.hook_resid_post"])
    assert hook_widths(model, ["blocks.0.attn.hook_k", "blocks.0.mlp.hook_post"]) == {
        "blocks.0.attn.hook_k": 32,
        "blocks.0.mlp.hook_post": 96,
    }
    with pytest.raises(HookError, match=r"'blocks\.3\.\.4\.hook_resid_post': block 4 has no such point"):
        hook_widths(model, ["blocks.3..4.hook_resid_post"])
    table = windows(model, DOCUMENTS, 1024)
    with pytest.raises(ConfigError, match="context_tokens=1024 is more than the 512"):
        plan_extraction(model, table, POINTS, extract=ExtractConfig(), store=StoreConfig())


def test_a_plan_names_every_point_that_a_wildcard_or_a_range_stands_for(model):
    table = windows(model, DOCUMENTS, 24)
    texts = ["blocks.*.hook_resid_post", "blocks.1..2.attn.hook_k", "ggml:l_out-*", "blocks.2.hook_resid_post"]
    plan = plan_extraction(model, table, texts, extract=ExtractConfig(), store=StoreConfig())
    expected = dict.fromkeys([f"blocks.{b}.hook_resid_post" for b in range(4)], 64)
    expected |= {"blocks.1.attn.hook_k": 32, "blocks.2.attn.hook_k": 32}
    assert list(plan.hooks.items()) == list((expected | {f"ggml:l_out-{b}": 64 for b in range(4)}).items())


def test_skipped_documents_are_in_the_summary(model, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "good.txt").write_text("good\n")
    report = ReadReport()
    config = CorpusConfig(kind="text", paths=[f"{tmp_path}/*.txt"], split="all")
    table = windows(model, read_documents(config, report), 16, report=report)
    settings = ExtractConfig(batch_tokens=64)
    plan = plan_extraction(model, table, POINTS, extract=settings, store=StoreConfig())
    summary = extract(model, table, plan, config=settings, model_config=EXACT, store_path=tmp_path / "store")
    assert summary["skipped_documents"] == [("bad.txt", "not UTF-8")]
    assert summary["documents"] == 1


def test_a_document_is_tokenised_as_a_whole_and_cut_at_megabytes_per_second(model):
    text = "".join(d.text for d in DOCUMENTS)
    documents = [Document(name=str(i), text=text * (1_000_000 // len(text.encode()))) for i in range(2)]
    started = time.process_time()
    table = windows(model, documents, 256)
    assert table.rows > 500_000
    assert time.process_time() - started < 10  # 2 MB; about 1 s on an idle core


CHILD = """
import sys
from pathlib import Path
from pipeline.config import CorpusConfig, ExtractConfig, ModelConfig, StoreConfig
from pipeline.corpus.readers import read_documents
from pipeline.corpus.windows import windows
from pipeline.extract import extract, plan_extraction
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
