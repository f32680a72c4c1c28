"""A corpus in an S3-compatible object store: a real server in a process of its own, read through obstore."""

from __future__ import annotations

import gzip
import http.server
import importlib.util
import json
import re
import sys
import threading

import pytest

from pipeline.config import CorpusConfig
from pipeline.corpus.files import _file_system
from pipeline.corpus.readers import read_documents
from sae.errors import ConfigError


@pytest.fixture
def closed(s3, monkeypatch):
    """`s3://closed` of a server that refuses everything."""

    class Refusal(http.server.BaseHTTPRequestHandler):
        def refuse(self):
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = refuse

        def log_message(self, *args):
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        yield "s3://closed"
        server.shutdown()
        thread.join()


def config(path, **options):
    return CorpusConfig(**{"kind": "jsonl", "paths": [path], "split": "all", **options})


def test_objects_are_found_by_pattern_and_read_whole(s3):
    with pytest.raises(ConfigError, match="matches no file"):
        next(read_documents(config("s3://bucket/data/*.jsonl")))
    lines = [json.dumps({"text": f"größe {i}"}).encode() for i in range(9)]
    remote, _ = _file_system("s3://bucket/data")
    remote.pipe_file("bucket/data/a.jsonl", b"\n".join(lines[:4]))
    remote.pipe_file("bucket/data/sub/b.jsonl.gz", gzip.compress(b"\n".join(lines[4:])))
    remote.pipe_file("bucket/data/note.txt", b"a note")
    found = list(read_documents(config("s3://bucket/data/**/*.jsonl*", seed=-1)))
    assert [d.name for d in found] == [f"a.jsonl:{i}" for i in range(1, 5)] + [
        f"sub/b.jsonl.gz:{i}" for i in range(1, 6)
    ]
    assert [d.text for d in found] == [f"größe {i}" for i in range(9)]
    assert [d.text for d in read_documents(config("s3://bucket/data/note.txt", kind="text"))] == ["a note"]


def test_a_bucket_that_is_not_there_is_one_line(s3):
    for name in ("x/*.jsonl", "x.jsonl"):
        with pytest.raises(ConfigError, match=r"'s3://nowhere/x.*NoSuchBucket") as caught:
            next(read_documents(config(f"s3://nowhere/{name}")))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "none/*.jsonl"])
def test_an_object_that_is_not_there_matches_no_file(s3, name):
    with pytest.raises(ConfigError, match=rf"^corpus.paths: 's3://bucket/{re.escape(name)}' matches no file$"):
        next(read_documents(config(f"s3://bucket/{name}")))


def test_a_refused_access_is_not_taken_for_a_missing_object(closed):
    for name in ("a.jsonl", "*.jsonl"):
        with pytest.raises(ConfigError, match=r"cannot be opened \(.*403 Forbidden\)$") as caught:
            next(read_documents(config(f"{closed}/{name}")))
        assert "\n" not in str(caught.value)


def test_without_a_package_for_s3_the_message_says_what_to_install(monkeypatch):
    monkeypatch.delitem(
        sys.modules["fsspec.registry"]._registry, "s3", raising=False
    )  # another test may have registered obstore
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "obstore" else find_spec(name))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3:// needs the package obstore.*pip install 'ggscope\[s3\]'"):
        next(read_documents(config("s3://bucket/a.jsonl")))
