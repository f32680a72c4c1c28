"""The step on parts of a dictionary, one thread to a rank, against float64 on the whole; `test_ranks.py` has processes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from sae.latent_ranks import LatentParallelStep, own_rows, shard_
from sae.losses import dense_step
from sae.options import SAEOptions
from sae.ranks import Ranks
from sae.train_config import TrainConfig

from .test_model_and_kernels import batch, gradients, loss_settings, make, relative

D, F, K, N = 24, 240, 6, 90
SHARED_OUT = ("W_enc_FD", "W_dec_FD", "b_enc_F")


class Threads(Ranks):
    """Ranks that hand each other their tensors in memory."""

    def __init__(self, rank, world, barrier, slots):
        super().__init__(rank, world)
        self.barrier, self.slots = barrier, slots

    def all(self, tensor):
        self.slots[self.rank] = tensor.clone()
        self.barrier.wait(timeout=20)
        found = list(self.slots)
        self.barrier.wait(timeout=20)
        return found

    def sum(self, tensor):
        return torch.stack(self.all(tensor)).sum(0)

    def gather(self, tensor, dim=0):
        return torch.cat(self.all(tensor), dim)


def stepped(model, settings, world, u_ND, dead_F):
    """What each rank's step gave, and its model with the gradients of its latents."""
    barrier, slots = Barrier(world), [None] * world
    config = TrainConfig(num_latents=F, k=K, parallel="latent")

    def one(rank):
        ranks, part = Threads(rank, world, barrier, slots), copy.deepcopy(model)
        shard_(part, config=config, ranks=ranks)
        return LatentParallelStep(part, settings, ranks)(u_ND, dead_F), part

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def assert_one_process(model, u_ND, *, world=3, dead_F=None, auxk_k=10):
    """Gives the oracle's result."""
    settings, oracle = loss_settings(auxk_k=auxk_k), copy.deepcopy(model).double()
    expected = dense_step(oracle, u_ND.double(), settings, dead_F)
    found = stepped(model, settings, world, u_ND, dead_F)
    for result, part in found:
        assert torch.equal(result.fired_F, expected.fired_F)
        for name in ("error", "auxk_loss", "loss"):
            assert float(getattr(result, name)) == pytest.approx(float(getattr(expected, name)), rel=1e-5), name
        assert relative(part.b_dec_D.grad.double(), oracle.b_dec_D.grad) < 1e-5
    for name in SHARED_OUT:
        whole = torch.cat([getattr(part, name).grad for _, part in found])
        assert relative(whole.double(), gradients(oracle)[name]) < 1e-5, name
    return expected


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_gradients_of_the_parts_are_those_of_the_whole(world):
    assert_one_process(make(d=D, latents=F, k=K), batch(1, N, D), world=world)


def test_a_k_that_falls_is_the_ranks_too():
    model = make(d=D, latents=F, k=K)
    model.options = SAEOptions(k_start=20)
    model.schedule_(0, 100)
    expected = assert_one_process(model, batch(1, N, D))
    assert int(expected.fired_F.sum()) == 20 * N


def test_rows_with_fewer_latents_above_zero_than_k_take_these_only():
    model = make(d=D, latents=F, k=K)
    with torch.no_grad():
        model.b_enc_F[4:] = -1e3
    expected = assert_one_process(model, batch(1, N, D))
    assert 0 < int(expected.fired_F.sum()) < K * N


@pytest.mark.parametrize("where", ["row", "weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_the_loss_of_every_rank(where, value):
    model, u_ND = make(d=D, latents=F, k=K), batch(1, N, D)
    with torch.no_grad():
        (u_ND if where == "row" else model.W_enc_FD)[5, 3] = value
    for result, _ in stepped(model, loss_settings(), 3, u_ND, None):
        assert not result.loss.isfinite()


@pytest.mark.parametrize("auxk_k", [1, 10, 500])
@pytest.mark.parametrize("dead", ["all on one rank", "few on one and many on another", "one", "spread out"])
def test_the_auxiliary_latents_are_the_largest_of_the_dead_of_all_ranks(dead, auxk_k):
    dead_F = torch.zeros(F, dtype=torch.bool)
    at = {
        "all on one rank": range(80, 110),
        "few on one and many on another": (3, *range(160, 200)),
        "one": (239,),
        "spread out": range(0, F, 5),
    }
    dead_F[list(at[dead])] = True
    model = make(d=D, latents=F, k=K)
    with torch.no_grad():
        model.b_enc_F[dead_F] -= 3.0  # that they matter is seen: not all are above zero
    expected = assert_one_process(model, batch(1, N, D), dead_F=dead_F, auxk_k=auxk_k)
    assert float(expected.auxk_loss) > 0
    assert own_rows(dead_F, Ranks(2, 3)).sum() == dead_F[160:].sum()
