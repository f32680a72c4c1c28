"""Capture into a store: the right rows, of the right texts, and plain words for what it cannot take."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import CorpusConfig, ExtractConfig, StoreConfig
from pipeline.corpus.readers import Document, ReadReport, read_documents
from pipeline.corpus.windows import (
    FLAG_BOS,
    FLAG_FIRST,
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
from sae.errors import ConfigError, HookError, StoreError
from tests.extracting import DOCUMENTS, EXACT, POINTS, run
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
