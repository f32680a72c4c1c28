"""Files that nobody vouches for: each is refused in one line, nothing in them runs, nothing outside is opened."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.interop import reading
from convert.interop.reading import read_arrays, read_json
from sae.errors import FormatError, SAEError

from .oracles import draw, imported, write
from .test_saelens import config, folder, tensors


def refused(path, said):
    with pytest.raises(FormatError, match=said) as caught:
        read_arrays(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def refusal(kind, call, path):
    """The message of an error of this kind, "" where there was none; any other error comes through."""
    try:
        call(path)
    except kind as error:
        return str(error)
    return ""


def header(entries, body=b"", length=None):
    raw = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"t": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(("data", "said"), [
    (b"", "truncated"),
    (b"abc", "truncated"),
    (header(tensor(), b"\0" * 8, length=1 << 60), "header of 1152921504606846976 bytes"),
    (header(b"[" * 100_000), "no JSON"),
    (header(b"[1]    "), "no JSON object"),
    (header(tensor(), b"\0" * 7), "does not fit"),
    (header(tensor(shape=(1 << 40, 1 << 40)), b"\0" * 8), "does not fit"),
    (header(tensor(offsets=(8, 0)), b"\0" * 8), "does not fit"),
    (header(tensor(offsets=(-8, 0)), b"\0" * 8), "whole numbers"),
    (header(tensor(shape=(True, 2)), b"\0" * 8), "whole numbers"),
    (header(tensor(shape=(2.0,)), b"\0" * 8), "whole numbers"),
    (header({"t": {"dtype": "F32"}}, b"\0" * 8), "whole numbers"),
    (header({"t": 3}), "whole numbers"),
    (header(tensor(dtype="F8_E4M3"), b"\0" * 8), "not read"),
])  # fmt: skip
def test_damaged_safetensors(tmp_path, data, said):
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    refused(path, said)


def test_bfloat16_and_halves_are_read_exactly(tmp_path):
    values = torch.randn(5, 7)
    from safetensors.torch import save_file

    kinds = {"b": torch.bfloat16, "h": torch.float16, "d": torch.float64, "i": torch.int32}
    save_file({name: values.to(kind) for name, kind in kinds.items()}, tmp_path / "w.safetensors")
    found = read_arrays(tmp_path / "w.safetensors")
    for name, kind in kinds.items():
        np.testing.assert_array_equal(found[name], values.to(kind).to(torch.float32).numpy())


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_torch_file_or_an_npz_runs(tmp_path):
    mark = tmp_path / "it-ran"
    torch.save({"encoder.weight": Runs(mark)}, tmp_path / "a.pt")
    torch.save({"encoder.weight": Runs(mark)}, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Runs(mark)))
    np.savez(tmp_path / "params.npz", W_enc=np.array([Runs(mark)], dtype=object))
    for name in ("a.pt", "b.pth", "c.pt", "params.npz"):
        refused(tmp_path / name, "plain")
    assert not mark.exists()


def test_an_npz_member_that_is_no_array_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as packed:
        packed.writestr("W_enc.npy", b"no magic bytes")
    refused(tmp_path / "params.npz", "no array")


def test_without_torch_a_torch_file_is_one_line(tmp_path, monkeypatch):
    torch.save({"w": torch.zeros(3)}, tmp_path / "w.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(tmp_path / "w.pt", "needs torch")


def test_torch_files_that_are_not_dictionaries_of_tensors(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    refused(tmp_path / "tensor.pt", "dictionary")
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "huge.pt")
    refused(tmp_path / "huge.pt", "larger than its bytes")
    torch.save({"w": torch.zeros(3, dtype=torch.complex64)}, tmp_path / "complex.pt")
    refused(tmp_path / "complex.pt", "no plain array")
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    refused(tmp_path / "sparse.pt", "plain")
    good = tmp_path / "good.pt"
    torch.save({"w": torch.randn(50, 50)}, good)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:4000])
    refused(tmp_path / "cut.pt", "truncated")
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(tmp_path / "packed.pt", "packed records")


def test_archives_that_unpack_to_far_more_or_point_elsewhere(tmp_path):
    raw = io.BytesIO()
    np.save(raw, np.zeros(1 << 23, np.float32))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", raw.getvalue())
    refused(tmp_path / "bomb.npz", "would unpack to")
    outside = tmp_path / "inside"
    outside.mkdir()
    with zipfile.ZipFile(outside / "tricks.npz", "w") as archive:
        archive.writestr("../escaped.npy", raw.getvalue()[:400] + b"\0" * 10)
    refused(outside / "tricks.npz", "truncated|no .npz")
    assert not (tmp_path / "escaped.npy").exists()
    np.savez(tmp_path / "locked.npz", W_enc=np.zeros(3, np.float32))
    raw = bytearray((tmp_path / "locked.npz").read_bytes())
    raw[6] |= 1  # "encrypted", in the member's own header and in the directory
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.npz").write_bytes(raw)
    refused(tmp_path / "locked.npz", "encrypted")
    (tmp_path / "text.npz").write_text("PK no zip")
    refused(tmp_path / "text.npz", "no .npz")
    np.savez(tmp_path / "strings.npz", W_enc=np.array(["a"]))
    refused(tmp_path / "strings.npz", "expected numbers")


@pytest.mark.parametrize(("data", "said"), [
    (b"{", "not valid JSON"), (b"[1]", "holds a list"), (b"[" * 100_000, "not valid JSON"), (b"\xff\xfe{", "not valid JSON"),
])  # fmt: skip
def test_damaged_settings(tmp_path, data, said):
    path = tmp_path / "cfg.json"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=said):
        read_json(path)


def test_huge_settings_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "cfg.json").write_text(json.dumps({"a": "b" * 100}))
    monkeypatch.setattr(reading, "MAX_JSON", 50)
    with pytest.raises(FormatError, match="larger than"):
        read_json(tmp_path / "cfg.json")


@pytest.mark.parametrize(("name", "value", "said"), [
    ("W_enc", np.full((12, 40), np.nan, "f4"), "W_enc_FD holds NaN"), ("b_dec", np.full(12, np.inf, "f4"), "b_dec_O holds NaN or infinity"),
    ("b_enc", np.zeros(39, "f4"), "b_enc has shape"), ("W_dec", np.zeros((40, 11), "f4"), "decoder gives 11"),
    ("W_dec", np.zeros((3, 12), "f4"), "W_dec has shape"), ("W_enc", np.zeros((12,), "f4"), r"should be a matrix.*shape \(12,\)"),
    ("W_enc", np.zeros((0, 0), "f4"), "should be a matrix and not empty"), ("W_dec", np.zeros((1, 40, 12), "f4"), "should be a matrix"),
    ("b_enc", np.zeros((2, 20), "f4"), "should be a vector"),
])  # fmt: skip
def test_arrays_that_do_not_fit_or_are_not_finite(tmp_path, name, value, said):
    place = folder(tmp_path, config("standard"), tensors(draw()) | {name: value})
    with pytest.raises(FormatError, match=said):
        imported(place)


def test_no_path_of_a_config_is_followed(tmp_path):
    secret = tmp_path / "secret.safetensors"
    place = folder(tmp_path, config("standard", sae_path=str(secret), weights="../secret.safetensors"), tensors(draw()))
    secret.write_bytes(b"not read")
    assert imported(place).weights.num_latents == 40


def lines(a, b_dec="decoder.bias"):
    return {
        "encoder.weight": a["W_enc_FD"],
        "encoder.bias": a["b_enc"],
        "decoder.weight": a["W_dec_FD"].T,
        b_dec: a["b_dec"],
    }


HOOK = "blocks.3.hook_resid_post"
NORMS = {"dataset_average_activation_norm": {"in": 9.0, "out": 9.0}, "hook_point_in": HOOK, "hook_point_out": HOOK}
SETTINGS = {
    "saelens": ("cfg.json", "sae_weights.safetensors", config("topk", k=5), tensors),
    "saelens_flat": ("cfg.json", "sae_weights.safetensors", {"d_sae": 40, "hook_point": HOOK, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "scaling_factor": 1}, tensors),
    "sparsify": (
        "cfg.json", "sae.safetensors", {"d_in": 12, "k": 5, "activation": "topk", "transcode": False, "num_latents": 0},
        lambda a: {"encoder.weight": a["W_enc_FD"], "encoder.bias": a["b_enc"], "W_dec": a["W_dec_FD"], "b_dec": a["b_dec"]},
    ),
    "gemma_scope_2": (
        "config.json", "params.safetensors", {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.7.output", "model_name": "g"},
        lambda a: {"w_enc": a["W_enc_FD"].T, "w_dec": a["W_dec_FD"], **{k: a[k] for k in ("b_enc", "b_dec", "threshold")}},
    ),
    "llama_scope": ("hyperparams.json", "checkpoints/final.safetensors", NORMS | {"act_fn": "jumprelu", "jump_relu_threshold": 0.3}, lines),
    "llamascopium": ("config.json", "sae_weights.safetensors", NORMS | {"act_fn": "topk", "top_k": 5, "norm_activation": "dataset-wise"}, lines),
}  # fmt: skip


def test_many_tensors_of_the_same_bytes_are_refused_before_any_is_copied(tmp_path):
    names = [f"t{i}" for i in range(64)]
    entry = tensor(shape=(64, 1024), offsets=(0, 1 << 18))["t"]
    (tmp_path / "w.safetensors").write_bytes(header(dict.fromkeys(names, entry), b"\0" * (1 << 18)))
    refused(tmp_path / "w.safetensors", "its tensors overlap")
    shared = torch.zeros(64, 1024, dtype=torch.bfloat16)
    torch.save(dict.fromkeys(names, shared), tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "share their bytes")
    torch.save({"a": dict.fromkeys(names, shared[:])}, tmp_path / "nested.pt")
    refused(tmp_path / "nested.pt", "share their bytes")
    torch.save({"a": shared, "b": shared}, tmp_path / "tied.pt")
    assert read_arrays(tmp_path / "tied.pt")["b"].shape == (64, 1024)


def test_members_of_an_archive_that_overlap_are_refused(tmp_path):
    """Two entries of the directory name the same local file, as in an archive that unpacks to far more than it is."""
    path = tmp_path / "w.npz"
    np.savez(path, a=np.ones(5000, "f4"), b=np.zeros(5000, "f4"))
    whole = path.read_bytes()
    first, directory = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    entry = whole[first : whole.index(b"PK\1\2", first + 1)]
    end = bytearray(whole[directory:])
    end[8:12] = struct.pack("<HH", 3, 3)
    end[12:16] = struct.pack("<I", 3 * len(entry))
    path.write_bytes(whole[:first] + entry * 3 + bytes(end))
    refused(path, "members overlap|Overlapped|Overlap")


def test_a_pipe_is_no_sae_and_no_other_file_is_taken_for_it(tmp_path):
    torch.save({"W_enc": torch.ones(3, 4)}, tmp_path / "other.pt")
    os.mkfifo(tmp_path / "sae.pt")
    with pytest.raises(FormatError, match=r"sae\.pt is neither a folder nor a file"):
        imported(tmp_path / "sae.pt")


def test_what_torch_refuses_is_said_without_its_advice_to_unpickle(tmp_path):
    for data in (b"x", pickle.dumps({"a": print}), pickle.dumps(os.system, protocol=2)):
        (tmp_path / "sae.pt").write_bytes(data)
        said = refusal(FormatError, read_arrays, tmp_path / "sae.pt")
        assert "holds more than tensors" in said
        assert "weights_only" not in said
        assert "Re-running" not in said
    assert "it names posix.system" in said


@pytest.mark.parametrize("form", SETTINGS)
def test_settings_of_any_json_type_end_in_an_error_of_ours(tmp_path, form):
    config_name, weights_name, base, arrays = SETTINGS[form]
    place = write(tmp_path / "layers.3", config_name, base, weights_name, arrays(draw()))
    assert imported(place).weights.hook.startswith("blocks.")
    for key in base:
        for value in (
            None,
            [],
            {},
            [[1]],
            "x" * 300,
            -1,
            0,
            1e400,
            10**400,
            2**64,
            float("nan"),
            True,
            {"in": "a"},
            {"in": -1, "out": 1},
        ):
            (place / config_name).write_text(json.dumps(base | {key: value}))
            message = refusal(SAEError, imported, place)
            assert "\n" not in message
            assert len(message) < 700


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_read_or_refused(tmp_path, data):
    """Bytes of a good file changed or cut at random places: an error of ours or arrays, never anything else."""
    kind = data.draw(st.sampled_from(["pt", "npz", "safetensors"]))
    good = tmp_path / f"good.{kind}"
    if not good.exists():
        if kind == "pt":
            torch.save({"encoder.weight": torch.ones(3, 4), "k": torch.tensor(3), "activation": "TopK"}, good)
        elif kind == "npz":
            np.savez(good, W_enc=np.ones((3, 4), "f4"))
        else:
            write(tmp_path, "none", None, good.name, {"W_enc": np.ones((3, 4), "f4")})
    raw = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    bad = tmp_path / f"bad.{kind}"
    bad.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    assert "\n" not in refusal(FormatError, read_arrays, bad)
