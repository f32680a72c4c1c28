"""Two ranks of torchrun (gloo) are one process: on parts of the batch, and with parts of the dictionary."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sae.errors import ConfigError
from sae.latent_ranks import LatentParallelStepper, shard_
from sae.learner import Learner, Subject
from sae.losses import LossSettings
from sae.options import SAEOptions
from sae.ranks import Ranks
from sae.steppers import TorchStepper
from sae.variants import VARIANTS
from sae.wiring import Wiring

from .toy import Toy
from .train_ranks import CONFIG, FIELDS

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(folder, *words, ranks):
    folder.mkdir(exist_ok=True)
    start = TORCHRUN if ranks == 2 else []
    command = [sys.executable, *start, "-m", "tests.sae.train_ranks", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [path.read_text() for path in sorted(folder.glob("rank-*.txt"))]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(folder / "one", ranks=1)
    return folder / "one"


@pytest.fixture(scope="module", params=["data", "latent"])
def both(request, one, tmp_path_factory):
    """The folders of one process and of two, what the two left, and how they shared the work."""
    two = tmp_path_factory.mktemp(request.param) / "two"
    return one, two, run(two, request.param, ranks=2), request.param


def test_two_ranks_end_where_one_process_does(both):
    *folders, hashes, kind = both
    most = {"data": 1e-3, "latent": 2e-5}[kind]
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]  # every rank made the same updates
    one, two = (np.load(folder / "weights.npz") for folder in folders)
    for name in ("a", "b"):
        for field in FIELDS:
            a, b = one[f"{name}.{field}"], two[f"{name}.{field}"]
            assert a.shape == b.shape
            assert np.linalg.norm(a - b) <= most * np.linalg.norm(a), (name, field)
    rows = [json.loads((folder / "rows.json").read_text()) for folder in folders]
    assert rows[0]["a"][-1]["revived_total"] > 0  # AuxK ran
    for a, b in zip(rows[0]["a"] + rows[0]["b"], rows[1]["a"] + rows[1]["b"], strict=True):
        for key in ("fvu", "l0", "loss", "auxk_loss"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key
        assert b["tokens"] == a["tokens"]


def test_ranks_of_which_one_is_stopped_all_stop_and_resume_to_the_same_bits(both, tmp_path):
    _, _, hashes, kind = both
    messages = run(tmp_path, kind, "stop=10", ranks=2)
    assert messages[1].startswith("SIGTERM after step 11 of 24")
    assert messages[0].startswith("another rank was stopped after step 11 of 24")
    assert run(tmp_path, kind, "resume", ranks=2) == hashes


@pytest.mark.parametrize(
    ("kind", "settings", "most"),
    [
        ("latent", ["encoder_dtype=bfloat16", "kernel=torch"], 1e-3),
        ("latent", ["optimizer=signum", "lr=1e-3"], 1e-3),
    ],
)
def test_two_ranks_with_other_settings_end_where_one_process_does(tmp_path, kind, settings, most):
    folders = [tmp_path / "one", tmp_path / "two"]
    run(folders[0], *settings, ranks=1)
    hashes = run(folders[1], kind, *settings, ranks=2)
    assert hashes[0] == hashes[1]
    one, two = (np.load(folder / "weights.npz") for folder in folders)
    for key in one:
        if not key.endswith("freq_F"):
            assert np.linalg.norm(one[key] - two[key]) <= most * np.linalg.norm(one[key]), key
    rows = [json.loads((folder / "rows.json").read_text()) for folder in folders]
    for a, b in zip(rows[0]["a"] + rows[0]["b"], rows[1]["a"] + rows[1]["b"], strict=True):
        assert (b["fvu"], b["l0"]) == pytest.approx((a["fvu"], a["l0"]), rel=1e-3)
    assert rows[0]["a"][-1]["fvu"] < rows[0]["a"][0]["fvu"]


def on_two_ranks(**changes):
    """The learner of the first of two ranks: nothing is sent before a step."""
    toy = Toy(batch=256)
    subject = Subject(d_in=toy.d_in, **toy.statistics())
    return Learner(replace(CONFIG, **changes), subject, torch.device("cpu"), Ranks(0, 2))


@pytest.mark.parametrize("parallel", ["data", "latent"])
@pytest.mark.parametrize("kernel", ["native", "triton"])
def test_a_kernel_that_ranks_do_not_have_is_refused(parallel, kernel):
    with pytest.raises(ConfigError, match=f"kernel={kernel} trains in one process; 2 ranks train by torch's"):
        on_two_ranks(parallel=parallel, kernel=kernel)


@pytest.mark.parametrize("fast", [True, False])
def test_the_dtype_that_ranks_choose_by_is_that_of_torchs_step(monkeypatch, fast):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast, raising=False)
    wanted = torch.bfloat16 if fast else torch.float32
    assert on_two_ranks(encoder_dtype="auto").encoder_dtype == wanted
    assert on_two_ranks(encoder_dtype="auto", parallel="latent").encoder_dtype == wanted


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ConfigError, match="a multiple of the 3 ranks, got 10"):
        Ranks(1, 3).part(torch.zeros(10, 2))
    parts = [Ranks(rank, 2).part(torch.arange(6)) for rank in range(2)]
    assert torch.equal(torch.cat(parts), torch.arange(6))


def shard(world=2, rank=0, **changes):
    config = replace(CONFIG, parallel="latent", **changes)
    size = {"d_in": 8, "num_latents": config.num_latents, "k": config.k, "mean_D": np.zeros(8), "scale": 1.0}
    model = VARIANTS[config.variant](generator=torch.Generator().manual_seed(0), **size)
    whole = {name: getattr(model, name).detach().clone() for name in FIELDS[:4]}
    shard_(model, config=config, ranks=Ranks(rank, world))
    return model, whole


def stepped(config, settings):
    """A stepper of one process after a step, so that Adam has its moments."""
    model = VARIANTS["topk"](
        d_in=8, num_latents=config.num_latents, k=config.k, mean_D=np.zeros(8), scale=1.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    stepper = TorchStepper(model, settings, config)
    stepper.step(torch.randn(64, 8, generator=torch.Generator().manual_seed(1)), lr=1e-3)
    return stepper


def tensors(state: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], torch.Tensor]:
    """The tensors of nested dictionaries, by their path."""
    if isinstance(state, torch.Tensor):
        return {path: state}
    if not isinstance(state, dict):
        return {}
    return {at: tensor for key, value in state.items() for at, tensor in tensors(value, (*path, key)).items()}


def test_ranks_hold_their_parts_of_the_dictionary_and_of_the_optimizers_state():
    parts = [shard(world=4, rank=rank)[0] for rank in range(4)]
    _, whole = shard()
    for name in ("W_enc_FD", "W_dec_FD", "b_enc_F"):
        assert torch.equal(torch.cat([getattr(part, name).detach() for part in parts]), whole[name])
        assert len(getattr(parts[0], name)) == CONFIG.num_latents // 4
    assert all(torch.equal(part.b_dec_D.detach(), whole["b_dec_D"]) for part in parts)
    settings = LossSettings(variance=8.0, auxk_k=4, auxk_coef=1 / 32)
    for optimizer in ("adam", "signum"):
        config = replace(CONFIG, optimizer=optimizer)
        state = stepped(config, settings).state_dict()
        ours = [LatentParallelStepper(part, settings, config, Ranks(rank, 4)) for rank, part in enumerate(parts)]
        own = [stepper.own(state) for stepper in ours]
        assert tensors(own[2]).keys() == tensors(state).keys()
        for path, tensor in tensors(state).items():
            found = [tensors(part)[path] for part in own]
            shared_out = tensor.ndim and len(tensor) == config.num_latents
            assert torch.equal(torch.cat(found) if shared_out else found[3], tensor), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "muon"}, "got topk with muon"),
        ({"variant": "batchtopk"}, "got batchtopk with adam"),
        ({"num_latents": 255}, "a multiple of the 2 ranks"),
        ({"num_latents": 8}, "k = 6 latents or more on each, got 8"),
        ({"num_latents": 64, "options": SAEOptions(k_start=40)}, "k = 40 latents or more on each, got 64"),
    ],
)
def test_what_needs_all_latents_in_one_place_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        shard(**changes)


def test_a_rank_may_hold_as_few_latents_as_fire():
    assert len(shard(num_latents=12)[0].b_enc_F) == CONFIG.k


def test_a_transcoder_is_not_split_by_latents():
    wiring = Wiring(
        kind="transcoder", inputs=(("blocks.0.hook_resid_mid", 4),), outputs=(("blocks.0.hook_mlp_out", 4),)
    )
    subject = Subject(d_in=8, mean_D=np.zeros(8), variance=4.0, hook="h", host={}, wiring=wiring, variances=(4.0, 4.0))
    config = replace(CONFIG, parallel="latent")
    with pytest.raises(ConfigError, match="that reconstructs what it reads"):
        Learner(config, subject, torch.device("cpu"), Ranks(0, 2))
