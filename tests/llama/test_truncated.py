"""Models loaded in part: the same bits from the blocks there are, and the whole file wherever that is not known."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest

from pipeline.llama import layer_inp, parts, truncated
from pipeline.llama import model as model_module
from pipeline.llama.hooks import HookPoint, blocks_read
from pipeline.llama.model import Model
from pipeline.llama.parts import Part, stream_of
from pipeline.llama.session import capture
from pipeline.llama.truncated import blocks_to_load, unavailable
from sae.errors import HookError, LlamaError
from tests.llama.architectures import ARCHITECTURES, WINDOW
from tests.llama.deeper import write_deeper
from tests.llama.hf_twins import loaded
from tests.llama.support import BLOCKS, exact, points, sequences, tiny
from tests.tiny_llama import write_tiny_llama

DEPTH = 6
_folder = tempfile.TemporaryDirectory(prefix="truncated")
_UINT32, _BOOL = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.BOOL
SLIDING = {"attention__sliding_window": (WINDOW, _UINT32)}
KNOWN = [name for name, row in ARCHITECTURES.items() if row.gguf in truncated.ARCHITECTURES]


@functools.cache
def deep(name: str, sliding: bool = False) -> Path:
    """The architecture's file with six blocks; `sliding`: three of four blocks see a window."""
    path = Path(_folder.name) / f"{name}-{sliding}.gguf"
    pattern = {"attention__sliding_window_pattern": ([block % 4 != 3 for block in range(DEPTH)], _BOOL)}
    write_deeper(path, loaded(name)[0].path, DEPTH, **(SLIDING | pattern if sliding else {}))
    return path


def values(model: Model, block: int, **options) -> list[dict[str, np.ndarray]]:
    """Every point of a block, in two unequal sequences, one longer than a window."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(2, model.n_vocab, length).astype(np.int32) for length in (2 * WINDOW + 3, 5)]
    with exact(model, n_seq_max=2, n_ubatch=16, **options) as session:
        chosen = [point for point in points(session) if point.block == block]
        found = capture(session, texts, chosen)
    assert all(len(rows) == len(chosen) > 5 for rows in found)
    return found


def equal(mine: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> bool:
    """Bit for bit, and of the same names."""
    return all(
        a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
        for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("name", KNOWN)
def test_a_model_of_the_first_blocks_computes_the_bits_of_the_whole_model(name):
    path = deep(name)
    settings = ({}, {"kv_unified": False, "flash_attn": "auto", "kv_type": "f16"})
    with Model(path) as whole:
        assert (whole.blocks, whole.truncated) == (DEPTH, False)
        expected = {block: [values(whole, block, **options) for options in settings] for block in (0, 3)}
        assert not equal(expected[0][0], expected[3][0])
        for block, found in expected.items():
            with Model(path, blocks=block + 2) as part:
                assert (part.blocks, part.truncated) == (block + 2, True)
                assert (part.id, part.n_layer, part.n_vocab) == (whole.id, DEPTH, whole.n_vocab)
                assert all(equal(values(part, block, **o), f) for o, f in zip(settings, found, strict=True))


@pytest.mark.parametrize("name", KNOWN)
def test_the_input_of_a_block_needs_the_blocks_before_it_and_that_one(name):
    path, point = deep(name), HookPoint("resid_pre", 2)
    assert blocks_to_load(path, [str(point)]) == 3
    found = []
    for blocks in (0, 3):
        with Model(path, blocks=blocks) as model, exact(model) as session:
            found.append(capture(session, sequences()[:2], [point]))
    assert equal(*found)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3moe", "gpt_oss"])
def test_layer_inputs_of_a_model_of_the_first_blocks_are_those_of_the_whole_model(name):
    path, names = deep(name), ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]
    chosen = [HookPoint.parse(text) for text in names]
    found = []
    for blocks in (0, blocks_to_load(path, names)):
        with Model(path, blocks=blocks) as model, exact(model, layer_inp=chosen) as session:
            found.append(capture(session, sequences(), chosen))
    assert model.blocks == 4
    assert equal(*found)


@pytest.mark.parametrize(("name", "sliding"), [("olmo2", True), ("gpt_oss", True), ("gpt_oss", False)])
def test_blocks_that_all_see_a_window_do_without_the_one_that_sees_everything(name, sliding):
    """llama.cpp keeps two caches for such models; one of them is empty then."""
    path = deep(name, sliding)
    with Model(path) as whole, Model(path, blocks=1) as one, Model(path, blocks=2) as two:
        assert one.truncated
        assert equal(values(two, 0), values(whole, 0))
        with exact(one) as session:
            capture(session, sequences(), [HookPoint("resid_pre", 0)])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_type_gives_the_bits_of_the_whole_file(tmp_path, dtype, tied):
    path = tmp_path / "model.gguf"
    write_tiny_llama(path, dtype=dtype, tied=tied, d=128, ff=128, blocks=DEPTH)
    with Model(path) as whole, Model(path, use_mmap=False) as read, Model(path, blocks=4) as part:
        assert part.truncated
        assert equal(values(part, 2), values(whole, 2))
        assert equal(values(read, 2), values(whole, 2))


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_an_architecture_that_is_not_known_is_loaded_whole_and_says_so(name, listen):
    said = listen(model_module)
    with Model(loaded(name)[0].path, blocks=1) as model:
        assert (model.blocks, model.truncated) == (2, False)
        with exact(model) as session:
            assert session.decode([2], [0], [0], logits="last").shape == (1, model.n_vocab)
    (line,) = said
    assert line == f"loading all blocks of {name}.gguf, not the first 1: {unavailable(name)}"


def test_another_build_of_llama_cpp_loads_all_blocks(monkeypatch, listen):
    said = listen(model_module)
    monkeypatch.setattr(layer_inp, "READ_BUILD", ("0.3.37", "0.26.0"))
    with Model(tiny()[0].path, blocks=2) as model:
        assert model.blocks == BLOCKS
    assert "it is known for llama-cpp-python 0.3.37" in said[0]


UNKNOWN = {
    "is not known": {"attention__anything": ([1] * BLOCKS, _UINT32)},
    "layers behind the last": {"nextn_predict_layers": (0, _UINT32)},
    "is not written as usual": {"block_count": (BLOCKS, gguf.GGUFValueType.UINT16)},
}


@pytest.mark.parametrize("why", UNKNOWN)
def test_a_header_that_cannot_be_shortened_is_loaded_whole(tmp_path, why, listen):
    said = listen(model_module)
    path = tmp_path / "odd.gguf"
    write_deeper(path, tiny()[0].path, BLOCKS, **UNKNOWN[why])
    if why == "is not written as usual":
        with pytest.raises(LlamaError, match="block_count"):  # nor can llama.cpp read it
            Model(path, blocks=2)
    else:
        with Model(path, blocks=2) as model:
            assert model.blocks == BLOCKS
    assert why in said[0]


def test_without_a_compiler_all_blocks_are_loaded(tmp_path, monkeypatch, listen):
    said = listen(model_module)
    monkeypatch.setenv("CC", "no-such-compiler")
    parts._library.cache_clear()
    try:
        with Model(tiny()[0].path, blocks=2) as model:
            assert (model.blocks, model.truncated) == (BLOCKS, False)
    finally:
        parts._library.cache_clear()
    assert "no C compiler: no-such-compiler is not there" in said[0]


def test_loading_that_is_interrupted_is_not_begun_again():
    calls = []

    def interrupt(share):
        calls.append(share)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Model(tiny()[0].path, blocks=2, progress=interrupt)
    assert len(calls) == 1


def test_what_lies_behind_the_blocks_loaded_is_refused():
    path = tiny()[0].path
    with Model(path, blocks=2) as model, exact(model) as session:
        names = set(session.hook_points())
        assert {name.split(".")[1] for name in names} == {"0", "1"}
        for missing in ("blocks.2.hook_resid_post", "logits", "ln_final.hook_normalized"):
            with pytest.raises(
                HookError, match=r"only the first 2 blocks are loaded.*this llama model has blocks 0..3"
            ):
                session.graph.find(HookPoint.parse(missing))
        with pytest.raises(HookError, match="only the first 2 are loaded"):
            session.graph.find(HookPoint.parse("ggml:l_out-0"))
        for logits in ("last", "all"):
            with pytest.raises(LlamaError, match="only 2 blocks of this model are loaded: it has no logits"):
                session.decode([1], [0], [0], logits=logits)
        session.decode([1], [0], [0])  # goes on working
        assert np.array_equal(model.unembed().W_VD, tiny()[0].unembed().W_VD)  # of the file


@pytest.mark.parametrize(
    ("texts", "blocks"),
    [
        (["blocks.3.hook_resid_post"], 4),
        (["blocks.3.hook_resid_pre"], 3),
        (["blocks.0.hook_resid_pre"], 0),
        (["blocks.3.hook_resid_pre", "blocks.1.attn.hook_z"], 3),
        (["blocks.1..4.hook_mlp_out"], 5),
        (["blocks.{1,6,2}.hook_resid_pre"], 6),
        (["blocks.2.*"], 3),
        (["blocks.*.hook_resid_post"], None),
        (["blocks.1.hook_mlp_out", "logits"], None),
        (["ln_final.hook_normalized"], None),
        (["ggml:l_out-1"], None),
        (["blocks.4..2.hook_mlp_out"], None),
        (["misspelt"], None),
    ],
)
def test_the_blocks_that_hook_points_need(texts, blocks):
    assert blocks_read(texts) == blocks


def test_the_last_blocks_of_a_model_need_all_of_it():
    path = tiny()[0].path
    for block, expected in ((0, 2), (1, 3), (BLOCKS - 2, 0), (BLOCKS - 1, 0), (BLOCKS, 0)):
        assert blocks_to_load(path, [f"blocks.{block}.hook_resid_post"]) == expected
    assert blocks_to_load(path, []) == 0


MEASURED = """
import sys
from tests.peak_memory import peak_kib
from pipeline.llama.model import Model
from pipeline.llama.identity import model_id
path, blocks = sys.argv[1], int(sys.argv[2])
model_id(path)  # the file is hashed, in memory of its own
before = peak_kib()
model = Model(path, blocks=blocks)
print(peak_kib() - before, model.blocks)
"""


def test_blocks_that_are_not_loaded_take_no_memory(tmp_path):
    path = tmp_path / "model.gguf"
    write_tiny_llama(path, blocks=8, d=256, ff=2048, heads=4, kv_heads=4)
    by_block = 4 * (4 * 256 * 256 + 3 * 256 * 2048) // 1024  # KiB of F32 weights: 7 MiB
    took = {}
    for blocks in (8, 2):
        command = [sys.executable, "-c", MEASURED, str(path), str(blocks)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        took[blocks], found = map(int, done.stdout.split())
        assert found == blocks
    assert 5.5 * by_block < took[8] - took[2] < 6.5 * by_block


class Stream:
    """Reading a C stream through the C library, as llama.cpp does."""

    def __init__(self, stream: int) -> None:
        libc = ctypes.CDLL(None)
        libc.fread.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)
        libc.fread.restype = ctypes.c_size_t
        libc.fseeko.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
        libc.ftello.argtypes, libc.ftello.restype = (ctypes.c_void_p,), ctypes.c_long
        self.libc, self.stream = libc, stream

    def read(self, at: int, count: int) -> bytes:
        buffer = ctypes.create_string_buffer(count)
        assert self.libc.fseeko(self.stream, at, 0) == 0
        found = self.libc.fread(buffer, 1, count, self.stream)
        return buffer.raw[:found]

    def size(self) -> int:
        assert self.libc.fseeko(self.stream, 0, 2) == 0
        return self.libc.ftello(self.stream)


def test_a_stream_of_parts_reads_as_the_bytes_it_is_made_of(tmp_path):
    rng = np.random.default_rng(0)
    content, head = rng.bytes(900_000), rng.bytes(1000)
    (tmp_path / "file").write_bytes(content)
    made = [Part(1000, 400_000, 300_000), Part(401_024, 7, 5), Part(500_000, 300_000, 0)]
    expected = bytearray(900_000)
    expected[:1000] = head
    for part in made:
        expected[part.start : part.start + part.length] = content[part.source : part.source + part.length]
    with stream_of(tmp_path / "file", head, made, len(expected)) as pointer:
        stream = Stream(pointer)
        assert stream.size() == len(expected)
        assert stream.read(0, len(expected) + 10) == expected
        for at, count in zip(rng.integers(0, len(expected), 200), rng.integers(1, 500_000, 200), strict=True):
            assert stream.read(int(at), int(count)) == expected[at : at + count]


def test_a_file_that_became_shorter_is_an_error_of_the_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 8000)
    with stream_of(path, b"", [Part(0, 2_048_000, 0)], 2_048_000) as pointer:
        with path.open("r+b") as file:
            file.truncate(500_000)
        assert len(Stream(pointer).read(0, 2_048_000)) == 500_000
        assert ctypes.CDLL(None).ferror(ctypes.c_void_p(pointer))
