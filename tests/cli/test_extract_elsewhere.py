"""extract by settings alone: in other processes, with a plan and a picture, and with files that are not the store's."""

from __future__ import annotations

import pytest

from pipeline.executors.base import Placement
from pipeline.run import read_manifest
from pipeline.store.writer import invalidate
from sae.errors import StoreError
from tests.executors.capture_work import extract_with
from tests.store.helpers import files_of
from tests.tiny_llama import write_tiny_llama

from .conftest import QUICK, ggscope, last_line

SETTINGS = ["corpus.max_tokens=6000", "store.shard_rows=512", "hook.points=[blocks.1..2.hook_resid_post]", QUICK]


def test_other_processes_write_the_store_this_one_would_have(tmp_path):
    done = ggscope("extract", *SETTINGS, "model.n_threads=1", "run_dir=here", cwd=tmp_path)
    assert "plan: 6,000 of 6,000 rows x 512 values at 2 hook points, 12 shards" in done.stderr
    ggscope(
        "extract", *SETTINGS, "model.n_threads=1", "executor=pool", "executor.workers=2", "run_dir=pool", cwd=tmp_path
    )
    here, pool = (tmp_path / name / "activations.zarr" for name in ("here", "pool"))
    assert files_of(here) == files_of(pool)
    outputs = read_manifest(tmp_path / "here")["outputs"]
    with open(outputs["statistics"], "rb") as picture:
        assert picture.read(8) == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("extract.backend=layer_inp", "not the input of a block"),
        ("executor.kind=poool", "executor.kind"),
        ("hook.points=[blocks.9.hook_resid_post]", "no hook point"),
    ],
)
def test_what_cannot_be_had_is_said_before_the_corpus_is_read(setting, message, tmp_path):
    options = [*SETTINGS, "hook.points=[blocks.1.hook_mlp_out]", "corpus.max_tokens=0", "run_dir=run", setting]
    assert message in last_line(ggscope("extract", *options, cwd=tmp_path, code=2))
    assert not (tmp_path / "run" / "corpus" / "spool.json").exists()


def test_a_worker_whose_files_are_others_refuses_to_write_into_the_store(tmp_path):
    model = tmp_path / "model.gguf"
    write_tiny_llama(model)
    watched, _ = extract_with(None, model, tmp_path)
    store = tmp_path / "store"
    invalidate(store, 1)
    before = files_of(store)
    write_tiny_llama(model, seed=1)
    with pytest.raises(StoreError, match=r"made with another model \(.*model\.gguf\) than this worker finds"):
        watched.work.capture([1], place=Placement(n_threads=1), done=lambda _rows: None)
    assert files_of(store) == before
    write_tiny_llama(model)
    watched.work.capture([1], place=Placement(n_threads=1), done=lambda _rows: None)
    assert watched.work.missing() == []
