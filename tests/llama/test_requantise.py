"""Files that llama.cpp makes of a model: their types, their values, what is refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from pipeline.llama.identity import model_id
from pipeline.llama.model import Model
from pipeline.llama.requantise import KINDS, write_requantised
from sae.errors import LlamaError
from tests.tiny_llama import write_tiny_llama


def test_the_matrices_hold_what_gguf_py_makes_of_them_and_the_rest_stays(tmp_path):
    write_tiny_llama(tmp_path / "f32.gguf", blocks=2)
    write_requantised(tmp_path / "f32.gguf", tmp_path / "made" / "q8.gguf", "Q8_0", n_threads=1)
    source = {t.name: t for t in gguf.GGUFReader(tmp_path / "f32.gguf").tensors}
    kind, matrices = gguf.GGMLQuantizationType.Q8_0, 0
    for tensor in gguf.GGUFReader(tmp_path / "made" / "q8.gguf").tensors:
        before = source.pop(tensor.name)
        if tensor.tensor_type == kind:
            matrices += 1
            theirs = gguf.quants.dequantize(tensor.data, kind)
            ours = gguf.quants.dequantize(gguf.quants.quantize(before.data, kind), kind)
            step = np.abs(before.data).reshape(-1, 32).max(axis=1).repeat(32).reshape(theirs.shape) / 127
            assert (np.abs(theirs - ours) <= 1.01 * step).all()  # a tie may round the other way
            assert (np.abs(theirs - before.data) <= 0.57 * step).all()
        else:
            np.testing.assert_array_equal(tensor.data, before.data)
    assert not source
    assert matrices >= 2 * 7
    ours, theirs = (model_id(tmp_path / name) for name in ("f32.gguf", "made/q8.gguf"))
    assert (theirs.file_type, theirs.vocab_sha256) == ("Q8_0", ours.vocab_sha256)
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["q8.gguf"]
    with Model(tmp_path / "made" / "q8.gguf") as model:
        assert model.n_layer == 2


def test_every_kind_is_one_of_llama_cpp_s_types():
    assert {f"MOSTLY_{kind}" for kind in KINDS} <= {kind.name for kind in gguf.LlamaFileType}


def test_a_quantised_source_is_refused_with_llama_cpp_s_words_and_leaves_no_file(tmp_path):
    write_tiny_llama(tmp_path / "q8.gguf", blocks=1, dtype="Q8_0")
    with pytest.raises(LlamaError, match=r"could not write .*q8\.gguf as Q4_0: .*requantiz"):
        write_requantised(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0", n_threads=1)
    assert [p.name for p in tmp_path.iterdir()] == ["q8.gguf"]
