"""The reader: both paths agree, statistics match a float64 oracle, damage is named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.windows import FLAG_BOS, FLAG_FIRST, FLAG_OUTLIER
from pipeline.store.reader import ActivationStore
from pipeline.store.schema import to_float32, to_stored
from pipeline.store.statistics import QUANTILES
from pipeline.store.summary import flag_counts
from pipeline.store.writer import invalidate
from sae.errors import StoreError

from .helpers import files_of, fill, known_rows, make_meta

HOOK = "blocks.0.hook_resid_post"
WIDTHS = {HOOK: 12, "blocks.1.hook_mlp_out": 4}
ROWS = 150


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def made(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    acts, columns = known_rows(ROWS, WIDTHS)
    meta = make_meta(ROWS, WIDTHS, dtype=request.param)
    fill(path, meta, acts, columns)
    stored = {name: to_float32(to_stored(x, request.param), request.param) for name, x in acts.items()}
    return path, stored, columns


@settings(max_examples=60, deadline=None)
@given(bounds=st.lists(st.integers(0, ROWS), min_size=2, max_size=2))
def test_ranges_of_bytes_and_zarr_give_the_same_rows(made, bounds):
    path, acts, _ = made
    start, stop = sorted(bounds)
    fast, slow = ActivationStore(path), ActivationStore(path, fast_path=False)
    for name, x_ND in acts.items():
        got = fast.rows(name, start, stop)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, x_ND[start:stop])
        np.testing.assert_array_equal(slow.rows(name, start, stop), x_ND[start:stop])


def test_the_fast_path_is_taken_for_our_files_and_only_for_them(made, tmp_path):
    path, acts, _ = made
    key = f"hooks/{HOOK}/acts/c/0/0"
    store = ActivationStore(path)
    store.rows(HOOK, 0, 5)
    assert store._plain == {key: True}
    shutil.copytree(path, tmp_path / "swapped")
    shard = tmp_path / "swapped" / f"hooks/{HOOK}/acts/c/0/0"
    whole = bytearray(shard.read_bytes())
    chunk = (len(whole) - 68) // 4  # swap the first two chunks and their index entries: a valid zarr shard
    whole[:chunk], whole[chunk : 2 * chunk] = whole[chunk : 2 * chunk], whole[:chunk]
    index = bytearray(whole[4 * chunk : 4 * chunk + 64])
    index[:16], index[16:32] = index[16:32], index[:16]
    whole[4 * chunk :] = index + crc32c(bytes(index)).to_bytes(4, "little")
    shard.write_bytes(whole)
    store = ActivationStore(tmp_path / "swapped")
    np.testing.assert_array_equal(store.rows(HOOK, 0, 32), acts[HOOK][:32])
    assert store._plain == {key: False}


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_columns_and_documents_come_back(made):
    path, _, columns = made
    store = ActivationStore(path)
    assert store.n_rows == ROWS
    assert store.complete
    for name, column in columns.items():
        np.testing.assert_array_equal(store.column(name), column)
        assert store.column(name).dtype == column.dtype
    assert store.documents == [{"name": "a.py", "bytes": 10, "sha256": "0" * 64, "exact_offsets": True, "form": "text"}]
    assert store.flagged_rows == (columns["flags"] != 0).sum()
    assert {name: count for name, count in flag_counts(store).items() if count} == {
        name: (columns["flags"] & flag != 0).sum()  # a row may have several
        for name, flag in (("bos", FLAG_BOS), ("first", FLAG_FIRST), ("outlier", FLAG_OUTLIER))
    }


def test_statistics_equal_a_float64_oracle_on_shifted_anisotropic_rows(tmp_path):
    rows = 5000
    acts, columns = known_rows(rows, {HOOK: 8}, seed=3)
    acts[HOOK] += 300.0  # a mean far above the spread: naive sums of squares lose the variance
    acts[HOOK][:, 5] *= 50
    fill(tmp_path, make_meta(rows, {HOOK: 8}, shard_rows=512, chunk_rows=64), acts, columns)
    kept = columns["flags"] == 0
    x = acts[HOOK][kept].astype(np.float64)
    stats = ActivationStore(tmp_path).stats(HOOK)
    assert stats.count == kept.sum()
    np.testing.assert_allclose(stats.mean_D, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats.var_D, x.var(0), rtol=1e-10)
    np.testing.assert_allclose(stats.variance, ((x - x.mean(0)) ** 2).sum(1).mean(), rtol=1e-10)
    assert stats.max_abs == np.abs(x).max()
    assert stats.outlier_dims == [5]
    norms, pos = np.linalg.norm(x, axis=1), columns["pos"][kept]
    assert list(stats.norm_quantiles) == ["1-3", "4-15"]
    for bucket, inside in (("1-3", (pos >= 1) & (pos <= 3)), ("4-15", pos >= 4)):
        exact = np.quantile(norms[inside], QUANTILES, method="nearest")
        np.testing.assert_allclose(list(stats.norm_quantiles[bucket].values()), exact, rtol=0.012)


def test_norm_quantiles_follow_the_rows_over_orders_of_magnitude(tmp_path):
    rows = 4096
    acts, columns = known_rows(rows, {HOOK: 4})
    rng = np.random.default_rng(1)
    acts[HOOK] *= np.exp(rng.normal(size=(rows, 1)) * 3).astype(np.float32)
    acts[HOOK][np.flatnonzero(columns["pos"] == 7)] = 0
    fill(tmp_path, make_meta(rows, {HOOK: 4}, shard_rows=1024, chunk_rows=64), acts, columns)
    kept = (columns["flags"] == 0) & (columns["pos"] >= 4)
    exact = np.quantile(np.linalg.norm(acts[HOOK][kept].astype(np.float64), axis=1), QUANTILES, method="nearest")
    got = ActivationStore(tmp_path).stats(HOOK).norm_quantiles["4-15"]
    assert got[0.01] == exact[0] == 0
    np.testing.assert_allclose([got[q] for q in QUANTILES[2:]], exact[2:], rtol=0.012)


def test_only_committed_shards_are_read(tmp_path):
    acts, columns = known_rows(ROWS, WIDTHS)
    meta = make_meta(ROWS, WIDTHS)
    fill(tmp_path, meta, acts, columns, [3, 0])
    store = ActivationStore(tmp_path)
    assert not store.complete
    assert store.n_rows == 64
    expected = np.concatenate([acts[HOOK][:32], acts[HOOK][96:128]])
    np.testing.assert_array_equal(store.rows(HOOK, 0, 64), expected)
    np.testing.assert_array_equal(store.rows(HOOK, 30, 40), expected[30:40])
    np.testing.assert_array_equal(store.column("byte_offset")[32:], columns["byte_offset"][96:128])


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "missing", "column missing"])
def test_a_damaged_shard_is_named_and_can_be_done_again(tmp_path, damage, fast_path):
    acts, columns = known_rows(ROWS, WIDTHS)
    meta = make_meta(ROWS, WIDTHS)
    fill(tmp_path, meta, acts, columns)
    whole = files_of(tmp_path)
    relative = "columns/token/c/2" if damage == "column missing" else f"hooks/{HOOK}/acts/c/2/0"
    file = tmp_path / relative
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    store = ActivationStore(tmp_path, fast_path=fast_path)
    with pytest.raises(StoreError, match=r"shard 2 of .* is damaged.*captures it again"):
        store.rows(HOOK, 60, 70) if damage != "column missing" else store.column("token")
    np.testing.assert_array_equal(store.rows(HOOK, 0, 64), acts[HOOK][:64])
    assert [(p.shard, p.file) for p in store.verify()] == [(2, relative)]
    invalidate(tmp_path, 2)
    assert ActivationStore(tmp_path).n_rows == ROWS - 32
    fill(tmp_path, meta, acts, columns)
    assert files_of(tmp_path) == whole


def test_verify_finds_a_flipped_bit_and_names_the_file(made, tmp_path):
    path, _, _ = made
    assert ActivationStore(path).verify() == []
    copy = shutil.copytree(path, tmp_path / "copy")
    file = copy / f"hooks/{HOOK}/acts/c/1/0"
    data = bytearray(file.read_bytes())
    data[77] ^= 1
    file.write_bytes(data)
    problems = ActivationStore(copy).verify()
    assert [str(p) for p in problems] == [f"shard 1: hooks/{HOOK}/acts/c/1/0 has another sha256 than its commit"]


def test_bad_requests_are_refused_with_the_alternatives(made, tmp_path):
    store = ActivationStore(made[0])
    with pytest.raises(StoreError, match=r"no hook 'blocks.9.x'; it has blocks.0"):
        store.rows("blocks.9.x", 0, 1)
    with pytest.raises(StoreError, match=r"no column 'text'; it has .*byte_offset.*window"):
        store.column("text")
    with pytest.raises(StoreError, match="rows 0:151 are not in the store, which has 150"):
        store.rows(HOOK, 0, 151)
    with pytest.raises(StoreError, match="no activation store at"):
        ActivationStore(tmp_path)
    with pytest.raises(StoreError, match="is not committed"):
        invalidate(made[0], 77)


def test_a_damaged_meta_or_commit_is_one_clear_error(made, tmp_path):
    copy = shutil.copytree(made[0], tmp_path / "copy")
    (copy / "_commits" / "00000001.json").write_text("{")
    with pytest.raises(StoreError, match=r"00000001.json is damaged"):
        ActivationStore(copy)
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "schema_version": 99}))
    with pytest.raises(StoreError, match="schema version 99"):
        ActivationStore(copy)
    (copy / "meta.json").write_text("[]")
    with pytest.raises(StoreError, match=r"meta.json is damaged .the document: expected dict, got \[\]"):
        ActivationStore(copy)
