"""Tracked files hold no leftovers of a merge, and no Python file grows past what one reads in a sitting."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 400
MARKERS = re.compile(rb"^(<{7} |={7}$|>{7} |\|{7} )", re.M)


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_text_file_holds_merge_conflict_markers():
    files = {path: path.read_bytes() for path in tracked()}
    assert len(files) > 100
    marked = [path for path, data in files.items() if b"\0" not in data and MARKERS.search(data)]
    assert marked == []


def test_the_markers_are_those_git_writes(tmp_path):
    for name, text in (("base", "a\n"), ("ours", "b\n"), ("theirs", "c\n")):
        (tmp_path / name).write_text(text)
    merge = ["git", "merge-file", "-p", "--diff3", "ours", "base", "theirs"]
    done = subprocess.run(merge, cwd=tmp_path, capture_output=True, check=False)
    assert len(MARKERS.findall(done.stdout)) == 4


def test_no_python_file_is_longer_than_400_lines():
    lines = {path: path.read_bytes().count(b"\n") for path in tracked() if path.suffix == ".py"}
    assert {path: n for path, n in lines.items() if n > MOST_LINES} == {}
