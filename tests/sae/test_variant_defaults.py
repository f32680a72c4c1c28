"""The variants with the settings they have where nobody sets any."""

from __future__ import annotations

import pytest
import torch

from sae.options import SAEOptions
from sae.train_config import TrainConfig
from sae.trainer import Trainer
from sae.variants import VARIANTS

from .toy import Toy


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_of_use_with_its_default_settings(tmp_path, name):
    rows, toy = [], Toy()
    config = TrainConfig(num_latents=256, k=8, batch_tokens=512, tokens=400 * 512, variant=name, log_steps=50)
    Trainer(config, toy, **toy.statistics(), folder=tmp_path, log=rows.append).fit()
    assert rows[-1]["fvu"] < 0.5
    assert 3 < rows[-1]["l0"] < 64


@pytest.mark.parametrize("latents", [64, 256, 2048])
@pytest.mark.parametrize("threshold_start", [1.0, 2.0])
def test_jumprelu_starts_with_the_same_share_of_latents_whatever_the_sizes(tmp_path, latents, threshold_start):
    toy, options = Toy(), SAEOptions(threshold_start=threshold_start)
    config = TrainConfig(num_latents=latents, k=8, batch_tokens=512, variant="jumprelu", options=options)
    model = Trainer(config, toy, **toy.statistics(), folder=tmp_path).model
    u_ND = model.b_dec_D + model.unit * torch.randn(2000, model.d_in, generator=torch.Generator().manual_seed(0))
    share = float((model.acts(model.pre_acts(u_ND)) > 0).float().mean())
    assert share == pytest.approx({1.0: 0.1587, 2.0: 0.0228}[threshold_start], rel=0.1)  # P(g > z)
