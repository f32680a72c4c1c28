"""The pieces of `python -m bench.capture` on a model of a few kilobytes, without other tools: numbers come out, files fit."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest

from bench import capture_cases as cases
from bench import capture_settings, capture_storage, models
from bench.common import Row, compare, in_turns, our_worker, report
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Session, capture
from tests.tiny_llama import hf_model

SHAPE = models.Shape(d=64, blocks=4, heads=4, kv_heads=2, ff=96, vocab=512, context=256)
SMALL = cases.Settings(
    threads=1,
    context=32,
    rounds=1,
    bare_tokens=128,
    kinds=("F32", "Q8_0"),
    bare_kinds=("F32",),
    growth_tokens=64,
    store_rows=8192,
)
NAMES = ("batch_512", "threads_1", "kv_f32_flash_attn_off")
TOKENS = np.r_[1, np.arange(3, 60, 7)].astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.prepare("random", tmp_path_factory.mktemp("bench"), SMALL, lambda text: None, shape=SHAPE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def values(path, point) -> np.ndarray:
    with Model(path) as opened, Session(opened, n_ctx=64, n_threads=1, kv_type="f32", flash_attn="off") as session:
        return capture(session, [TOKENS], [HookPoint.parse(point)])[0][point]


def test_both_sides_hold_the_same_weights(model):
    import torch
    from safetensors.numpy import load_file

    hf = hf_model(load_file(model.hf / "model.safetensors"), heads=SHAPE.heads)
    with torch.no_grad():
        states = hf(torch.from_numpy(TOKENS[None].astype(np.int64)), output_hidden_states=True).hidden_states
    expected = states[model.mid + 1][0].numpy()
    for kind, tolerance in (("F32", 1e-5), ("Q8_0", cases.TOLERANCES["Q8_0"])):
        found = values(model.file(kind), f"blocks.{model.mid}.hook_resid_post")
        assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def test_the_hf_twin_of_a_gguf_has_the_weights_it_was_written_from(model, tmp_path):
    from safetensors.numpy import load_file

    twin = load_file(models.write_hf_twin(model.file("F32"), tmp_path / "twin") / "model.safetensors")
    original = load_file(model.hf / "model.safetensors")
    assert set(twin) == set(original)
    assert all(np.array_equal(twin[name], original[name]) for name in twin)


def test_a_truncated_model_computes_the_same_up_to_its_last_block(model):
    point = "blocks.1.hook_resid_pre"
    whole = values(model.file("F32"), point)
    assert np.array_equal(values(model.truncated("F32", 2), point), whole)
    with Model(model.truncated("F32", 2, vocab=64)) as small:
        assert (small.n_layer, small.n_vocab) == (2, 64)
    assert np.array_equal(values(model.truncated("F32", 2, vocab=64), point), whole)


def test_another_type_of_a_model_has_its_weights_within_the_types_rounding(model, tmp_path):
    models.write_requantised(model.file("F32"), tmp_path / "q8.gguf", "Q8_0")
    point = "blocks.3.hook_resid_pre"
    a, b = values(tmp_path / "q8.gguf", point), values(model.file("Q8_0"), point)
    assert np.array_equal(a, b)
    kinds = {t.tensor_type for t in gguf.GGUFReader(tmp_path / "q8.gguf").tensors if len(t.shape) > 1}
    assert kinds == {gguf.GGMLQuantizationType.Q8_0}


def test_capture_runs_against_llama_cpp_alone(model):
    rows = cases.against_bare(model, SMALL, lambda text: None)
    assert [(row.case.removeprefix("random_f32_"), row.peer) for row in rows][:3] == [
        ("b2", "bare"),
        ("b2", "bare-no-output"),
        ("b2_busy", "bare"),
    ]
    assert all(row.ours > 0 and row.theirs > 0 and row.ratio > 0 for row in rows)


def test_settings_of_llama_cpp_run_one_by_one(model):
    rows = capture_settings.compared(model, "F32", SMALL, 1, lambda text: None, names=NAMES)
    assert [row.case.removeprefix("random_f32_") for row in rows] == list(NAMES)
    assert all(row.ours > 0 and row.theirs > 0 for row in rows)


def test_memory_and_reading_back_give_rows(model, tmp_path):
    (growth,) = capture_storage.memory_growth(model, SMALL, lambda text: None)
    assert growth.theirs > 1  # MB: a model and a context at least
    assert growth.ratio == pytest.approx(growth.theirs / growth.ours)
    (row,) = capture_storage.reading(tmp_path / "store", SMALL, lambda text: None)
    assert row.ours > 0
    assert row.theirs > 0


def test_a_side_that_fails_says_why_in_one_line(model):
    with (
        our_worker(1) as worker,
        pytest.raises(cases.BenchError, match=r"^facts: FormatError: .*no such model file") as error,
    ):
        worker.ask("facts", path="nowhere.gguf")
    assert "\n" not in str(error.value)


def test_sides_alternate_and_a_ratio_is_the_median_of_the_rounds_own():
    order: list[str] = []
    speeds = {"a": iter([10.0, 2.0, 30.0]), "b": iter([5.0, 2.0, 10.0])}
    sides = {name: (lambda name=name: order.append(name) or next(speeds[name])) for name in speeds}
    found = in_turns(sides, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    row = compare("case", "peer", "tokens/s", found["a"], found["b"], target=1.5)
    assert (row.ours, row.theirs, row.ratio) == (10.0, 5.0, 2.0)


def test_the_report_is_a_table_and_json(tmp_path, capsys):
    row = Row(case="c", peer="p", unit="MB", ours=2.0, theirs=1.0, ratio=0.5, target=0.9)
    report([row], {"cores": 2}, title="capture", json_path=tmp_path / "rows.json")
    assert "0.500 !" in capsys.readouterr().out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["machine"] == {"cores": 2}
    assert {"case": "c", "peer": "p", "unit": "MB", "ours": 2.0, "theirs": 1.0, "ratio": 0.5}.items() <= written[
        "rows"
    ][0].items()
