from __future__ import annotations

import gguf
import numpy as np
import pytest

from convert.control_vector import read_control_vector, write_control_vector
from convert.sae_gguf import write_sae_gguf
from sae.errors import ConfigError, FormatError, ShapeError

from .test_sae_gguf import random_sae


def test_directions_keep_their_scale_and_their_block(tmp_path):
    rng = np.random.default_rng(0)
    directions = {block: (7.5 * rng.standard_normal(64)).astype(np.float32) for block in (1, 3)}
    path = write_control_vector(tmp_path / "cv.gguf", directions, model_hint="llama", n_layer=4)
    back = read_control_vector(path)
    assert sorted(back) == [1, 3]
    for block, direction_D in directions.items():
        np.testing.assert_array_equal(back[block], direction_D)
    reader = gguf.GGUFReader(path)
    assert {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors} == {
        "direction.1": ("F32", [64]),
        "direction.3": ("F32", [64]),
    }
    field = reader.get_field("controlvector.layer_count")
    assert field is not None
    assert field.types == [gguf.GGUFValueType.INT32]


def test_block_0_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigError, match=r"reads direction\.1 and up only"):
        write_control_vector(tmp_path / "cv.gguf", {0: np.ones(64)}, model_hint="llama", n_layer=4)


@pytest.mark.parametrize(
    ("directions", "error", "message"),
    [
        ({4: np.ones(64)}, ConfigError, r"block 4 does not exist, the model has blocks 0\.\.3"),
        ({}, ConfigError, "at least one direction"),
        ({1: np.ones(64), 2: np.ones(65)}, ShapeError, r"got shapes \[\(64,\), \(65,\)\]"),
        ({1: np.full(64, np.nan)}, FormatError, "not finite"),
    ],
)
def test_directions_that_cannot_be_are_refused(tmp_path, directions, error, message):
    with pytest.raises(error, match=message):
        write_control_vector(tmp_path / "cv.gguf", directions, model_hint="llama", n_layer=4)
    assert list(tmp_path.iterdir()) == []


def test_an_sae_is_refused_as_a_control_vector(tmp_path):
    path = write_sae_gguf(tmp_path / "sae.gguf", random_sae())
    with pytest.raises(FormatError, match="'sae', expected 'controlvector'"):
        read_control_vector(path)


def test_a_direction_that_llama_cpp_would_not_read_is_refused(tmp_path):
    path = write_control_vector(tmp_path / "cv.gguf", {1: np.ones(64)}, model_hint="llama", n_layer=4)
    path.write_bytes(path.read_bytes().replace(b"direction.1", b"direction.0"))
    with pytest.raises(FormatError, match=r"unexpected tensor 'direction\.0'"):
        read_control_vector(path)
