"""A corpus in an S3-compatible object store: a real server in a process of its own, read through obstore."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import fsspec
import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus.readers import read_documents
from sae.errors import ConfigError


@pytest.fixture(scope="module")
def endpoint():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)
        settings = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1", "ENDPOINT_URL": url}
        for name, value in {**settings, "ALLOW_HTTP": "true"}.items():
            patch.setenv(f"AWS_{name}", value)
        for _ in range(300):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
        server.kill()


def config(path, **options):
    return CorpusConfig(**{"kind": "jsonl", "paths": [path], "split": "all", **options})


def test_objects_are_found_by_pattern_and_read_whole(endpoint):
    with pytest.raises(ConfigError, match="matches no file"):
        next(read_documents(config("s3://bucket/data/*.jsonl")))
    lines = [json.dumps({"text": f"größe {i}"}).encode() for i in range(9)]
    remote, _ = fsspec.core.url_to_fs("s3://bucket/data")
    remote.pipe_file("bucket/data/a.jsonl", b"\n".join(lines[:4]))
    remote.pipe_file("bucket/data/sub/b.jsonl.gz", gzip.compress(b"\n".join(lines[4:])))
    remote.pipe_file("bucket/data/note.txt", b"a note")
    found = list(read_documents(config("s3://bucket/data/**/*.jsonl*", seed=-1)))
    assert [d.name for d in found] == [f"a.jsonl:{i}" for i in range(1, 5)] + [
        f"sub/b.jsonl.gz:{i}" for i in range(1, 6)
    ]
    assert [d.text for d in found] == [f"größe {i}" for i in range(9)]
    assert [d.text for d in read_documents(config("s3://bucket/data/note.txt", kind="text"))] == ["a note"]


def test_a_bucket_that_is_not_there_is_one_line(endpoint):
    with pytest.raises(ConfigError, match="s3://nowhere/x") as caught:
        next(read_documents(config("s3://nowhere/x/*.jsonl")))
    assert "\n" not in str(caught.value)
