"""A local S3 server in a process of its own."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started by `&` of a script: children would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)

S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@contextmanager
def s3_server():
    """`http://127.0.0.1:PORT` of a server that has the bucket `bucket`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
                break
            except OSError:
                time.sleep(0.1)
        yield endpoint
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def s3():
    """`s3://bucket`, with the environment set so that this process and its children find it."""
    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)
        yield "s3://bucket"


@pytest.fixture
def listen(monkeypatch):
    """`listen(module)`: the messages that the module logs from now on, whatever other tests did to logging."""

    def start(module):
        messages, logger, handler = [], logging.Logger(module.__name__), logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        logger.addHandler(handler)
        monkeypatch.setattr(module, "_log", logger)
        return messages

    return start
