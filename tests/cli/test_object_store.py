"""`ggscope extract`, `store` and `train` with the store in object storage, a real S3 server; no file of it on this disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from pipeline.cli import main
from pipeline.run import file_sha256
from pipeline.store.backends import open_backend
from pipeline.store.commits import committed_shards
from tests.store.helpers import files_of

from .conftest import ggscope

SHARDS = 20
EXTRACT = [
    f"corpus.max_tokens={SHARDS * 512}", "store.shard_rows=512", "store.chunk_bytes=65536", "extract.batch_tokens=512",
    "extract.calibration_tokens=1024", "model.n_threads=1",
]  # fmt: skip
TRAIN = ["sae.num_latents=64", "sae.k=4", "trainer.tokens=8192", "trainer.n_threads=1"]


@pytest.fixture(scope="module")
def url(s3, tmp_path_factory):
    """A store whose first extract was killed in the middle and resumed; its working folder."""
    folder, url = tmp_path_factory.mktemp("work"), f"{s3}/cli/store"
    command = [sys.executable, "-m", "pipeline.cli", "extract", *EXTRACT, f"store.path={url}"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as killed:
        deadline = time.monotonic() + 120
        while not committed_shards(url):
            assert killed.poll() is None, killed.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    there = len(committed_shards(url))
    assert 0 < there < SHARDS
    done = ggscope("extract", *EXTRACT, f"store.path={url}", "resume=latest", cwd=folder)
    assert f"{SHARDS - there} shards written, {there} were there" in done.stdout
    assert done.stdout.splitlines()[-1].split()[2] == url
    return url


def test_an_extract_that_was_killed_and_resumed_has_the_objects_of_an_undisturbed_one_on_disk(url, tmp_path):
    ggscope("extract", *EXTRACT, "store.path=store", cwd=tmp_path)
    backend, local = open_backend(url), files_of(tmp_path / "store")
    del local[".lock"]
    assert {key: backend.get(key) for key in backend.list() if key != ".lock"} == local


def test_a_store_in_a_bucket_is_described_verified_and_packed_into_another(url, tmp_path, monkeypatch, capsys):
    def words(*args):
        """Standard output of a command that needs no process of its own: neither llama.cpp nor torch."""
        assert main(["store", *args]) == 0
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    found = json.loads(words("info", url, "format=json"))
    assert (found["store"], found["rows"], found["shards_missing"]) == (url, SHARDS * 512, [])
    packed = words("compact", url, f"store.path={url}-packed", "store.shard_rows=4096")
    assert f"{SHARDS * 512:,} rows in 3 shards of 4,096, every one read back equal" in packed
    assert "all as their commits say" in words("verify", f"{url}-packed")
    assert not list(tmp_path.iterdir())


def test_an_sae_is_trained_on_a_store_in_a_bucket(url, tmp_path):
    done = ggscope("train", *TRAIN, f"store.path={url}", cwd=tmp_path)
    assert "64 latents, k=4, 8,192 tokens" in done.stdout
    (run,) = tmp_path.glob("runs/train/*")
    (tmp_path / "meta.json").write_bytes(open_backend(url).get("meta.json"))
    given = json.loads((run / "manifest.json").read_text())["inputs"]["store"]
    assert (given["path"], given["sha256"]) == (url, file_sha256(tmp_path / "meta.json"))
    assert (run / "sae" / "sae.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"meta.json", "runs"}
