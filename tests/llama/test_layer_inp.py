"""The callback-free read path: the same bits as the callback, in batch order, and a line instead of an abort."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from pipeline.llama import layer_inp
from pipeline.llama.hooks import HookPoint
from pipeline.llama.layer_inp import choose_backend, points_for
from pipeline.llama.model import Model
from pipeline.llama.session import Hook, capture
from sae.errors import ConfigError, HookError, LlamaError
from tests.llama.hf_twins import loaded
from tests.llama.support import collect, exact, flat, relative, sequences, tiny

_folder = tempfile.TemporaryDirectory(prefix="inputs")
TOKENS = flat(sequences())
ROOM = {"n_ctx": 2560, "n_batch": 128}
INPUTS = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]


def parsed(names: list[str]) -> list[HookPoint]:
    return [HookPoint.parse(name) for name in names]


def model_of(architecture: str) -> Model:
    return tiny()[0] if architecture == "llama" else loaded(architecture)[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3moe", "gpt_oss"])
@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("n_ubatch", [512, 7])
def test_layer_inputs_have_the_bits_of_the_callback_however_the_batch_is_cut(architecture, kv_unified, n_ubatch):
    model, options = model_of(architecture), ROOM | {"n_ubatch": n_ubatch, "kv_unified": kv_unified}
    with exact(model, **options) as session:
        points = list(points_for(session.graph, model.n_layer))
        by_callback = capture(session, sequences(), points, stop_early=False)
    assert [str(point) for point in points[:3]] == INPUTS
    with exact(model, layer_inp=points, **options) as session:
        read = capture(session, sequences(), points)
    for mine, theirs in zip(read, by_callback, strict=True):
        assert all(np.array_equal(mine[str(point)], theirs[str(point)]) for point in points)
    blocks = [read[2][f"blocks.{block}.hook_resid_pre"] for block in range(model.n_layer)]
    assert min(relative(a, b) for a, b in zip(blocks[1:], blocks, strict=False)) > 0.01  # no block is another


@pytest.mark.parametrize("kv_unified", [True, False])
def test_rows_come_in_batch_order_with_mixed_unequal_sequences(kv_unified):
    tokens_N, seq_N, pos_N = TOKENS
    order = np.lexsort((seq_N, pos_N))
    seen = []
    hook = Hook(HookPoint.parse(INPUTS[0]), read=lambda rows: seen.append((rows.values_ND.copy(), rows.index_N)))
    with exact(layer_inp=[hook.point], n_ubatch=16, kv_unified=kv_unified, **ROOM) as session:
        session.decode(tokens_N[order], seq_N[order], pos_N[order], hooks=[hook])
    ((values_ND, index_N),) = seen
    assert np.array_equal(index_N, np.arange(len(order)))
    assert np.array_equal(values_ND, tiny()[1]["model.embed_tokens.weight"][tokens_N[order]])  # block 0's input


def test_a_sequence_goes_on_and_its_logits_are_those_of_the_callback_session():
    tokens = sequences()[2]
    hook, rows = collect("blocks.2.hook_resid_post")
    with exact(n_seq_max=1) as plain, exact(n_seq_max=1, layer_inp=[hook.point]) as session:
        for part in (slice(0, 30), slice(30, 40)):
            arguments = tokens[part], np.zeros(part.stop - part.start, int), np.arange(part.start, part.stop)
            expected = plain.decode(*arguments, logits="all")
            assert np.array_equal(session.decode(*arguments, hooks=[hook], logits="all"), expected)
        assert session.n_past.tolist() == [40]
        (whole,) = capture(plain, [tokens], [hook.point])
    assert relative(np.stack([rows[0, p] for p in range(40)]), whole["blocks.2.hook_resid_post"]) < 1e-5


def test_early_stop_clears_the_kv_here_too():
    hook, rows = collect(INPUTS[2])
    with exact(layer_inp=[hook.point]) as session:
        assert session.decode(*TOKENS, hooks=[hook], logits="all", stop_early=True) is None
        assert len(rows) == len(TOKENS[0])
        assert not session.n_past.any()


def test_what_a_reader_raises_comes_out_and_the_session_works_on():
    def fail(rows):
        raise ZeroDivisionError("mine")

    with exact(layer_inp=parsed(INPUTS)) as session:
        with pytest.raises(ZeroDivisionError, match="mine"):
            session.decode(*TOKENS, hooks=[Hook(HookPoint.parse(INPUTS[1]), read=fail)])
        assert not session.n_past.any()
        hook, rows = collect(INPUTS[1])
        session.decode(*TOKENS, hooks=[hook])
        assert len(rows) == len(TOKENS[0])


def test_points_that_are_no_input_of_a_block_and_edits_are_refused():
    for name in ("blocks.3.hook_resid_post", "blocks.1.hook_resid_mid", "ggml:ffn_out-1#0", "logits"):
        with pytest.raises(HookError, match=r"not the input of a block.*blocks\.0\.\.2\.hook_resid_post"):
            exact(layer_inp=parsed([name]))
    with pytest.raises(HookError, match=r"no hook point 'blocks\.9\.hook_resid_pre'"):
        exact(layer_inp=parsed(["blocks.9.hook_resid_pre"]))
    with exact(layer_inp=parsed(INPUTS[:1])) as session:
        with pytest.raises(HookError, match="is not read in this session"):
            session.decode(*TOKENS, hooks=[collect("blocks.2.hook_resid_pre")[0]])
        with pytest.raises(LlamaError, match="cannot be edited"):
            session.decode(*TOKENS, hooks=[Hook(HookPoint.parse(INPUTS[0]), edit=lambda rows: None)])


def test_a_raw_name_of_the_same_tensor_is_read_too():
    points = parsed(["ggml:l_out-1", "blocks.1.hook_resid_post"])
    with exact(layer_inp=points) as session:
        (values,) = capture(session, sequences()[:1], points)
    assert np.array_equal(values["ggml:l_out-1"], values["blocks.1.hook_resid_post"])


SCRIPT = """
import sys
from pipeline.llama.hooks import HookPoint
from pipeline.llama.layer_inp import _set
from pipeline.llama.model import Model
from pipeline.llama.session import Session, capture
from sae.errors import LlamaError
point = HookPoint.parse("blocks.1.hook_resid_pre")
with Model(sys.argv[1]) as model:
    if sys.argv[2] == "by force":
        session = Session(model, n_ctx=8, n_threads=1)
        _set(session._handle, 1, True)
        capture(session, [[1, 2]], [point])
    try:
        Session(model, n_ctx=8, n_threads=1, layer_inp=[point])
    except LlamaError as error:
        print(error)
"""


def test_an_architecture_that_would_end_the_process_is_refused_in_one_line():
    path = model_of("gpt2").path

    def run(how):
        command = [sys.executable, "-c", SCRIPT, str(path), how]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert run("by force").returncode == -signal.SIGABRT  # what is guarded against is real
    refused = run("as it should be")
    assert refused.returncode == 0, refused.stderr
    assert refused.stdout.startswith("layer inputs cannot be read: not known for architecture 'gpt2' (known: bailing")
    assert refused.stdout.count("\n") == 1
    assert refused.stdout.rstrip().endswith("use extract.backend=callback")


def test_another_build_of_llama_cpp_falls_back(monkeypatch):
    monkeypatch.setattr(layer_inp, "READ_BUILD", ("0.3.37", "0.26.0"))
    model = tiny()[0]
    model.offloads = True
    try:
        assert choose_backend("auto", model, parsed(["blocks.2.hook_resid_post"])) == "callback"
    finally:
        model.offloads = False
    with pytest.raises(LlamaError, match=r"known for llama-cpp-python 0\.3\.37 \(ggml 0\.26\.0\), this is 0\.3\."):
        choose_backend("layer_inp", model, parsed(INPUTS))


def test_auto_reads_layer_inputs_only_on_a_gpu_whose_deepest_point_is_the_last_blocks_input():
    model = tiny()[0]
    deepest, shallow = parsed(["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]), parsed(INPUTS)
    assert choose_backend("auto", model, deepest) == "callback"
    model.offloads = True  # as a build with a GPU sets it
    try:
        assert choose_backend("auto", model, deepest) == "layer_inp"
        assert choose_backend("auto", model, shallow) == "callback"
        assert choose_backend("auto", model, [*deepest, *parsed(["blocks.1.hook_resid_mid"])]) == "callback"
        assert choose_backend("callback", model, deepest) == "callback"
        assert choose_backend("auto", model_of("gpt2"), deepest[:1]) == "callback"
    finally:
        model.offloads = False
    assert choose_backend("layer_inp", model, shallow) == "layer_inp"
    with pytest.raises(HookError, match="not the input of a block"):
        choose_backend("layer_inp", model, parsed(["blocks.3.hook_resid_post"]))
    with pytest.raises(ConfigError, match="expected auto, callback or layer_inp"):
        choose_backend("fast", model, shallow)
