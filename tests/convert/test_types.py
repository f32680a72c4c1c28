"""The seven types of a matrix, held against ggml's own code and against the specification read by other code."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_cpp import llama_cpp

from convert.gguf_file import encode_matrix, rounded, stored_bytes
from convert.keys import MATRIX_TYPES
from convert.sae_gguf import entry_hooks, matrix_bytes, read_sae_gguf, read_stored_encoder, stored_as, write_sae_gguf
from convert.verify import TOLERANCES, verify
from sae.errors import CheckFailedError, ConfigError, FormatError
from sae.runtime import decode, encode

from .spec_reader import SpecSAE
from .test_sae_gguf import FURTHER, HOST, random_sae
from .test_sae_gguf_refused import rewrite
from .test_verify import sparse_rows

LIB = llama_cpp._lib
QUANTISED = ("Q8_0", "Q5_1", "Q4_1", "Q4_0")
TO_FLOAT = {
    "F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row", "Q8_0": "dequantize_row_q8_0",
    "Q5_1": "dequantize_row_q5_1", "Q4_1": "dequantize_row_q4_1", "Q4_0": "dequantize_row_q4_0",
}  # fmt: skip
P, I64 = ctypes.c_void_p, ctypes.c_int64


def matrix(rows=64, columns=96, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)) * np.exp(rng.normal(0, 2, (rows, 1)))
    values[0] = 0
    values[1, ::7] *= 50
    return values.astype(np.float32)


def ggml_floats(raw, kind, count):
    function = getattr(LIB, TO_FLOAT[kind])
    function.argtypes, function.restype = [P, P, I64], None
    out = np.empty(count, np.float32)
    function(raw.ctypes.data, out.ctypes.data, count)
    return out


@pytest.mark.parametrize("kind", TO_FLOAT)
def test_bytes_and_values_are_those_of_ggml_to_the_bit(kind):
    W = matrix()
    data, number = encode_matrix("w", W, kind)
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    assert raw.nbytes == stored_bytes(W.shape, kind)
    np.testing.assert_array_equal(rounded("w", W, kind), ggml_floats(raw, kind, W.size).reshape(W.shape))
    chunk = LIB.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, P, P, I64, I64, I64, P]
    theirs = np.zeros_like(raw)
    assert chunk(int(number), W.ctypes.data, theirs.ctypes.data, 0, len(W), W.shape[1], None) == raw.nbytes
    np.testing.assert_array_equal(raw, theirs)


# largest error of a value, in units of the largest magnitude of its block (F16, BF16: of itself); in Q8_0 the scale's
# own rounding shows, 127 steps of 2^-11
STEPS = {
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q8_0": (0.5 + 127 * 2**-11) / 127,
    "Q5_1": 2 / 62,
    "Q4_1": 2 / 30,
    "Q4_0": 1 / 8,
}


@pytest.mark.parametrize("kind", STEPS)
def test_no_value_moves_by_more_than_the_type_s_step(kind):
    W = matrix(seed=1).astype(np.float64)
    gap = np.abs(rounded("w", W.astype(np.float32), kind) - W)
    scale = np.abs(W).reshape(-1, 32).max(axis=1).repeat(32).reshape(W.shape) if kind in QUANTISED else np.abs(W)
    assert (gap <= STEPS[kind] * scale * 1.01 + 1e-7).all()
    assert gap.max() > 0


@pytest.mark.parametrize(
    ("kind", "most"), [("F16", 65504.0), ("BF16", 3.38953139e38), ("Q8_0", 127 * 65504.0), ("Q4_1", 65504.0), ("Q5_1", 65504.0), ("Q4_0", 8 * 65504.0)]
)  # fmt: skip
def test_the_largest_value_of_a_type_is_kept_and_the_next_is_refused(kind, most):
    W = np.zeros((2, 32), np.float32)
    W[0, 3] = -most
    assert rounded("w", W, kind)[0, 3] == pytest.approx(-most, rel=1e-3)
    W[0, 3] = min(np.float64(most) * 1.003, np.finfo(np.float32).max)
    with pytest.raises(FormatError, match=f"the range of {kind}"):
        rounded("w", W, kind)


@pytest.mark.parametrize("kind", MATRIX_TYPES)
def test_code_written_from_the_specification_computes_the_same(tmp_path, kind):
    sae = random_sae()
    path = write_sae_gguf(tmp_path / "sae.gguf", sae, encoder_type=kind, decoder_type=kind)
    check_against_specification(path, np.random.default_rng(2).standard_normal((60, 64)) * 3)


@pytest.mark.parametrize("kind", [*FURTHER, "threshold"])
def test_code_written_from_the_specification_knows_every_form(tmp_path, kind):
    changes = FURTHER[kind][1] if kind in FURTHER else {}
    if kind == "threshold":
        changes = {"variant": "threshold", "threshold_F": np.full(96, 2.0, np.float32)}
    sae = random_sae(**changes)
    path = write_sae_gguf(tmp_path / "sae.gguf", sae, encoder_type="F32", decoder_type="Q5_1")
    check_against_specification(path, np.random.default_rng(2).standard_normal((60, sae.d_in)) * 3)


def check_against_specification(path, x_ND, entry=0):
    back, spec = read_sae_gguf(path, entry), SpecSAE(path, entry)
    x_ND = x_ND.astype(np.float32)
    idx_NK, vals_NK = encode(back, x_ND)
    a_NF = np.zeros((len(x_ND), back.num_latents))
    np.add.at(a_NF, (np.arange(len(x_ND))[:, None], idx_NK), vals_NK)
    np.testing.assert_allclose(a_NF, spec.acts(x_ND.astype(np.float64))[0], atol=2e-4)
    assert (a_NF > 0).sum() > 60
    np.testing.assert_allclose(
        decode(back, idx_NK, vals_NK, x_ND), spec.reconstruct(x_ND.astype(np.float64)), atol=1e-3
    )
    assert (spec.keys["hook.point"], spec.keys["k"], spec.labels) == (back.hook, back.k, back.labels)


def test_types_the_specification_does_not_name_matter_only_of_tensors_that_are_read(tmp_path):
    transcoder = FURTHER["skip transcoder"][1]
    more = {"sae.0.rank": np.arange(7, dtype=np.int32), "other.thing": np.ones((3, 5)), "sae.0.more": np.ones(5, "i1")}
    for name, changes in (("enc.weight", {}), ("dec.bias", {}), ("skip.weight", transcoder)):
        sae = random_sae(**changes)
        path = write_sae_gguf(tmp_path / "sae.gguf", sae, encoder_type="F32", decoder_type="F32")
        data = rewrite(path, tmp_path / "more.gguf", further=more).read_bytes()
        x_ND = np.random.default_rng(2).standard_normal((60, sae.d_in)) * 3
        check_against_specification(of_type(tmp_path, data, "sae.0.rank", 1, 777), x_ND)
        dimensions = 1 if name == "dec.bias" else 2
        unread = of_type(tmp_path, data, f"sae.0.{name}", dimensions, 26)  # I32
        with pytest.raises(ValueError, match=f"{name} is of type 26"):
            SpecSAE(unread).reconstruct(x_ND)
        with pytest.raises(FormatError, match=f"{name} is of type I32"):
            read_sae_gguf(unread)


def of_type(folder, data, name, dimensions, number):
    """The file with another number where the type of this tensor stands."""
    at = data.index(name.encode()) + len(name) + 4 + 8 * dimensions
    assert int.from_bytes(data[at - 8 * dimensions - 4 : at - 8 * dimensions], "little") == dimensions
    path = folder / "typed.gguf"
    path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
    return path


def test_llama_cpp_s_own_reader_sees_types_offsets_and_bytes_of_every_type(tmp_path):
    class Params(ctypes.Structure):
        _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", P)]

    for name, result, *arguments in (
        ("gguf_init_from_file", P, ctypes.c_char_p, Params), ("gguf_free", None, P),
        ("gguf_find_tensor", I64, P, ctypes.c_char_p), ("gguf_get_tensor_type", ctypes.c_int, P, I64),
        ("gguf_get_tensor_offset", ctypes.c_size_t, P, I64), ("gguf_get_data_offset", ctypes.c_size_t, P),
        ("gguf_get_tensor_size", ctypes.c_size_t, P, I64), ("gguf_get_n_tensors", I64, P),
        ("gguf_find_key", I64, P, ctypes.c_char_p), ("gguf_get_arr_n", ctypes.c_size_t, P, I64),
        ("gguf_get_arr_str", ctypes.c_char_p, P, I64, ctypes.c_size_t), ("gguf_get_val_u32", ctypes.c_uint32, P, I64),
    ):  # fmt: skip
        function = getattr(LIB, name)
        function.restype, function.argtypes = result, arguments
    for encoder, decoder in zip(MATRIX_TYPES, MATRIX_TYPES[::-1], strict=True):
        sae = random_sae(labels={95: "the last one é"})
        path = write_sae_gguf(tmp_path / f"{encoder}.gguf", sae, encoder_type=encoder, decoder_type=decoder)
        file = LIB.gguf_init_from_file(str(path).encode(), Params(True, None))
        assert file
        assert LIB.gguf_get_n_tensors(file) == 6
        assert LIB.gguf_get_val_u32(file, LIB.gguf_find_key(file, b"sae.0.num_latents")) == 96
        for name, kind in (("enc", encoder), ("dec", decoder)):
            i = LIB.gguf_find_tensor(file, f"sae.0.{name}.weight".encode())
            assert LIB.gguf_get_tensor_type(file, i) == int(gguf.GGMLQuantizationType[kind])
            size = LIB.gguf_get_tensor_size(file, i)
            start = LIB.gguf_get_data_offset(file) + LIB.gguf_get_tensor_offset(file, i)
            values = encode_matrix(name, sae.W_enc_FD if name == "enc" else sae.W_dec_FD, kind)[0]
            assert path.read_bytes()[start : start + size] == values.tobytes()
        labels = LIB.gguf_find_key(file, b"sae.0.labels")
        assert LIB.gguf_get_arr_n(file, labels) == 96
        assert LIB.gguf_get_arr_str(file, labels, 95).decode() == "the last one é"
        LIB.gguf_free(file)


def test_the_stock_gguf_dump_lists_the_file(tmp_path):
    two = [random_sae(labels={3: "three"}), random_sae(seed=1, hook="blocks.1.hook_resid_post")]
    path = write_sae_gguf(tmp_path / "sae.gguf", two, encoder_type="Q4_0", decoder_type="BF16")
    done = subprocess.run(
        [sys.executable, "-m", "gguf.scripts.gguf_dump", str(path)], capture_output=True, text=True, check=True
    )
    for said in ("sae.1.hook.point", "blocks.1.hook_resid_post", "sae.0.labels", "sae.1.enc.weight", "Q4_0", "BF16"):
        assert said in done.stdout, said


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_types_want_rows_of_whole_blocks(tmp_path, kind):
    with pytest.raises(FormatError, match=f"{kind} needs a width divisible by 32, got 40"):
        write_sae_gguf(tmp_path / "sae.gguf", random_sae(d_in=40), decoder_type=kind)


@pytest.mark.parametrize("kind", MATRIX_TYPES)
def test_every_type_stays_in_its_tolerance_and_another_sae_does_not(tmp_path, kind):
    sae = random_sae()
    x_ND = sparse_rows(sae)
    path = write_sae_gguf(tmp_path / "a.gguf", sae, encoder_type=kind, decoder_type=kind)
    report = verify(sae, path, x_ND)
    assert (report["relative.W_enc_FD"] > 0) == (kind != "F32")
    assert report["relative.W_dec_FD"] <= TOLERANCES[kind].relative
    with pytest.raises(CheckFailedError, match="W_enc_FD"):
        verify(random_sae(seed=1), path, x_ND)
    turned = dataclasses.replace(sae, W_dec_FD=np.roll(sae.W_dec_FD, 1, axis=0))
    with pytest.raises(CheckFailedError, match="W_dec_FD"):
        verify(turned, path, x_ND)


def test_a_coarser_type_is_beyond_the_tolerance_of_a_finer_one(tmp_path):
    sae = random_sae()
    for fine, coarse in zip(("F16", "BF16", "Q8_0", "Q5_1"), ("BF16", "Q8_0", "Q5_1", "Q4_0"), strict=True):
        path = write_sae_gguf(
            tmp_path / f"{fine}.gguf", stored_as(sae, coarse, coarse), encoder_type=fine, decoder_type=fine
        )
        with pytest.raises(CheckFailedError, match="relative"):
            verify(sae, path, sparse_rows(sae))


@pytest.mark.parametrize(
    "change", [{"k": 7}, {"hook": "blocks.1.hook_resid_post"}, {"b_dec_subtracted": False}, {"labels": {0: "x"}}]
)
def test_a_file_that_says_something_else_about_the_sae_does_not_match(tmp_path, change):
    sae = random_sae()
    path = write_sae_gguf(tmp_path / "a.gguf", dataclasses.replace(sae, **change))
    with pytest.raises(CheckFailedError, match=f"{next(iter(change))} is"):
        verify(sae, path, sparse_rows(sae))


def test_an_sae_of_another_shape_does_not_match(tmp_path):
    path = write_sae_gguf(tmp_path / "a.gguf", random_sae(num_latents=128))
    with pytest.raises(CheckFailedError, match=r"is \(128, 64, 64\), expected \(96, 64, 64\)"):
        verify(random_sae(), path, sparse_rows(random_sae()))


def test_stored_as_is_what_a_file_gives_back_and_its_size(tmp_path):
    sae = random_sae()
    path = write_sae_gguf(tmp_path / "a.gguf", sae, encoder_type="Q4_1", decoder_type="BF16")
    back, made = read_sae_gguf(path), stored_as(sae, "Q4_1", "BF16")
    np.testing.assert_array_equal(back.W_enc_FD, made.W_enc_FD)
    np.testing.assert_array_equal(back.W_dec_FD, made.W_dec_FD)
    assert matrix_bytes(sae, "Q4_1", "BF16") == 96 * 64 // 32 * 20 + 96 * 64 * 2 == 3840 + 12288


def test_several_saes_in_a_file_come_back_each_from_its_place(tmp_path):
    saes = [
        random_sae(labels={1: "one"}),
        random_sae(d_in=32, num_latents=40, k=4, seed=1, hook="blocks.1.hook_mlp_out"),
        random_sae(seed=2, hook="blocks.0.hook_resid_post", **FURTHER["layer norm"][1]),
    ]
    path = write_sae_gguf(tmp_path / "sae.gguf", saes, encoder_type="Q8_0", decoder_type="F16")
    assert entry_hooks(path) == [sae.hook for sae in saes]
    for i, sae in enumerate(saes):
        back = read_sae_gguf(path, i)
        assert (back.hook, back.k, back.labels, back.norm_mode) == (sae.hook, sae.k, sae.labels, sae.norm_mode)
        np.testing.assert_array_equal(back.b_enc_F, sae.b_enc_F)
        np.testing.assert_array_equal(back.W_enc_FD, stored_as(sae, "Q8_0", "F16").W_enc_FD)
        assert read_stored_encoder(path, i).shape == sae.W_enc_FD.shape
        x_ND = np.random.default_rng(3).standard_normal((40, sae.d_in)) * 3
        verify(sae, path, x_ND.astype(np.float32), i)
        check_against_specification(path, x_ND, i)
    with pytest.raises(FormatError, match=r"has no SAE 3, only 0\.\.2"):
        read_sae_gguf(path, 3)


def test_saes_of_different_models_do_not_share_a_file(tmp_path):
    other = random_sae(seed=1, host=HOST | {"vocab_sha256": "ef" * 32})
    with pytest.raises(ConfigError, match="of one model; their hosts' vocab_sha256"):
        write_sae_gguf(tmp_path / "sae.gguf", [random_sae(), other])
    unknown = random_sae(seed=1, host={"architecture": "llama"})  # an import does not know all of it
    write_sae_gguf(tmp_path / "sae.gguf", [random_sae(), unknown])
    with pytest.raises(ConfigError, match="1 to 1024 SAEs, got 0"):
        write_sae_gguf(tmp_path / "sae.gguf", [])


def test_the_documented_tolerances_are_those_that_are_checked():
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    section = text[text.index("### What a file may differ") : text.index("### Training summary")]
    found = {}
    for kinds, *limits in re.findall(r"^\| ([A-Z0-9_, ]+) \| (\S+) \| (\S+) \| (\S+) \|$", section, re.M):
        found |= {kind: tuple(map(float, limits)) for kind in kinds.split(", ")}
    assert found == {kind: (one.relative, one.fvu, one.overlap) for kind, one in TOLERANCES.items()}
    assert set(TOLERANCES) == set(MATRIX_TYPES)


def test_the_bytes_of_both_matrices_are_those_of_their_own_widths_and_types():
    w = random_sae(**FURTHER["skip transcoder"][1])
    assert (w.d_in, w.d_out) == (32, 64)
    assert matrix_bytes(w, "Q8_0", "F16") == w.num_latents * (34 + 64 * 2)
