"""`sae.init_from`: what a training cannot start from is refused with what is there and what is wanted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import Config, SAEConfig
from pipeline.run import RunContext
from pipeline.stages.rows import TrainingRows
from pipeline.stages.train import start_sae
from sae.checkpoint import save_weights
from sae.errors import ConfigError, ModelMismatchError
from sae.options import SAEOptions
from sae.runtime import decode, encode
from sae.train_config import TrainConfig
from sae.trainer import Trainer
from tests.sae.toy import D, Toy, random_weights

HOST = {"architecture": "llama", "n_embd": D, "n_layer": 2, "vocab_sha256": "v", "sha256": "f", "file_type": "F16"}
HOST |= {"name": "tiny"}
HOOK = "blocks.0.hook_resid_post"


def weights(**extra):
    fields = {"hook": HOOK, "host": HOST} | extra
    return random_weights(np.random.default_rng(0), d=D, latents=64, k=4, **fields)


def started(tmp_path, start, host=HOST):
    """What `start_sae` gives for rows of HOOK, and what it said."""
    save_weights(tmp_path / "start", start)
    config = replace(Config(), sae=SAEConfig(init_from=str(tmp_path / "start")))
    context, toy = RunContext(command="train", folder=tmp_path, config=config), Toy()
    rows = TrainingRows(
        source=toy, describe=lambda: "", finish=lambda w: w, **toy.statistics() | {"hook": HOOK, "host": host}
    )
    with context.console.capture() as said:
        found = start_sae(context, rows)
    assert context.inputs["init_from"]["sha256"]
    return found, said.get()


def test_an_sae_of_the_same_hook_point_and_model_is_taken(tmp_path):
    found, said = started(tmp_path, weights())
    np.testing.assert_array_equal(found.W_enc_FD, weights().W_enc_FD)
    assert said == ""


def test_another_hook_point_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is an SAE of blocks\.1\.hook_resid_post, the rows are of blocks\.0"):
        started(tmp_path, weights(hook="blocks.1.hook_resid_post"))


def test_another_model_is_refused_and_another_quantisation_of_it_is_said(tmp_path):
    with pytest.raises(ModelMismatchError, match=r"number of blocks 2, this model \(tiny\) has 3"):
        started(tmp_path, weights(), HOST | {"n_layer": 3})
    found, said = started(tmp_path, weights(), HOST | {"sha256": "g", "file_type": "Q4_0"})
    assert found is not None
    assert "warning: sae.init_from" in said


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"num_latents": 32}, "has 32 latents of width 32, this run 64 of 32"),
        ({"hook_out": "blocks.0.hook_mlp_out", "b_dec_subtracted": False}, "not both an SAE, a transcoder"),
        ({"norm_mode": "layer"}, "norm mode 'layer'"),
        ({"rows": np.linspace(1, 2, 64)[:, None]}, "decoder rows of norm 1 to 2: its top-k would choose others"),
    ],
)
def test_what_does_not_fit_the_training_is_refused(tmp_path, start, message):
    fields = dict(start)
    latents, norm = fields.pop("num_latents", 64), fields.pop("rows", 1.0)
    other = random_weights(np.random.default_rng(0), d=D, latents=latents, k=4, hook=HOOK, **fields)
    other = replace(other, W_dec_FD=norm * other.W_dec_FD)
    config, toy = TrainConfig(num_latents=64, k=4, batch_tokens=128, tokens=256, encoder_dtype="float32"), Toy(128)
    with pytest.raises(ConfigError, match=message):
        Trainer(config, toy, **toy.statistics(), folder=tmp_path, start=other).fit()


@pytest.mark.parametrize("rows", ["unit", "free"])
def test_decoder_rows_of_one_length_leave_the_choice_as_it_is(tmp_path, rows):
    start = weights()
    start = replace(start, W_dec_FD=2 * start.W_dec_FD)
    options = SAEOptions(decoder_rows=rows)
    config, toy = TrainConfig(num_latents=64, k=4, batch_tokens=128, options=options, encoder_dtype="float32"), Toy(128)
    found = Trainer(config, toy, **toy.statistics(), folder=tmp_path, start=start).weights()
    x_ND = toy.rows(200, 5)
    expected_ND = decode(start, *encode(start, x_ND))
    np.testing.assert_allclose(decode(found, *encode(found, x_ND)), expected_ND, rtol=1e-4, atol=1e-3)
