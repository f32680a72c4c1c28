"""Which model a file holds, and the one-line refusals of files that hold none."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import struct

import gguf
import numpy as np
import pytest

from pipeline.llama import identity
from pipeline.llama.identity import ModelId, check_same_model, model_id
from pipeline.llama.model import Model
from sae.errors import FormatError, ModelMismatchError
from tests.tiny_llama import tokenizer, write_tiny_llama


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path, blocks=1)
    return path


def refused(path) -> str:
    with pytest.raises(FormatError) as caught:
        Model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_the_identity_is_that_of_the_file(gguf_file):
    found = model_id(gguf_file)
    words = sorted(tokenizer().get_vocab().items(), key=lambda item: item[1])
    packed = b"".join(struct.pack("<I", len(w.encode())) + w.encode() for w, _ in words)
    assert found == ModelId(
        sha256=hashlib.sha256(gguf_file.read_bytes()).hexdigest(),
        architecture="llama",
        n_embd=64,
        n_layer=1,
        file_type="F32",
        vocab_sha256=hashlib.sha256(packed).hexdigest(),
        name="tiny",
    )
    assert ModelId.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_hashes_are_kept_until_the_file_changes(gguf_file, cache_folder, monkeypatch):
    first = model_id(gguf_file)
    assert len(list(cache_folder.rglob("*.json"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(identity, "open_gguf", lambda _path: pytest.fail("read again"))
        assert model_id(gguf_file) == first
    write_tiny_llama(gguf_file, blocks=1, seed=1)
    assert model_id(gguf_file).sha256 == hashlib.sha256(gguf_file.read_bytes()).hexdigest() != first.sha256


def test_a_damaged_or_unwritable_cache_costs_nothing_but_time(gguf_file, cache_folder):
    first = model_id(gguf_file)
    (entry,) = cache_folder.rglob("*.json")
    for damage in (b"", b"{", b"[]", b'{"stamp": 1}', b"\xff"):
        entry.write_bytes(damage)
        assert model_id(gguf_file) == first
    entry.unlink()
    entry.parent.rmdir()
    entry.parent.write_text("a file where the folder should be")
    assert model_id(gguf_file) == first


def test_a_missing_file_an_empty_one_and_a_folder_are_refused(tmp_path):
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert "no such model file" in refused(tmp_path / "none.gguf")
    assert "is empty" in refused(tmp_path / "empty.gguf")
    assert "folder" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip", b"GGU", b"\0" * 100, b"text" * 50])
def test_a_file_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "other.gguf").write_bytes(content)
    assert "not a GGUF file" in refused(tmp_path / "other.gguf")


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.02, 0.3, 0.7, 0.999, 1.0])
def test_a_truncated_file_is_refused_wherever_it_ends(gguf_file, tmp_path, share):
    data = gguf_file.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(data[: max(4, min(len(data) - 1, int(len(data) * share)))])
    assert "truncated" in refused(short)


def test_random_damage_to_the_header_never_escapes_as_another_error(gguf_file, tmp_path):
    data, rng = bytearray(gguf_file.read_bytes()), np.random.default_rng(0)
    for number in range(30):
        damaged = data.copy()
        for at in rng.integers(4, 400, 3):
            damaged[at] = rng.integers(256)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        with contextlib.suppress(FormatError):
            model_id(path)


def test_a_gguf_that_is_no_language_model_is_refused(tmp_path):
    path = tmp_path / "sae.gguf"
    writer = gguf.GGUFWriter(path, "sae")
    writer.add_tensor("sae.0.enc.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "no language model (its general.architecture is 'sae')" in refused(path)


def test_the_same_model_in_another_file_only_warns(gguf_file):
    actual = model_id(gguf_file)
    assert check_same_model(actual.as_dict(), actual) == []
    (warning,) = check_same_model(actual.as_dict() | {"sha256": "0" * 64}, actual)
    assert warning == (
        "this SAE was made on another file (different sha256) of the same shape: another quantisation, or other weights"
    )
    (warning,) = check_same_model(actual.as_dict() | {"file_type": "Q4_K_M", "sha256": "0" * 64}, actual)
    assert "made on Q4_K_M weights, this file has F32" in warning


@pytest.mark.parametrize(
    "change", [{"architecture": "qwen2"}, {"n_embd": 32}, {"n_layer": 9}, {"vocab_sha256": "0" * 64}]
)
def test_another_model_is_refused_unless_allowed(gguf_file, change):
    actual = model_id(gguf_file)
    with pytest.raises(ModelMismatchError, match=r"^this SAE was made on a model with .*give the model it belongs to$"):
        check_same_model(actual.as_dict() | change, actual)
    with pytest.raises(ModelMismatchError, match=r"^this store .*, or apply\.allow=true to try anyway$"):
        check_same_model(actual.as_dict() | change, actual, what="this store", setting="apply.allow=true")
    assert len(check_same_model(actual.as_dict() | change, actual, allow_mismatch=True)) == 1


def test_hashes_that_are_not_recorded_warn(gguf_file):
    actual = model_id(gguf_file)
    (warning,) = check_same_model(actual.as_dict() | {"vocab_sha256": ""}, actual)
    assert "vocabulary" in warning
    assert len(check_same_model({}, dataclasses.replace(actual))) == 4


def test_a_description_that_lacks_a_key_is_named():
    with pytest.raises(FormatError, match="lacks 'sha256'"):
        ModelId.from_dict({})
