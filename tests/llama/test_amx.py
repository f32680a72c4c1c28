"""Whether llama.cpp's products in tile registers are used: tried in a process of its own, and remembered."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.llama import amx
from pipeline.llama.doctor import versions
from pipeline.llama.ggml_graph import AMX, Backend, buffer_type_name


@pytest.fixture
def tiles(monkeypatch, tmp_path):
    """A machine and a llama.cpp with tile registers, an empty cache, and the commands that were started."""
    started, ends = [], [0]

    class System:
        @staticmethod
        def llama_print_system_info():
            return b"CPU : AVX512 = 1 | AMX_INT8 = 1 | "

    def run(command, **_options):
        started.append(command)
        return subprocess.CompletedProcess(command, ends[0], "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(amx, "processor", lambda: "flags: amx_tile amx_int8")
    monkeypatch.setattr(amx, "lc", System)
    monkeypatch.setattr(amx.subprocess, "run", run)
    return started, ends


def asked():
    amx.usable.cache_clear()
    try:
        return amx.usable()
    finally:
        amx.usable.cache_clear()


@pytest.mark.parametrize(("ended", "good"), [(0, True), (1, False), (-11, False)])
def test_the_answer_is_tried_once_and_kept_for_the_next_process(tiles, ended, good):
    started, ends = tiles
    ends[0] = ended
    assert [asked(), asked(), asked()] == [good] * 3
    assert started == [[sys.executable, "-m", "pipeline.llama.amx"]]


def test_what_is_kept_and_damaged_is_tried_again(tiles, tmp_path):
    started, _ = tiles
    assert asked()
    (kept,) = tmp_path.glob("ggscope/native/amx-*.json")
    assert json.loads(kept.read_text()) == {"usable": True}
    kept.write_text("{")
    assert asked()
    assert len(started) == 2


def test_another_build_of_llama_cpp_is_tried_anew(tiles, monkeypatch, tmp_path):
    started, _ = tiles
    asked()
    other = tmp_path / "libggml-other.so"
    other.write_bytes(b"x")
    monkeypatch.setattr(amx, "library_files", lambda: [other])
    asked()
    assert len(started) == 2


def test_without_a_home_folder_it_is_tried_and_not_kept(tiles, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert asked()
    assert len(tiles[0]) == 1


def test_without_tile_registers_nothing_is_started(tiles, monkeypatch):
    monkeypatch.setattr(amx, "processor", lambda: "flags: avx2")
    assert asked()
    assert not tiles[0]


def test_a_process_that_does_not_start_counts_as_no(tiles, monkeypatch, tmp_path):
    def refuses(*_command, **_options):
        raise OSError("no more processes")

    monkeypatch.setattr(amx.subprocess, "run", refuses)
    assert not asked()
    assert not list(tmp_path.rglob("amx-*.json"))  # and is not remembered


def test_an_encoder_never_lies_in_tile_layout_and_the_doctor_says_what_is_used():
    backend = Backend(n_threads=1)
    assert AMX not in [buffer_type_name(each) for each in backend.buffer_types()]
    assert versions()["amx products"] in ("used", "off: this build's are broken", "not there")
