"""A local S3 server in a process of its own; what `pytest -n` needs to be faster than one process."""

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

# with few tests that take long: begun last, one worker would end alone with them
LONG_FILES = ("test_documented_commands.py", "test_wheel.py", "test_run.py")


def take_cores() -> None:
    """Of `pytest -n N`: this worker's share of the cores, for its threads and its children's. More threads than cores wait
    for each other in turns."""
    name, count = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if name and hasattr(os, "sched_setaffinity"):
        cores, number = sorted(os.sched_getaffinity(0)), int(name.removeprefix("gw"))
        os.sched_setaffinity(0, cores[number::count] or [cores[number % len(cores)]])


take_cores()  # before any library counts them


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.name not in LONG_FILES)


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
