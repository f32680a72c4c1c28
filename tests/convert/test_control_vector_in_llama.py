"""A latent's control vector, applied by llama.cpp itself, against the same steering in the callback."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from llama_cpp import llama_cpp

from convert.control_vector import read_control_vector, write_control_vector
from pipeline.interventions.base import Where
from pipeline.interventions.steer import Steer
from pipeline.llama.hooks import HookPoint
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


@pytest.mark.parametrize("block", range(1, BLOCKS))
def test_llama_cpp_moves_the_logits_as_steering_does_bit_for_bit(tmp_path, block):
    tokens, sae = prompt(), sae_at(2)
    directions = {block: np.float32(6.0) * sae.W_dec_FD[5]}
    path = write_control_vector(tmp_path / "cv.gguf", directions, model_hint="llama", n_layer=BLOCKS)
    where = Where(positions=tuple(range(len(tokens))))  # a control vector moves BOS too
    steer = Steer(
        point=HookPoint.parse(f"blocks.{block}.hook_resid_post"), weights=sae, latents=(5,), coeffs=(6.0,), where=where
    )
    steered = run(session(), tokens, [steer])
    np.testing.assert_array_equal(logits_under(path, tokens), steered)
    assert np.abs(steered - run(session(), tokens)).max() > 0.1


def test_several_blocks_at_once(tmp_path):
    tokens, sae = prompt(), sae_at(2)
    directions = {block: np.float32(3.0) * sae.W_dec_FD[block] for block in (1, 3)}
    path = write_control_vector(tmp_path / "cv.gguf", directions, model_hint="llama", n_layer=BLOCKS)
    where = Where(positions=tuple(range(len(tokens))))
    steers = [
        Steer(
            point=HookPoint.parse(f"blocks.{b}.hook_resid_post"), weights=sae, latents=(b,), coeffs=(3.0,), where=where
        )
        for b in (1, 3)
    ]
    np.testing.assert_array_equal(logits_under(path, tokens), run(session(), tokens, steers))
