from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sae import checkpoint as module
from sae.checkpoint import load_weights, save_weights, write_atomic
from sae.errors import DiskError, FormatError

from .toy import random_weights


@pytest.fixture
def weights():
    return random_weights(
        np.random.default_rng(0),
        d=6,
        latents=30,
        k=4,
        freq_F=np.linspace(0, 1, 30),
        host={"architecture": "llama", "n_embd": 6},
        training={"tokens": 5, "metrics": {"fvu": 0.25}},
    )


@pytest.fixture
def folder(tmp_path, weights):
    save_weights(tmp_path / "sae", weights)
    return tmp_path / "sae"


def change_meta(folder, **values):
    path = folder / "sae.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder, **tensors):
    path = folder / "sae.safetensors"
    save_file({name: array for name, array in (load_file(path) | tensors).items() if array is not None}, path)


def assert_equal(a, b):
    for field in fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right, field.name


def test_a_saved_sae_comes_back_bit_for_bit_with_everything_around_it(folder, weights):
    assert_equal(load_weights(folder), weights)
    assert sorted(path.name for path in folder.iterdir()) == ["sae.json", "sae.safetensors"]


def test_a_threshold_sae_keeps_its_thresholds(tmp_path):
    rng = np.random.default_rng(1)
    weights = random_weights(
        rng, d=3, latents=5, k=1, variant="threshold", threshold_F=rng.uniform(size=5), b_dec_subtracted=False
    )
    save_weights(tmp_path, weights)
    assert_equal(load_weights(tmp_path), weights)


FURTHER = {
    "layer norm": {"norm_mode": "layer", "norm_eps": 1e-5, "norm_correction": 1},
    "skip transcoder": {
        "hook": "blocks.1.hook_resid_mid", "hook_out": "blocks.1.hook_mlp_out", "b_dec_subtracted": False, "W_enc_FD": np.ones((6, 4)),
        "W_skip_OD": np.arange(12.0).reshape(3, 4), "ports": (("blocks.1.hook_resid_mid", 4), ("blocks.1.hook_mlp_out", 3)),
    },
    "transcoder that names no widths": {"hook": "blocks.1.hook_resid_mid", "hook_out": "blocks.1.hook_mlp_out", "b_dec_subtracted": False},
    "crosscoder": {"hook": "blocks.0.hook_resid_post", "ports": (("blocks.0.hook_resid_post", 1), ("blocks.1.hook_resid_post", 2))},
}  # fmt: skip


@pytest.mark.parametrize("kind", FURTHER)
def test_what_version_1_cannot_say_is_written_as_version_2(tmp_path, kind):
    weights = random_weights(np.random.default_rng(1), d=3, latents=6, k=2, **FURTHER[kind])
    save_weights(tmp_path, weights)
    assert json.loads((tmp_path / "sae.json").read_text())["version"] == 2
    assert_equal(load_weights(tmp_path), weights)
    change_meta(tmp_path, ports=[1, 2])
    with pytest.raises(FormatError, match="is no list of hook points"):
        load_weights(tmp_path)


@pytest.mark.parametrize("missing", ["d_out", "norm_mode", "norm_eps", "norm_correction", "hook_out", "ports"])
def test_a_file_of_version_2_that_lacks_what_version_2_says_is_refused(tmp_path, missing):
    save_weights(tmp_path, random_weights(np.random.default_rng(1), d=3, latents=6, k=2, **FURTHER["crosscoder"]))
    path = tmp_path / "sae.json"
    meta = json.loads(path.read_text())
    del meta[missing]
    path.write_text(json.dumps(meta))
    with pytest.raises(FormatError, match=f"'{missing}' is missing or of the wrong type"):
        load_weights(tmp_path)


def test_an_sae_that_needs_nothing_new_stays_readable_by_version_1(tmp_path):
    save_weights(tmp_path, random_weights(np.random.default_rng(1), d=3, latents=6, k=2, variant="groupmax"))
    meta = json.loads((tmp_path / "sae.json").read_text())
    assert meta["version"] == 1
    assert not {"norm_mode", "hook_out", "ports", "d_out"} & meta.keys()


def test_saving_again_replaces_the_sae(folder):
    other = random_weights(np.random.default_rng(2), d=4, latents=9, k=2)
    save_weights(folder, other)
    assert_equal(load_weights(folder), other)


@pytest.mark.parametrize("failing", ["sae.safetensors", "sae.json"])
def test_a_write_that_fails_leaves_no_json_beside_other_arrays(folder, failing, monkeypatch):
    def write(path, fill):
        if path.name == failing:
            raise DiskError("full")
        write_atomic(path, fill)

    monkeypatch.setattr(module, "write_atomic", write)
    with pytest.raises(DiskError):
        save_weights(folder, random_weights(np.random.default_rng(2), d=4, latents=9, k=2))
    assert not (folder / "sae.json").exists()


def test_whatever_stops_a_write_leaves_the_old_file_and_no_partial_one(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        write_atomic(tmp_path / "file", lambda file: file.write(b"new") / 0)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_a_truncated_tensor_file_is_named(folder, kept):
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FormatError, match=r"sae\.safetensors cannot be read"):
        load_weights(folder)


def test_a_damaged_json_is_named(folder):
    (folder / "sae.json").write_text('{"format": "ggsco')
    with pytest.raises(FormatError, match="not valid JSON"):
        load_weights(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "other"}, "not a ggscope-sae file"),
        ({"version": 99}, "version 99, this program reads 1 to 2"),
        ({"k": "4"}, "'k' is missing or of the wrong type"),
        ({"k": True}, "'k' is missing or of the wrong type"),
        ({"k": 31}, "k must be between 1 and the 30 latents"),
        ({"variant": "gated"}, "unknown SAE variant 'gated'"),
        ({"variance": float("nan")}, "variance must be a positive number"),
        ({"num_latents": 31}, "says 31 latents of width 6, W_dec has shape"),
        ({"tensors": []}, "'tensors' is missing or of the wrong type"),
        ({"tensors": {}}, "has shape"),
    ],
)
def test_settings_that_do_not_fit_are_named(folder, values, message):
    change_meta(folder, **values)
    with pytest.raises(FormatError, match=message):
        load_weights(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"W_enc": None}, "no tensor 'W_enc'"),
        ({"W_enc": np.zeros((30, 6))}, "'W_enc' must be float32, got float64"),
        ({"b_enc": np.zeros(29, np.float32)}, r"'b_enc' has shape \(29,\)"),
        ({"b_dec": np.full(6, np.nan, np.float32)}, "b_dec holds NaN or infinity"),
        ({"W_dec": np.full((30, 6), np.inf, np.float32)}, "W_dec holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, tensors, message):
    change_tensors(folder, **tensors)
    with pytest.raises(FormatError, match=message):
        load_weights(folder)


def test_a_shape_that_the_json_agrees_with_but_the_sae_does_not_is_refused(folder):
    change_tensors(folder, b_enc=np.zeros(29, np.float32))
    meta = json.loads((folder / "sae.json").read_text())
    change_meta(folder, tensors=meta["tensors"] | {"b_enc": [29]})
    with pytest.raises(FormatError, match=r"b_enc_F must have shape \(30,\)"):
        load_weights(folder)


def test_a_folder_that_is_no_checkpoint_says_what_is_missing(tmp_path, folder):
    with pytest.raises(FormatError, match=r"has no sae\.json"):
        load_weights(tmp_path)
    (folder / "sae.safetensors").unlink()
    with pytest.raises(FormatError, match="is missing"):
        load_weights(folder)


def test_an_sae_with_nan_is_not_written(tmp_path):
    weights = random_weights(np.random.default_rng(0), d=2, latents=3, k=1, b_enc_F=np.array([0, np.nan, 1]))
    with pytest.raises(FormatError, match="this SAE: b_enc holds NaN"):
        save_weights(tmp_path / "sae", weights)
    assert not (tmp_path / "sae").exists()


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from sae.checkpoint import save_weights, write_atomic
from sae.errors import DiskError
from tests.sae.toy import random_weights

folder = Path(sys.argv[1])
write_atomic(folder / "file", lambda f: f.write(b"old"))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # the kernel refuses to let a file grow further
for write in (
    lambda: write_atomic(folder / "file", lambda f: f.write(bytes(60_000))),
    lambda: save_weights(folder / "sae", random_weights(np.random.default_rng(0), d=64, latents=300, k=4)),
):
    try:
        write()
    except DiskError as error:
        print(error)
print(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")), (folder / "file").read_bytes())
"""


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    first, second, listing = done.stdout.splitlines()
    assert f"could not write {tmp_path / 'file'}: File too large" in first
    assert f"could not write {tmp_path / 'sae' / 'sae.safetensors'}: File too large" in second
    assert listing == "['file', 'sae'] b'old'"
