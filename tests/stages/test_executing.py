"""A capture with the blocks its hook points need: nothing of it is recorded, nor changes a byte."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.capture import work as work_module
from pipeline.capture.work import CaptureWork
from pipeline.config import Config, CorpusConfig, ExecutorConfig, ExtractConfig, HookConfig, ModelConfig, StoreConfig
from pipeline.corpus.plan import make_plan
from pipeline.executors import Placement
from pipeline.extract import extract
from pipeline.run import RunContext
from pipeline.stages.corpora import SPOOL_NAME, window_table
from pipeline.stages.executing import capture_model, capture_work
from pipeline.store.commits import committed_shards
from pipeline.store.writer import invalidate
from sae.errors import HookError
from tests.store.helpers import files_of
from tests.tiny_llama import write_tiny_llama

BLOCKS = 4
POINTS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model and a text."""
    folder = tmp_path_factory.mktemp("executing")
    write_tiny_llama(folder / "tiny.gguf", blocks=BLOCKS)
    (folder / "text.py").write_text("def walk(tree):\n    return [node for node in tree]\n" * 60)
    return folder


def context_of(files, folder, *, points=POINTS, load="auto", executor="local", generate=0, **model):
    config = Config(
        model=ModelConfig(**{"path": str(files / "tiny.gguf"), "n_threads": 1, **model}),
        hook=HookConfig(points=points),
        corpus=CorpusConfig(
            kind="text", paths=[str(files / "text.py")], split="all", context_tokens=24, generate_tokens=generate
        ),
        extract=ExtractConfig(load=load, batch_tokens=100, calibration_tokens=200),
        store=StoreConfig(shard_rows=256),
        executor=ExecutorConfig(kind=executor),
    )
    folder.mkdir(exist_ok=True)
    return RunContext(command="extract", folder=folder, config=config)


def captured(context, store):
    """What `ggscope extract` does, into `store`; the blocks that were loaded."""
    config = context.config
    with capture_model(context) as (model, widths):
        table = window_table(context, model, spool=True)
        plan = make_plan(table, hooks=widths, extract=config.extract, store=config.store)
        extract(model, table, plan, config=config.extract, model_config=config.model, store_path=store)
        return model.blocks


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The files of a store captured with all blocks."""
    folder = tmp_path_factory.mktemp("whole")
    assert captured(context_of(files, folder / "run", load="whole"), folder / "store") == BLOCKS
    return files_of(folder / "store")


def test_a_store_is_the_same_byte_for_byte(files, tmp_path, whole):
    assert captured(context_of(files, tmp_path / "run"), tmp_path / "store") == 2
    assert files_of(tmp_path / "store") == whole
    assert f'"n_layer": {BLOCKS}'.encode() in b"".join(whole.values())


def test_a_store_begun_with_all_blocks_is_finished_with_some(files, tmp_path, whole):
    store = tmp_path / "store"
    captured(context_of(files, tmp_path / "first", load="whole"), store)
    shards = committed_shards(store)
    assert len(shards) > 2
    for shard in sorted(shards)[1:]:
        invalidate(store, shard)
    assert captured(context_of(files, tmp_path / "second"), store) == 2
    assert files_of(store) == whole


@pytest.mark.parametrize(("load", "blocks"), [("auto", 2), ("whole", BLOCKS)])
def test_a_worker_loads_what_it_was_told(files, tmp_path, whole, monkeypatch, load, blocks):
    context, store = context_of(files, tmp_path / "run", load=load), tmp_path / "store"
    captured(context, store)
    for shard in sorted(committed_shards(store)):
        invalidate(store, shard)
    config = context.config
    work = CaptureWork(
        model_path=config.model.path, spool=str(context.folder / SPOOL_NAME), store=str(store), model=config.model,
        extract=config.extract, layout=config.store, hooks=tuple(dict.fromkeys(POINTS, 64).items()),
    )  # fmt: skip
    try:
        work.capture(work.missing(), place=Placement(n_threads=1), done=lambda rows: None)
        assert work_module._kept[2].model.blocks == blocks
    finally:
        work_module._kept[2].close()
        work_module._kept[2].model.close()
        monkeypatch.setattr(work_module, "_kept", None)
    assert {name: data for name, data in files_of(store).items() if name in whole} == whole


@pytest.mark.parametrize(
    ("executor", "model", "load"),
    [
        ("pool", {}, "whole"),  # the workers share the pages of the file
        ("pool", {"mmap": False}, "auto"),
        ("pool", {"n_gpu_layers": -1}, "auto"),
        ("ray", {}, "auto"),
        ("submitit", {}, "auto"),
    ],
)
def test_workers_of_a_pool_share_the_whole_file_where_it_is_mapped(files, tmp_path, executor, model, load):
    context = context_of(files, tmp_path / "run", executor=executor, **model)
    with capture_model(context) as (opened, widths):
        assert opened.blocks == 2
        table = window_table(context, opened, spool=True)
        plan = make_plan(table, hooks=widths, extract=context.config.extract, store=context.config.store)
        work = capture_work(context, opened, plan, tmp_path / "store")
    assert work.extract == replace(context.config.extract, load=load)


def test_all_blocks_are_loaded_where_a_capture_needs_them(files, tmp_path):
    for points in (["ln_final.hook_normalized"], ["ggml:l_out-0"], ["blocks.*.hook_resid_post"], ["blocks.2.hook_z"]):
        with capture_model(context_of(files, tmp_path, points=points)) as (model, widths):
            assert model.blocks == BLOCKS
            assert widths
    with capture_model(context_of(files, tmp_path, generate=4)) as (model, _):
        assert model.blocks == BLOCKS


def test_a_point_that_is_not_there_is_refused_with_all_that_the_model_has(files, tmp_path):
    with (
        pytest.raises(HookError, match=r"blocks 0\.\.3 and blocks\.0\.\.3\.hook_resid_pre.*, logits, ln_final"),
        capture_model(context_of(files, tmp_path, points=["blocks.0.mlp.hook_router_scores"])),
    ):
        pass
    with (
        pytest.raises(HookError, match=r"is not the input of a block.*blocks\.0\.\.3\.hook_resid_pre"),
        capture_model(replace_backend(context_of(files, tmp_path))),
    ):
        pass


def replace_backend(context):
    extract = replace(context.config.extract, backend="layer_inp")
    return RunContext(command="extract", folder=context.folder, config=replace(context.config, extract=extract))
