"""Shard files made in memory are those that zarr writes itself."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.encode import ARRAY_CONFIG, array_documents, crc32c, encode_plain, encode_with_zarr, is_plain
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import StoreWriter

from .helpers import DOCUMENTS, fill, known_rows, make_meta


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_file_has_the_sha256_of_one_that_plain_zarr_wrote_in_one_region(tmp_path_factory, data):
    widths = {f"blocks.{i}.hook_resid_post": data.draw(st.integers(1, 20)) for i in range(2)}
    chunk_rows, chunks = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    rows = data.draw(st.integers(1, 100))
    dtype = data.draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    meta = make_meta(rows, widths, dtype=dtype, shard_rows=chunk_rows * chunks, chunk_rows=chunk_rows)
    acts, columns = known_rows(rows, widths)
    for name in data.draw(st.sets(st.sampled_from(sorted(widths)))):
        acts[name][rows // 2 :] = 0  # chunks of nothing but zeros must not be left out
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    fill(ours, meta, acts, columns)
    store = ActivationStore(ours)
    group = zarr.create_group(theirs)
    for path, document in array_documents(meta).items():
        found = json.loads(document)
        if found["node_type"] == "array":
            chunk = found["codecs"][0]["configuration"].get("chunk_shape") if "/acts/" in path else None
            shape = tuple(found["chunk_grid"]["configuration"]["chunk_shape"])
            made = group.create_array(
                path.removesuffix("/zarr.json"), shape=tuple(found["shape"]), dtype=found["data_type"],
                chunks=tuple(chunk) if chunk else shape, shards=shape if chunk else None,
                compressors=None, filters=None, fill_value=0, config=ARRAY_CONFIG,
            )  # fmt: skip
            name = path.split("/")[1]
            values = store.stored_rows(name, 0, rows) if "/acts/" in path else store.column(name)
            padded = np.zeros(found["shape"], found["data_type"])
            padded[:rows] = values
            made[:] = padded
    for commit in store.commits:
        for key, expected in commit.files.items():
            data_of_zarr = (theirs / key).read_bytes()
            assert hashlib.sha256(data_of_zarr).hexdigest() == expected["sha256"]
            assert len(data_of_zarr) == expected["bytes"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_arrays_of_another_codec_chain_are_written_and_read_through_zarr(tmp_path, dtype):
    """An archive whose hook arrays were made anew with compression keeps working with the same writer."""
    rows, hook = 70, "blocks.0.hook_resid_post"
    meta = make_meta(rows, {hook: 6}, dtype=dtype)
    acts, columns = known_rows(rows, {hook: 6})
    packed_path, plain_path = tmp_path / "packed", tmp_path / "plain"
    with StoreWriter(packed_path, meta, DOCUMENTS):
        pass
    zarr.open_group(packed_path, mode="a").create_array(
        f"hooks/{hook}/acts", shape=(96, 6), dtype=meta.hooks[0].dtype.replace("bfloat16", "uint16"), chunks=(8, 6),
        shards=(32, 6), compressors=zarr.codecs.ZstdCodec(level=1), fill_value=0, overwrite=True,
    )  # fmt: skip
    assert not is_plain((packed_path / f"hooks/{hook}/acts/zarr.json").read_bytes(), 32, 8)
    fill(packed_path, meta, acts, columns)
    fill(plain_path, meta, acts, columns)
    packed, plain = ActivationStore(packed_path), ActivationStore(plain_path)
    np.testing.assert_array_equal(packed.stored_rows(hook, 0, rows), plain.stored_rows(hook, 0, rows))
    np.testing.assert_array_equal(packed.stored_rows(hook, 31, 65), plain.stored_rows(hook, 31, 65))
    assert packed.verify() == []
    assert packed.commits[0].files != plain.commits[0].files


def test_the_general_path_and_the_fast_one_give_the_same_shard():
    meta = make_meta(32, {"ggml:x": 5}, dtype="float32")
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(20, 5)).astype(np.float32)
    metadata = array_documents(meta)["hooks/ggml%3Ax/acts/zarr.json"]
    assert is_plain(metadata, 32, 8)
    assert b"".join(bytes(part) for part in encode_plain(stored, 32, 8)) == encode_with_zarr(metadata, 32, stored)


def test_crc32c_gives_the_published_values():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
