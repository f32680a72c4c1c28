"""SAE GGUFs that are not as the specification says: refused in one line; what it lets in is read."""

from __future__ import annotations

import errno

import gguf
import numpy as np
import pytest

from convert.sae_gguf import read_sae_gguf, read_stored_encoder, sae_file_info, write_sae_gguf
from sae.errors import FormatError

from .test_sae_gguf import FURTHER, random_sae


def rewrite(path, out, *, fields=None, drop=(), tensors=None, added=None, further=None):
    """A copy of `path` made with the stock writer, with some keys and tensors changed."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "sae")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in drop:
            continue
        value, kind = (fields or {}).get(key, (field.contents(), field.types[0]))
        writer.add_key_value(key, value, kind)
    for key, (value, kind) in (added or {}).items():
        item = (gguf.GGUFValueType.get_type(value[0]),) if kind == ARRAY else ()
        writer.add_key_value(key, value, kind, *item)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, (tensors or {}).get(tensor.name, tensor.data))
    for name, data in (further or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


U32, STRING, BOOL = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING, gguf.GGUFValueType.BOOL
F64, ARRAY = gguf.GGUFValueType.FLOAT64, gguf.GGUFValueType.ARRAY


def test_ports_that_are_no_hook_points_are_refused(tmp_path):
    sae = random_sae(**FURTHER["crosscoder"][1])
    path = write_sae_gguf(tmp_path / "sae.gguf", sae)
    for text, said in (
        ('{"a": 1}', "no JSON list"),
        ('[["blocks.0.hook_resid_post", "x"]]', "no JSON list"),
        ("[", "no JSON list"),
        ('[["resid", 64]]', "expected a hook point"),
        ("{}", "no JSON list"),
        ('[["blocks.0.hook_resid_post", 3]]', "do not add up"),
        ('[["blocks.2.hook_resid_post", 32], ["blocks.0.hook_resid_post", 32]]', "do not fit blocks.0.hook_resid_post"),
    ):
        broken = rewrite(path, tmp_path / "broken.gguf", fields={"sae.0.ports": (text, STRING)})
        with pytest.raises(FormatError, match=said):
            read_sae_gguf(broken)
        broken.unlink()
    across = write_sae_gguf(tmp_path / "across.gguf", random_sae(**FURTHER["cross-layer transcoder"][1]))
    for changed, said in (
        ({"sae.0.hook.out": ("blocks.2.hook_mlp_out", STRING)}, "do not fit"),
        ({"sae.0.hook.out": ("", STRING)}, "expected a hook point"),
        ({"sae.0.hook.out": ("blocks.0.a+blocks.2.a", STRING)}, "expected a hook point"),
        ({"sae.0.ports": ('[["blocks.0.ln2.hook_normalized", 128]]', STRING)}, "do not add up"),
    ):
        with pytest.raises(FormatError, match=said):
            read_sae_gguf(rewrite(across, tmp_path / "broken.gguf", fields=changed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": {"sae.version": (3, U32)}}, "sae.version is 3, this program reads 1 to 2"),
        ({"fields": {"sae.version": (2, U32)}}, "key sae.0.d_out is missing"),
        ({"fields": {"sae.count": (0, U32)}}, "sae.count is 0"),
        ({"fields": {"sae.0.k": (97, U32)}}, "k=97 is more than num_latents=96"),
        ({"fields": {"sae.0.k": (True, BOOL)}}, "should be an integer"),
        ({"fields": {"sae.0.d_in": (65, U32)}}, r"ne=\[64, 96\], expected \[65, 96\]"),
        ({"fields": {"sae.0.hook.block": (3, U32)}}, "hook.block does not fit"),
        ({"fields": {"sae.0.hook.point": ("ggml:l_out-2", STRING)}}, "hook.block does not fit"),
        ({"fields": {"sae.0.hook.point": ("blocks.02.hook_resid_post", STRING)}}, "expected a hook point"),
        ({"fields": {"sae.0.hook.point": ("blocks.٢.hook_resid_post", STRING)}}, "expected a hook point"),
        ({"drop": ("general.type",)}, "general.type is 'None', expected 'sae'"),
        ({"fields": {"sae.0.variance": (2, U32)}}, "should be a floating-point number"),
        ({"fields": {"sae.0.norm.eps": (1e-5, F64)}}, "expected a positive number with layer norm, else 0"),
        ({"fields": {"sae.0.training": ('{"x": NaN}', STRING)}}, "not a JSON object"),
        ({"tensors": {"sae.0.dec.norm": np.full(96, np.nan, np.float32)}}, "dec.norm holds values that are not finite"),
        ({"tensors": {"sae.0.dec.norm": np.ones(95, np.float32)}}, r"dec.norm has ne=\[95\]"),
        ({"added": {"general.alignment": (32, gguf.GGUFValueType.UINT64)}}, "general.alignment is no u32"),
        ({"fields": {"sae.0.hook.point": ("resid", STRING)}}, "expected a hook point"),
        ({"fields": {"sae.0.hook.point": ("ggml:\x1b[2J", STRING)}}, "expected a hook point"),
        ({"fields": {"sae.0.variant": ("gated", STRING)}}, "is 'gated', this program knows topk, threshold"),
        ({"fields": {"sae.0.norm.mode": ("layer_norm", STRING)}}, "this program knows none"),
        ({"fields": {"sae.0.variance": (float("nan"), F64)}}, "finite number"),
        ({"fields": {"sae.0.training": ("[" * 100_000, STRING)}}, "not a JSON object"),
        ({"fields": {"sae.0.variance": (0.0, F64)}}, "variance must be a positive number"),
        ({"fields": {"sae.0.variant": ("threshold", STRING)}}, "needs threshold_F"),
        ({"fields": {"sae.0.training": ("[1]", STRING)}}, "not a JSON object"),
        ({"drop": ("sae.0.mean",)}, "tensor sae.0.mean is missing"),
        ({"drop": ("sae.0.b_dec_subtracted",)}, "key sae.0.b_dec_subtracted is missing"),
        ({"tensors": {"sae.0.mean": np.full(64, np.inf, np.float32)}}, "not finite"),
        ({"tensors": {"sae.0.mean": np.zeros(64, np.float16)}}, "is of type F16, expected F32"),
        ({"tensors": {"sae.0.mean": np.zeros(64, np.int32)}}, "is of type I32, expected F32"),
        (
            {"tensors": {"sae.0.enc.weight": np.zeros((96, 64), np.int32)}},
            "is of type I32, expected F32 or F16 or BF16 or Q8_0",
        ),
        ({"added": {"sae.0.bos_excluded": ("yes", STRING)}}, "bos_excluded should be a bool"),
        ({"fields": {"sae.0.training": ('{"outlier_threshold": "x"}', STRING)}}, "outlier_threshold.* wrong type"),
        ({"fields": {"sae.0.training": ('{"id": [1]}', STRING)}}, "'id'.* wrong type"),
        ({"added": {"sae.0.labels": (["a"] * 95, ARRAY)}}, "labels should be an array of 96 strings"),
        ({"added": {"sae.0.labels": ([1] * 96, ARRAY)}}, "labels should be an array of 96 strings"),
        ({"added": {"sae.0.labels": ("text", STRING)}}, "labels should be an array of 96 strings"),
        ({"added": {"sae.0.labels": (["\x1b[2J"] * 96, ARRAY)}}, "characters that are not shown"),
    ],
)
def test_an_inconsistent_file_is_refused_in_one_line_that_says_what(tmp_path, change, message):
    path = write_sae_gguf(tmp_path / "sae.gguf", random_sae())
    broken = rewrite(path, tmp_path / "broken.gguf", **change)
    with pytest.raises(FormatError, match=message) as caught:
        read_sae_gguf(broken)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_keys_and_tensors_of_later_versions_are_ignored(tmp_path):
    path = write_sae_gguf(tmp_path / "sae.gguf", random_sae())
    drop = ("sae.0.dec.norm", "sae.0.training", "sae.0.hook.tensor", "sae.0.norm.eps")
    back = read_sae_gguf(rewrite(path, tmp_path / "less.gguf", drop=drop, fields={"sae.count": (2, U32)}))
    assert back.training == {}
    assert back.hook == "blocks.2.hook_resid_post"


def test_unknown_keys_and_tensors_of_any_type_are_ignored(tmp_path):
    sae = random_sae()
    path = write_sae_gguf(tmp_path / "sae.gguf", sae, encoder_type="F32", decoder_type="F32")
    more = {
        "sae.0.rank": np.arange(7, dtype=np.int32),
        "other.thing": np.ones((3, 5)),
        "sae.0.dec.more": np.ones(5, "i1"),
    }
    keys = {"sae.0.later": ("text", STRING), "later": ([1, 2], ARRAY), "sae.0.later.too": (1.5, F64)}
    out = rewrite(path, tmp_path / "more.gguf", further=more, added=keys)
    data = out.read_bytes()
    at = data.index(b"sae.0.rank") + len(b"sae.0.rank") + 4 + 8  # behind the number of dimensions and ne
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(data[:at] + (777).to_bytes(4, "little") + data[at + 4 :])  # a type that ggml does not have
    for file in (out, unknown):
        np.testing.assert_array_equal(read_sae_gguf(file).W_enc_FD, sae.W_enc_FD)
        np.testing.assert_array_equal(read_sae_gguf(file, stored=True).W_dec_FD[3], sae.W_dec_FD[3])
        assert read_stored_encoder(file).dtype == sae_file_info(file).encoder_type == "F32"
    for kind, ne, message in (
        (26, 10**9, "sae.0.rank.* ends at byte"),  # too large
        (8, 7, "of type Q8_0 cannot have ne="),  # no whole block
    ):
        damaged = data[: at - 8] + ne.to_bytes(8, "little") + kind.to_bytes(4, "little") + data[at + 4 :]
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with pytest.raises(FormatError, match=message):
            read_sae_gguf(tmp_path / "damaged.gguf")


def test_a_scalar_threshold_key_stands_for_all_latents(tmp_path):
    path = write_sae_gguf(tmp_path / "sae.gguf", random_sae())
    changed = {"sae.0.variant": ("threshold", STRING)}
    added = {"sae.0.threshold": (0.75, gguf.GGUFValueType.FLOAT32)}
    out = rewrite(path, tmp_path / "scalar.gguf", fields=changed, added=added)
    np.testing.assert_array_equal(read_sae_gguf(out).threshold_F, np.full(96, 0.75, np.float32))


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    for name, data, message in (
        ("empty.gguf", b"", "is empty"),
        ("text.gguf", b"hello, this is a text", "expected b'GGUF'"),
        ("short.gguf", b"GGUF\x03\0\0\0", "ends early"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match=message):
            read_sae_gguf(tmp_path / name)
    with pytest.raises(FormatError, match="cannot be read"):
        read_sae_gguf(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="cannot be read"):
        read_sae_gguf(tmp_path)


def test_a_model_is_refused_as_an_sae(tmp_path):
    from tests.tiny_llama import write_tiny_llama

    write_tiny_llama(tmp_path / "model.gguf", blocks=1)
    with pytest.raises(FormatError, match="'llama', expected 'sae'"):
        read_sae_gguf(tmp_path / "model.gguf")


def test_hostile_counts_end_at_once(tmp_path):
    """Each claims 2^60 items; a loop over them would never end."""
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"a" + (9).to_bytes(4, "little")
    huge = (2**60).to_bytes(8, "little")
    for item in (0, 8, 9, 12):
        (tmp_path / "a.gguf").write_bytes(head + key + item.to_bytes(4, "little") + huge + bytes(64))
        with pytest.raises(FormatError):
            read_sae_gguf(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(head[:8] + huge + huge + bytes(64))
    with pytest.raises(FormatError, match="at most"):
        read_sae_gguf(tmp_path / "a.gguf")


def test_tensors_lie_as_llama_cpp_reads_them(tmp_path):
    """One after another in the order of the table: gaps and overlaps are refused."""
    path = write_sae_gguf(tmp_path / "sae.gguf", random_sae())
    data = path.read_bytes()
    at = data.index(b"sae.0.enc.bias") + len(b"sae.0.enc.bias") + 4 + 8 + 4
    offset = int.from_bytes(data[at : at + 8], "little")
    for moved in (offset - 32, offset + 32):
        (tmp_path / "moved.gguf").write_bytes(data[:at] + moved.to_bytes(8, "little") + data[at + 8 :])
        with pytest.raises(FormatError, match=f"is at {moved} of the data, expected {offset}, behind the one before"):
            read_sae_gguf(tmp_path / "moved.gguf")


def test_a_full_disk_leaves_no_partial_file_and_is_named(tmp_path, monkeypatch):
    close = gguf.GGUFWriter.close

    def full(writer):
        close(writer)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "close", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_sae_gguf(tmp_path / "x.gguf", random_sae())
    assert caught.value.filename == str(tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
