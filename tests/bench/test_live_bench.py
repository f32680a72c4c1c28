"""`python -m bench.live` on a model of a few kilobytes: every side decodes, every reading reads, the floor is the bytes'."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from bench import live, live_ask, live_beside, live_cases, live_gpu, live_readings, live_steps, models
from bench.live_readings import without
from pipeline.llama.model import Model
from pipeline.llama.session import Session

SHAPE = models.Shape(d=64, blocks=2, heads=4, kv_heads=2, ff=96, vocab=512, context=256)
SMALL = live_steps.Settings(
    shape=SHAPE,
    threads=1,
    prompt=4,
    tokens=6,
    busy_tokens=3,
    peer_tokens=6,
    latents=(256,),
    k=8,
    sum_bytes=1 << 20,
    numpy_latents=256,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_every_side_gives_a_row_and_the_floor_is_the_encoders_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(live_steps.Settings, "quick", classmethod(lambda cls: SMALL))
    arguments = [
        "--quick",
        "--json",
        str(tmp_path / "live.json"),
        "--models",
        "llama1b",
        "--threads",
        "1",
        "--peers",
        "none",
    ]
    assert live.main([*arguments, "--folder", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "live.json").read_text())
    rows = {row["case"]: row for row in found["rows"]}
    assert set(rows) == {
        "llama1b callback", "llama1b callback, busy", "llama1b asked node",
        *(f"llama1b read n256 k8 {label}" for label in ("F16", "Q8_0", "Q4_0", "numpy-f32")),
    }  # fmt: skip
    floors = {name.split()[-1]: row["theirs"] for name, row in rows.items() if row["peer"] == "byte floor"}
    assert floors["numpy-f32"] / floors["F16"] == pytest.approx(2)
    assert floors["F16"] / floors["Q8_0"] == pytest.approx(64 / 34)
    assert floors["F16"] / floors["Q4_0"] == pytest.approx(64 / 18)
    assert rows["llama1b callback"]["target"] == pytest.approx(1 / 1.03)
    assert found["machine"]["llama1b bandwidth_gb_s"] > 0


def test_every_node_of_a_token_is_asked_about_once_and_python_takes_longer_to_answer(tmp_path):
    path = live_cases.prepare("llama1b", tmp_path, SMALL, lambda text: None)
    with Model(path) as model, Session(model, n_ctx=64, n_threads=1) as session:
        found, heard = live_ask.library(), []

        def slow(address, ask, user_data):
            heard.append(address)
            time.sleep(1e-4)
            return False

        callback = live_ask.lc.ggml_backend_sched_eval_callback(slow)
        sides = live_ask.sides(model, found)
        sides["slow"] = live_ask.Side(live_ask._address(callback), keep=(callback,))
        spent, nodes = live_ask.nanoseconds(model, sides, found, turns=3, threads=1)
    assert nodes == len(session.graph.nodes)
    assert len(heard) == (3 + live_ask.WARM_TURNS) * nodes
    assert spent["slow"] > 1e5
    assert spent[live_ask.FILTER] < spent[live_ask.PYTHON] < spent["slow"]


def test_the_floor_and_the_added_time_are_those_of_the_seconds_given():
    key = "32768 Q8_0"
    seconds = {"sum": [0.02, 0.02], without(key): [0.03, 0.05], key: [0.032, 0.052]}
    settings = live_steps.Settings(sum_bytes=1 << 30, tokens=2)
    side = live_readings.Side(32768, "Q8_0", 1 << 26, {}, None)
    read, token = live_readings.reading_rows("m", seconds, {key: side}, settings, [0, 1])
    assert read.ours == pytest.approx(2.0)
    assert read.theirs == pytest.approx(20 / 16)
    assert read.target == pytest.approx(0.8)
    assert token.ratio == pytest.approx(40 / 42)
    small_one = {"sum": seconds["sum"], without("a"): [0.03, 0.05], "a": [0.031, 0.051]}
    side = live_readings.Side(8, "F16", 1 << 24, {}, None)
    small = live_readings.reading_rows("m", small_one, {"a": side}, settings, [0, 1])[0]
    assert small.target == pytest.approx(0.3125 / (1.25 * 0.3125 + 0.1))


@pytest.mark.skipif(not live_beside.available(), reason="needs the environment of `make bench-env`")
def test_hf_with_saelens_reads_the_same_latents_of_the_same_weights(tmp_path):
    path = live_cases.prepare("llama1b", tmp_path, SMALL, lambda text: None)
    rows, facts = live_beside.peer_rows("llama1b", path, tmp_path, SMALL, lambda text: None)
    assert [row.peer for row in rows] == ["hf-saelens-bfloat16", "hf-saelens-float32"]
    shared = [int(row.note.split(";")[1].split()[0]) for row in rows]
    assert shared[1] >= 75, "Q8_0 against float32: only latents near the edge differ"
    assert all(row.ours > 0 and row.ratio == pytest.approx(row.theirs / row.ours) for row in rows)
    assert set(facts) == {"transformers", "sae_lens"}


def test_a_row_beside_the_peer_is_the_ratio_of_the_medians():
    turns = {"ours": [0.01, 0.02, 0.03], "theirs": [0.05, 0.06, 0.04], "plain": [0.03], "shared": 0.5}
    row = live_beside._row("case", "peer", turns)
    assert (row.ours, row.theirs, row.ratio) == pytest.approx((20.0, 50.0, 2.5))
    assert "50 % of the latents" in row.note


def test_a_token_with_a_reading_stands_beside_one_without_on_the_model_where_it_lies(tmp_path):
    settings = replace(live_gpu.QUICK, **{name: getattr(SMALL, name) for name in ("shape", "threads", "prompt", "tokens", "latents", "k")})  # fmt: skip
    path = live_cases.prepare(live_gpu.NAME, tmp_path, settings, lambda text: None)
    rows, facts = live_gpu.measure(path, settings, lambda text: None)
    assert [row.case for row in rows] == [f"llama8b token with n256 k8 {label}, 0 MB" for label in ("F16", "Q8_0")]
    assert all(row.ours > 0 and row.ratio == pytest.approx(row.theirs / row.ours) for row in rows)
    assert facts["model_mb"] == round(path.stat().st_size / 1e6)


def test_the_share_of_a_token_is_the_median_of_the_differences():
    seconds = {without("x"): [0.010, 0.030, 0.020], "x": [0.011, 0.0305, 0.022]}
    (row,) = live_gpu.token_rows(seconds, ["x"])
    assert (row.theirs, row.ours) == pytest.approx((20.0, 21.0))
    assert (row.ratio, row.target) == pytest.approx((20 / 21, 1 / 1.05))
    assert row.note == "+5.0% ± 2.0%"


def test_the_standard_error_is_that_of_a_median():
    gap_MT = np.random.default_rng(0).normal(0.4e-3, 0.2e-3, (400, 101))
    seconds = [{"x": (1 + gap_T).tolist(), without("x"): [1.0] * 101} for gap_T in gap_MT]
    found = [live_readings.added(each, ["x"], range(101))["x"] for each in seconds]
    ms, error = (np.array([getattr(one, name) for one in found]) for name in ("ms", "error"))
    np.testing.assert_allclose(ms.mean(), 0.4, atol=0.01)
    np.testing.assert_allclose(error.mean(), ms.std(), rtol=0.15)
    few = live_readings.added(seconds[0], ["x"], [3, 5, 4])["x"]
    assert few.ms == few.plain_ms == pytest.approx(1e3 * np.median(gap_MT[0, 3:6]))


def test_what_a_reading_costs_beside_its_own_time_is_taken_of_all():
    rng = np.random.default_rng(3)
    seconds, own = {}, {"a": 0.2e-3, "b": 0.8e-3}
    for key, each in own.items():
        inside_T, noise_T = rng.normal(each, 1e-5, 201), rng.normal(0, 0.3e-3, 201)
        seconds |= {without(key): [0.0] * 201, key: (inside_T + 0.05e-3 + noise_T).tolist()}
        seconds[live_steps.inside(key)] = inside_T.tolist()
    found = live_readings.added(seconds, ["a", "b"], range(201))
    for key, each in own.items():
        assert found[key].ms == pytest.approx(1e3 * each + 0.05, abs=3 * found[key].error)
        assert found[key].error < 0.8 * found[key].plain_error
        assert found[key].own_ms == pytest.approx(1e3 * np.median(seconds[live_steps.inside(key)]))
    rest = {key: found[key].ms - 1e3 * np.median(seconds[live_steps.inside(key)]) for key in own}
    assert rest["a"] == pytest.approx(rest["b"], abs=1e-9)


def test_a_reading_is_timed_where_it_is_read(tmp_path):
    path = live_cases.prepare("llama1b", tmp_path, SMALL, lambda text: None)
    with Model(path) as model:
        session = live_steps.session_of(model, 64, SMALL)
        found = {label: (reader, n) for label, reader, n in live_readings.readers(model, 256, SMALL)}
        plain = live_readings.side(session, "numpy", found["numpy-f32"][0], 256, "numpy-f32", found["numpy-f32"][1])
        assert plain.meter is None
        one = live_readings.side(session, "x", found["F16"][0], 256, "F16", found["F16"][1])
        if one.meter is None:
            pytest.skip("no compiled reading here")
        groups, meters = [one.steps], {"x": one.meter}
        seconds = live_steps.in_step(groups, SMALL, 3, meters=meters)
    assert len(seconds["x, inside"]) == 3
    assert all(0 < part < whole for part, whole in zip(seconds["x, inside"], seconds["x"], strict=True))


def test_a_group_decodes_each_side_twice_and_times_the_second():
    said = []
    groups = [{"a": lambda token, pos: said.append(("a", pos)), "b": lambda token, pos: said.append(("b", pos))},
              {"c": lambda token, pos: said.append(("c", pos))}]  # fmt: skip
    seconds = live_steps.in_step(groups, SMALL, 2, opening=lambda token, pos: said.append(("sum", pos)))
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2, "c": 2, "sum": 2}
    rounds = [[]]
    for name, _ in said[3 * SMALL.prompt :]:
        if name == "sum":
            rounds.append([])
        else:
            rounds[-1].append(name)
    assert rounds[1:3] == [["a", "a", "b", "b", "c", "c"], ["c", "c", "a", "a", "b", "b"]]
    assert len(rounds) - 1 == live_steps.WARM_TOKENS + 2


@pytest.mark.skipif(live_gpu.device_name() != "", reason="there is a GPU")
def test_without_a_gpu_its_side_is_refused_in_one_line(capsys):
    assert live.main(["--gpu"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("bench.live: --gpu needs a llama.cpp built for a GPU")
    assert said.out == ""
