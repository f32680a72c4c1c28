from __future__ import annotations

import dataclasses
import os

import gguf
import numpy as np
import pytest

from convert.keys import hook_tensor
from convert.sae_gguf import read_sae_gguf, sae_file_info, write_sae_gguf
from convert.verify import verify
from sae.errors import ConfigError, FormatError
from sae.weights import SAEWeights

HOST = {
    "sha256": "ab" * 32,
    "architecture": "llama",
    "n_embd": 64,
    "n_layer": 4,
    "file_type": "F16",
    "vocab_sha256": "cd" * 32,
    "name": "tiny",
}


def random_sae(d_in=64, num_latents=96, k=8, *, seed=0, **changes):
    rng = np.random.default_rng(seed)
    W_dec_FD = rng.standard_normal((num_latents, d_in)).astype(np.float32)
    W_dec_FD /= np.linalg.norm(W_dec_FD, axis=1, keepdims=True)
    fields = {
        "W_enc_FD": (W_dec_FD * rng.uniform(0.5, 1.5, (num_latents, 1))).astype(np.float32),
        "b_enc_F": (0.1 * rng.standard_normal(num_latents)).astype(np.float32),
        "W_dec_FD": W_dec_FD,
        "b_dec_D": rng.standard_normal(d_in).astype(np.float32),
        "mean_D": rng.standard_normal(d_in).astype(np.float32),
        "variance": 12.25 + 1e-9,
        "k": k,
        "hook": "blocks.2.hook_resid_post",
        "host": dict(HOST),
        "training": {"tokens": 1000, "seed": 0, "fvu": np.float32(0.25), "lost": float("nan")},
    }
    return SAEWeights(**(fields | changes))


ARRAYS = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", "mean_D", "threshold_F", "freq_F")


def test_an_f32_file_gives_back_every_array_and_fact(tmp_path):
    rng = np.random.default_rng(1)
    extra = {name: rng.random(96).astype(np.float32) for name in ("threshold_F", "freq_F")}
    sae = random_sae(**extra, variant="threshold", b_dec_subtracted=False)
    path = write_sae_gguf(tmp_path / "sae.gguf", sae, encoder_type="F32", decoder_type="F32")
    back = read_sae_gguf(path)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(back, name), getattr(sae, name), err_msg=name)
        assert getattr(back, name).dtype == np.float32
    for name in ("variance", "k", "variant", "b_dec_subtracted", "hook", "host"):
        assert getattr(back, name) == getattr(sae, name), name
    assert back.training == {"tokens": 1000, "seed": 0, "fvu": 0.25, "lost": None}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae.gguf"]


FURTHER = {
    "groupmax": (1, {"variant": "groupmax"}),
    "layer norm": (2, {"norm_mode": "layer", "norm_eps": 1e-5, "norm_correction": 1}),
    "skip transcoder": (
        2,
        {
            "hook_out": "blocks.2.hook_mlp_out", "b_dec_subtracted": False,
            "W_enc_FD": np.random.default_rng(3).standard_normal((96, 32)).astype(np.float32),
            "W_skip_OD": np.random.default_rng(4).standard_normal((64, 32)).astype(np.float32),
        },
    ),
    "crosscoder": (2, {"hook": "blocks.0.hook_resid_post", "ports": (("blocks.0.hook_resid_post", 32), ("blocks.2.hook_resid_post", 32))}),
    "cross-layer transcoder": (
        2,
        {
            "hook": "blocks.0.ln2.hook_normalized", "hook_out": "blocks.0.hook_mlp_out", "b_dec_subtracted": False,
            "W_enc_FD": np.random.default_rng(3).standard_normal((96, 64)).astype(np.float32),
            "ports": tuple((f"blocks.{n}.{site}", 32) for site in ("ln2.hook_normalized", "hook_mlp_out") for n in (0, 2)),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FURTHER)
def test_further_forms_come_back_whole_and_only_they_are_version_2(tmp_path, kind):
    version, changes = FURTHER[kind]
    sae = random_sae(**changes)
    probe_ND = np.random.default_rng(5).standard_normal((50, sae.d_in)).astype(np.float32)
    path = write_sae_gguf(tmp_path / "sae.gguf", sae, encoder_type="F32", decoder_type="F32")
    assert verify(sae, path, probe_ND)["topk_overlap"] == 1
    back = read_sae_gguf(path)
    for name in (*ARRAYS, "W_skip_OD"):
        left, right = getattr(back, name), getattr(sae, name)
        assert left is right is None or np.array_equal(left, right), name
    for name in ("variant", "norm_mode", "norm_eps", "norm_correction", "hook_out", "ports", "b_dec_subtracted", "k"):
        assert getattr(back, name) == getattr(sae, name), name
    assert sae_file_info(path).version == version
    assert verify(sae, path, probe_ND)["topk_overlap"] == 1.0


def test_optional_arrays_stay_absent(tmp_path):
    back = read_sae_gguf(write_sae_gguf(tmp_path / "sae.gguf", random_sae()))
    assert back.threshold_F is None
    assert back.freq_F is None


@pytest.mark.parametrize(("kind", "least", "most"), [("F16", 1e-5, 5e-4), ("Q8_0", 1e-3, 1e-2)])
def test_rounded_types_round_only_the_matrices(tmp_path, kind, least, most):
    sae = random_sae()
    path = write_sae_gguf(tmp_path / "sae.gguf", sae, encoder_type=kind, decoder_type=kind)
    back = read_sae_gguf(path)
    for name in ("W_enc_FD", "W_dec_FD"):
        source = getattr(sae, name)
        relative = np.linalg.norm(getattr(back, name) - source) / np.linalg.norm(source)
        assert least < relative < most
    for name in ("b_enc_F", "b_dec_D", "mean_D"):
        np.testing.assert_array_equal(getattr(back, name), getattr(sae, name))
    info = sae_file_info(path)
    assert (info.encoder_type, info.decoder_type, info.d_in, info.num_latents, info.k) == (kind, kind, 64, 96, 8)


def test_q8_0_holds_exactly_what_ggml_defines(tmp_path):
    sae = random_sae()
    path = write_sae_gguf(tmp_path / "sae.gguf", sae, encoder_type="Q8_0", decoder_type="F32")
    blocks = sae.W_enc_FD.astype(np.float64).reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    steps = read_sae_gguf(path).W_enc_FD.reshape(-1, 32) / scale
    assert np.abs(steps - np.rint(steps)).max() < 0.1  # 127 * 2^-11 from the F16 scale
    assert np.abs(steps - blocks / scale).max() < 0.57  # half a step and the same


def test_the_stock_gguf_reader_sees_the_documented_names_types_and_shapes(tmp_path):
    path = write_sae_gguf(
        tmp_path / "sae.gguf", random_sae(training={"config": {}}), encoder_type="F16", decoder_type="Q8_0"
    )
    reader = gguf.GGUFReader(path)
    tensors = {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors}
    assert tensors == {
        "sae.0.enc.weight": ("F16", [64, 96]),
        "sae.0.dec.weight": ("Q8_0", [64, 96]),
        "sae.0.enc.bias": ("F32", [96]),
        "sae.0.dec.bias": ("F32", [64]),
        "sae.0.mean": ("F32", [64]),
        "sae.0.dec.norm": ("F32", [96]),
    }
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.architecture"] == values["general.type"] == "sae"
    assert (values["sae.version"], values["sae.count"], values["sae.0.hook.block"]) == (1, 1, 2)
    assert values["sae.0.hook.point"] == "blocks.2.hook_resid_post"
    assert values["sae.0.hook.tensor"] == "l_out-2"
    assert values["sae.0.variance"] == 12.25 + 1e-9
    assert values["sae.0.host.embedding_length"] == 64
    assert values["sae.0.bos_excluded"] is True


def test_a_file_already_there_survives_a_failed_write(tmp_path):
    path = write_sae_gguf(tmp_path / "sae.gguf", random_sae())
    before = path.read_bytes()
    broken = random_sae(b_enc_F=np.full(96, np.nan, dtype=np.float32))
    with pytest.raises(FormatError, match=r"enc\.bias holds values that are not finite"):
        write_sae_gguf(path, broken)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["sae.gguf"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a device"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, kind):
    place = tmp_path / "sae.gguf"
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero")
    before = place.lstat().st_mode
    with pytest.raises(ConfigError, match="is there and is no file"):
        write_sae_gguf(place, random_sae())
    assert place.lstat().st_mode == before
    assert [path.name for path in tmp_path.iterdir()] == ["sae.gguf"]


def test_q8_0_of_a_width_that_is_no_multiple_of_32_is_refused(tmp_path):
    with pytest.raises(FormatError, match="divisible by 32, got 40"):
        write_sae_gguf(tmp_path / "sae.gguf", random_sae(d_in=40), encoder_type="Q8_0")
    write_sae_gguf(tmp_path / "sae.gguf", random_sae(d_in=40), encoder_type="F16")


def test_values_beyond_f16_are_refused(tmp_path):
    W_enc_FD = random_sae().W_enc_FD * np.float32(1e6)
    with pytest.raises(FormatError, match="beyond 65504"):
        write_sae_gguf(tmp_path / "sae.gguf", random_sae(W_enc_FD=W_enc_FD))


def test_an_unknown_type_lists_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="F32, F16, BF16, Q8_0, Q5_1, Q4_1, Q4_0, got 'Q4_K'"):
        write_sae_gguf(tmp_path / "sae.gguf", random_sae(), encoder_type="Q4_K")


def test_hook_hints_count_blocks_the_way_llama_cpp_does():
    assert hook_tensor("blocks.3.hook_resid_pre") == "l_out-2"
    assert hook_tensor("blocks.0.hook_resid_pre") == ""
    assert hook_tensor("blocks.11.hook_resid_post") == "l_out-11"


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.2.ln2.hook_normalized",
        "blocks.10.ln1.hook_normalized",
        "ggml:norm-3",
        "ln_final.hook_normalized",
        "blocks.1.attn.hook_z",
    ],
)
def test_every_kind_of_hook_point_survives(tmp_path, hook):
    assert read_sae_gguf(write_sae_gguf(tmp_path / "sae.gguf", random_sae(hook=hook))).hook == hook


def test_weights_are_replaced_by_dataclasses(tmp_path):
    """The writer takes what `dataclasses.replace` gives: nothing is cached on the object."""
    sae = random_sae()
    moved = dataclasses.replace(sae, hook="blocks.1.hook_mlp_out")
    assert read_sae_gguf(write_sae_gguf(tmp_path / "sae.gguf", moved)).hook == "blocks.1.hook_mlp_out"
