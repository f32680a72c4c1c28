"""The pieces of `python -m bench.train` at sizes of a few kilobytes: numbers come out, files fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bench import toy_dictionary, train, train_gpu
from bench import train_cases as cases
from bench import train_curves as curves
from bench.common import TRAIN_PEER_PYTHON, BenchError, Row
from bench.superposition import COEFFICIENT, Superposition
from bench.train_ours import Ours
from bench.train_worker import HELD_OUT, STATISTICS_ROWS, TRUTHS_PER_LATENT, Problem
from sae.ground_truth import dictionary_recovery
from sae.trainer import TrainConfig, Trainer

TINY = cases.Shape(d_in=32, num_latents=256, k=4, batch=128)
SMALL = cases.Settings(threads=1, rounds=2, seconds=0.0, shapes=(TINY,))


def quiet(_text: str) -> None:
    pass


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch):
    monkeypatch.setattr(cases, "KERNELS", ("torch",))


def test_toy_rows_are_the_sum_they_say_and_the_same_each_time():
    toy = Superposition(16, 40, seed=3, draws=5)
    x_ND = toy.batch(7, 20_000)
    assert np.array_equal(x_ND, Superposition(16, 40, seed=3, draws=5).batch(7, 20_000))
    assert not np.array_equal(x_ND[:10], toy.batch(8, 10))
    weight_M = np.array([(m + 10.0) ** -0.8 for m in range(40)])
    p_M, truth_MD = weight_M / weight_M.sum(), toy.truth_MD.astype(np.float64)
    low, high = COEFFICIENT
    mean_c, square_c = (low + high) / 2, (low**2 + low * high + high**2) / 3
    expected_D = toy.mean_D + 5 * mean_c * p_M @ truth_MD
    # of one draw: E[c^2] sum p f f^T - E[c]^2 (sum p f)(sum p f)^T; draws are independent, noise adds 0.02^2
    one_DD = square_c * (truth_MD.T * p_M) @ truth_MD - mean_c**2 * np.outer(p_M @ truth_MD, p_M @ truth_MD)
    assert np.allclose(x_ND.mean(0), expected_D, atol=0.02)
    assert np.allclose(np.cov(x_ND.T), 5 * one_DD + 0.02**2 * np.eye(16), atol=0.02)


def test_our_side_trains_as_the_trainer_does(tmp_path):
    steps, toy = 6, Superposition(TINY.d_in, int(TINY.num_latents * TRUTHS_PER_LATENT))

    class Source:
        d_in, served = TINY.d_in, 0

        def next(self):
            self.served += 1
            return toy.batch(self.served - 1, TINY.batch)

        def state(self):
            return {}

        def load_state(self, state): ...

    rows_ND = torch.from_numpy(toy.batch(HELD_OUT + 1, STATISTICS_ROWS))
    mean_D = rows_ND.double().mean(0)
    variance = float((rows_ND - mean_D).pow(2).sum(1).mean())
    config = TrainConfig(
        num_latents=256, k=4, batch_tokens=128, tokens=128 * steps, dead_after_tokens=10_000_000, kernel="torch"
    )
    facts = {"mean_D": mean_D.float().numpy(), "variance": variance, "hook": "blocks.0.hook_resid_post", "host": {}}
    torch.set_num_threads(1)
    trainer = Trainer(config, Source(), **facts, folder=tmp_path)
    trainer.fit()
    x_ND = toy.held_out(512)
    with torch.no_grad():
        x_hat_ND = trainer.model(torch.from_numpy(x_ND)).numpy()
    x64_ND = x_ND.astype(np.float64)
    expected = ((x64_ND - x_hat_ND) ** 2).sum() / ((x64_ND - x64_ND.mean(0)) ** 2).sum()
    with cases.ours_worker(1) as worker:
        worker.ask(
            "load", side="ours", shape=TINY.request(), threads=1, steps=steps, lr=None, options={"kernel": "torch"}
        )
        assert worker.ask("advance", to_step=2)["seconds"] > 0
        worker.ask("advance", to_step=steps)
        assert worker.ask("fvu", rows=512)["fvu"] == pytest.approx(expected, rel=1e-6)


def test_speed_is_compared_with_the_floor_in_the_same_rounds():
    found = list(cases.against_peers(TINY, SMALL, quiet, with_peers=False))
    assert [(row.case.removeprefix("d32_n256_k4_b128_"), row.peer) for row in found] == [
        ("torch", "floor"), ("torch_selection", "float64"),
    ]  # fmt: skip
    assert 0.999 < found[1].ours <= 1
    assert 0 < found[0].ratio < 2
    assert found[0].ours > 0


@pytest.mark.parametrize(("kernel", "dtype"), [("torch", "bfloat16"), ("native", "bfloat16"), ("native", "float32")])
def test_agreement_counts_the_latents_that_exact_values_take(kernel, dtype):
    problem = Problem(
        d_in=64, num_latents=2048, k=16, batch=128, steps=10, lr=1e-3, seed=0, mean_D=torch.zeros(64), variance=64.0
    )
    side = Ours(problem, kernel=kernel, encoder_dtype=dtype)
    x_ND = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    side.step(x_ND)
    before = {name: p.clone() for name, p in side.model.named_parameters()}
    assert side.agreement(x_ND) > 0.9995
    assert all(torch.equal(p, before[name]) for name, p in side.model.named_parameters())
    taken_NK = side.stepper.chosen(x_ND / side.model.scale)
    side.stepper.chosen = lambda u_ND: (taken_NK + 1) % 2048
    assert side.agreement(x_ND) < 0.1


def test_auxk_and_the_loop_around_the_step_give_rows():
    found = {row.case.removeprefix("d32_n256_k4_b128_torch_"): row for row in cases.own_parts(TINY, SMALL, quiet)}
    assert {"auxk_dead5", "auxk_dead0", "trainer"} <= found.keys()
    assert found["auxk_dead5"].target == 0.8
    assert all(row.ours > 0 and row.theirs > 0 for row in found.values())


def test_a_curve_has_a_row_at_each_mark_and_its_fvu_falls():
    wanted = curves.Curves(lrs=(4e-3,), steps=48, libraries=())
    found = list(curves.rows(TINY, SMALL, wanted, quiet, with_peers=False))
    assert [row.case.split("_")[-2] for row in found] == [f"{128 * step // 1000}k" for step in range(6, 49, 6)]
    assert found[-1].ours < found[0].ours


def test_the_gpu_s_case_stands_beside_its_goal_and_in_memory_of_its_device():
    """With the kernel and the device that every machine has."""
    found = list(train_gpu.rows(TINY, SMALL, quiet, with_peers=False, kernels=("torch",), device="cpu"))
    assert [(row.case, row.peer) for row in found] == [("d32_n256_k4_b128_cpu_torch", "goal")]
    assert found[0].theirs == 1e6
    assert found[0].ratio == pytest.approx(found[0].ours / 1e6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_group_is_left_out_and_refused_in_one_line_where_it_is_asked_for(capsys):
    assert train.groups([], "") == list(train.GROUPS)
    assert train.groups([], "H100") == [*train.GROUPS, "gpu"]
    assert train.main(["--only", "gpu"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith(f"bench.train: --only gpu needs a GPU that torch can use, and torch {torch.__version__}")


@pytest.mark.skipif(not TRAIN_PEER_PYTHON.exists(), reason="the peers' environment is not there: make bench-env")
@pytest.mark.long
def test_sparsify_stands_beside_ours_in_speed_and_memory():
    found = list(train_gpu.rows(TINY, SMALL, quiet, with_peers=True, kernels=("torch",), device="cpu"))
    assert [row.unit for row in found] == ["tokens/s", "tokens/s", "MB peak"]
    assert {row.peer for row in found} == {"sparsify-1.3.3-adam-autocast-bf16", "goal"}


def test_seconds_to_an_fvu_are_read_between_marks():
    curve = curves.Curve(fvu=[0.8, 0.6, 0.2], seconds=[1.0, 2.0, 4.0])
    assert curve.seconds_to(0.9) == 1.0
    assert curve.seconds_to(0.7) == pytest.approx(1.5)
    assert curve.seconds_to(0.5) == pytest.approx(2.5)
    assert curve.seconds_to(0.1) is None


def test_rows_are_on_disk_when_a_later_group_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.SHAPES, "small", TINY)
    monkeypatch.setattr(train, "TRAIN_PEER_PYTHON", tmp_path / "nowhere")
    monkeypatch.setattr(cases, "Settings", lambda: SMALL)
    target = tmp_path / "rows.json"

    def failing(*_arguments):
        yield Row(case="half", peer="p", unit="s", ours=1.0, theirs=1.0, ratio=1.0)
        assert json.loads(target.read_text())["rows"][-1]["case"] == "half"
        raise BenchError("the other side went away")

    monkeypatch.setattr(cases, "own_parts", failing)
    assert train.main(["--shapes", "small", "--only", "peers", "parts", "--json", str(target)]) == 3
    written = json.loads(target.read_text())
    assert [row["case"] for row in written["rows"]] == [
        "d32_n256_k4_b128_torch", "d32_n256_k4_b128_torch_selection", "half",
    ]  # fmt: skip
    assert written["machine"]["failed"] == ["d32_n256_k4_b128 parts: the other side went away"]
    assert written["machine"]["left out"].startswith("other trainers")
    speeds = written["machine"]["tokens_per_s of the rounds"]["d32_n256_k4_b128"]
    assert {name: len(values) for name, values in speeds.items()} == {"torch": 2, "floor": 2}
    assert "half" in capsys.readouterr().out


def test_the_toy_dictionary_is_found_by_training_and_not_by_chance():
    problem = toy_dictionary.Problem(d_in=16, truths=32, num_latents=64, k=3, tokens=60_000, batch_tokens=256)
    found = {row.unit: row for row in toy_dictionary.rows(problem, {"topk": {}})}
    assert found["recovered_share"].ours > found["recovered_share"].theirs + 0.3
    toy = Superposition(16, 32, draws=3)
    before, _ = toy_dictionary.trained(toy, problem, {})
    assert found["mean_max_cosine"].theirs == dictionary_recovery(before.W_dec_FD, toy.truth_MD)["mean_max_cosine"]


def test_the_toy_dictionary_command_writes_numbers(tmp_path, capsys):
    assert toy_dictionary.main(["--tokens", "4096", "--threads", "1", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(0 < row["ratio"] < 1000 for row in rows if row["unit"] == "mean_max_cosine")
    assert "topk" in capsys.readouterr().out


@pytest.mark.skipif(not TRAIN_PEER_PYTHON.exists(), reason="the peers' environment is not there: make bench-env")
@pytest.mark.parametrize("library", ["sparsify", "saelens", "dictionary_learning"])
def test_a_peer_trains_on_the_same_rows(library):
    (peer, *_) = (peer for peer in cases.PEERS if peer.library == library)
    request = {"shape": TINY.request(), "threads": 1, "steps": 40, "lr": 2e-3}
    with cases.library_worker(library, 1) as worker, cases.ours_worker(1) as ours:
        checksum = worker.ask("load", side=library, options=peer.options, **request)["checksum"]
        assert checksum == ours.ask("load", side="floor", **request)["checksum"]
        before = worker.ask("fvu", rows=512)["fvu"]
        worker.ask("advance", to_step=40)
        assert worker.ask("fvu", rows=512)["fvu"] < before
        assert worker.ask("memory")["bytes"] > 0
