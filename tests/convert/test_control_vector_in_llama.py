"""Control vectors of latents, applied by llama.cpp itself, against the same steering in the callback."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest
from llama_cpp import llama_cpp

from convert.control_vector import read_control_vector, write_control_vector
from pipeline.interventions.base import Where
from pipeline.interventions.steer import Steer
from pipeline.llama.hooks import HookPoint
from pipeline.stages.cvector import direction, summed
from sae.errors import ConfigError
from tests.interventions.tiny import BLOCKS, D, prompt, run, sae_at, session


def logits_under(path, tokens) -> np.ndarray:
    """The buffer llama.cpp's own loader makes: block L at row L - 1, then all blocks 1 .. n-1 in force."""
    data = np.zeros((BLOCKS - 1, D), np.float32)
    for block, direction_D in read_control_vector(path).items():
        data[block - 1] = direction_D
    s = session()
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama_cpp.llama_set_adapter_cvec(s._handle, pointer, data.size, D, 1, BLOCKS - 1) == 0
    return run(s, tokens)


def steer_of(sae, block, latents, coeffs, tokens):
    where = Where(positions=tuple(range(len(tokens))))  # a control vector moves BOS too
    point = HookPoint.parse(f"blocks.{block}.hook_resid_post")
    return Steer(point=point, weights=sae, latents=latents, coeffs=coeffs, where=where)


@pytest.mark.parametrize("block", range(1, BLOCKS))
def test_llama_cpp_moves_the_logits_as_steering_does_bit_for_bit(tmp_path, block):
    tokens, sae = prompt(), sae_at(2)
    found = direction(sae, [5], [6.0], block=block)
    path = write_control_vector(tmp_path / "cv.gguf", summed([found]), model_hint="llama", n_layer=BLOCKS)
    steered = run(session(), tokens, [steer_of(sae, block, (5,), (6.0,), tokens)])
    np.testing.assert_array_equal(logits_under(path, tokens), steered)
    assert np.abs(steered - run(session(), tokens)).max() > 0.1


@pytest.mark.parametrize("block", [2, 3])
def test_an_sae_before_a_block_moves_the_logits_as_steering_there_does(tmp_path, block):
    tokens, point = prompt(), HookPoint.parse(f"blocks.{block}.hook_resid_pre")
    sae = dataclasses.replace(sae_at(2), hook=str(point))
    found = direction(sae, [5, 9], [6.0, -3.0])
    assert found[0] == block - 1
    path = write_control_vector(tmp_path / "cv.gguf", summed([found]), model_hint="llama", n_layer=BLOCKS)
    where = Where(positions=tuple(range(len(tokens))))
    steer = Steer(point=point, weights=sae, latents=(5, 9), coeffs=(6.0, -3.0), where=where)
    np.testing.assert_array_equal(logits_under(path, tokens), run(session(), tokens, [steer]))


def test_several_latents_of_several_saes_at_several_blocks_bit_for_bit(tmp_path):
    tokens = prompt()
    wanted = {1: ((5, 9, 40), (3.1, -2.7, 0.3)), 2: ((7,), (-4.0,)), 3: ((0, 127), (1.5, 2.25))}
    saes = {block: sae_at(block, seed=block) for block in wanted}
    found = [direction(saes[block], *which) for block, which in wanted.items()]
    assert [block for block, _ in found] == list(wanted)
    path = write_control_vector(tmp_path / "cv.gguf", summed(found), model_hint="llama", n_layer=BLOCKS)
    steers = [steer_of(saes[block], block, *which, tokens) for block, which in wanted.items()]
    steered = run(session(), tokens, steers)
    np.testing.assert_array_equal(logits_under(path, tokens), steered)
    for left_out in range(3):  # every block matters
        assert np.abs(run(session(), tokens, steers[:left_out] + steers[left_out + 1 :]) - steered).max() > 1e-2


def test_sums_at_one_block_are_added_in_float64():
    parts = [np.full(4, value, np.float32) for value in (1.0, 2.0**-24, 2.0**-24)]
    total = summed([(1, part) for part in parts])
    np.testing.assert_array_equal(total[1], np.full(4, 1 + 2.0**-23, np.float32))


def test_an_sae_that_no_control_vector_can_stand_for_is_refused():
    sae = sae_at(2)
    with pytest.raises(ConfigError, match="units of its sigma"):
        direction(dataclasses.replace(sae, norm_mode="layer", norm_eps=1e-5), [1], [1.0])
    with pytest.raises(ConfigError, match=r"added to a block's output, this SAE reads blocks\.2\.hook_mlp_out"):
        direction(dataclasses.replace(sae, hook="blocks.2.hook_mlp_out"), [1], [1.0])
    with pytest.raises(
        ConfigError, match=r"reads blocks\.0\.hook_resid_pre; .*\[\{latents:\[1\],coeffs:\[2\.0\],block:1\}\]"
    ):
        direction(dataclasses.replace(sae, hook="blocks.0.hook_resid_pre"), [1], [2.0])
    block, _ = direction(dataclasses.replace(sae, hook="blocks.2.hook_mlp_out"), [1], [1.0], block=3)
    assert block == 3
