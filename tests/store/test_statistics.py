"""Every number of the statistics against float64 numpy over all rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.store.picture import draw_stats
from pipeline.store.reader import ActivationStore
from pipeline.store.schema import magnitude_bits, to_float32, to_stored
from pipeline.store.statistics import QUANTILES, shard_stats
from pipeline.store.summary import write_stats
from sae.errors import StoreError

from .helpers import fill, known_rows, make_meta

ROOT = Path(__file__).parents[2]
HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"


def test_float16_becomes_float32_exactly_whatever_its_bits():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    expected = finite.astype(np.float32).view(np.uint32)
    np.testing.assert_array_equal(to_float32(finite, "float16").view(np.uint32), expected)
    np.testing.assert_array_equal(to_float32(finite, "float16", finite=True).view(np.uint32), expected)
    np.testing.assert_array_equal(to_float32(every, "float16"), every.astype(np.float32))  # infinite and nan rows too
    table = finite[: len(finite) // 8 * 8].reshape(-1, 8)[:, ::2]
    np.testing.assert_array_equal(to_float32(table, "float16"), table.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_magnitude_bits_are_in_the_order_of_the_magnitudes(dtype):
    x = to_stored(np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32), dtype)
    bits = magnitude_bits(x)
    np.testing.assert_array_equal(np.argmax(bits, axis=0), np.argmax(np.abs(to_float32(x, dtype)), axis=0))


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def made(request, tmp_path_factory):
    """A store with an outlier dimension and rows whose size depends on the position, and its unflagged rows in float64."""
    path, rows, widths = tmp_path_factory.mktemp("store"), 3000, {HOOK: 24, OTHER: 8}
    acts, columns = known_rows(rows, widths, seed=5, context=512)
    acts[HOOK][:, [3, 17]] *= np.array([200, 90], np.float32)
    acts[HOOK] *= (1 + 4 * np.exp(-columns["pos"] / 5))[:, None].astype(np.float32)
    fill(path, make_meta(rows, widths, dtype=request.param, shard_rows=704, chunk_rows=64), acts, columns)
    write_stats(path)
    kept = columns["flags"] == 0
    stored = {name: to_float32(to_stored(x, request.param), request.param)[kept] for name, x in acts.items()}
    return path, {name: x.astype(np.float64) for name, x in stored.items()}, columns["pos"][kept]


@pytest.mark.parametrize("hook", [HOOK, OTHER])
def test_every_number_equals_its_float64_oracle(made, hook):
    path, rows, pos = made
    x, stats = rows[hook], ActivationStore(path).stats(hook)
    norms, rms = np.linalg.norm(x, axis=1), np.sqrt((x**2).mean(0))
    np.testing.assert_allclose(stats.second_moment_D, (x**2).mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.var_D, x.var(0), rtol=1e-10)
    np.testing.assert_allclose(stats.rms_D, rms, rtol=1e-12)
    np.testing.assert_allclose(stats.mean_norm, norms.mean(), rtol=1e-6)
    np.testing.assert_array_equal(stats.max_abs_D, np.abs(x).max(0))
    assert stats.max_abs == np.abs(x).max()
    exact = np.quantile(norms, QUANTILES, method="nearest")
    np.testing.assert_allclose(list(stats.norm_quantiles_all.values()), exact, rtol=0.012)
    late = np.quantile(norms[(pos >= 64) & (pos < 256)], QUANTILES, method="nearest")
    np.testing.assert_allclose(list(stats.norm_quantiles["64-255"].values()), late, rtol=0.012)
    outliers = np.flatnonzero(rms > 10 * np.median(rms))
    ranked = outliers[np.argsort(-rms[outliers])]
    assert [dim for dim, _ in stats.top_dims(99)] == ranked.tolist()
    np.testing.assert_allclose([size for _, size in stats.top_dims(99)], rms[ranked], rtol=1e-12)
    assert stats.top_dims(1) == stats.top_dims(99)[:1]
    assert {3, 17} <= set(stats.outlier_dims) or hook == OTHER


def test_the_files_of_the_statistics_say_the_same_and_are_the_same_when_written_again(made):
    path, rows, _ = made
    numbers, arrays = json.loads((path / "stats.json").read_text()), load_file(path / "stats.safetensors")
    assert numbers["rows"] == 3000
    assert numbers["unflagged_rows"] == len(rows[HOOK])
    for hook, x in rows.items():
        np.testing.assert_allclose(arrays[f"{hook}.mean"], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(arrays[f"{hook}.variance"], x.var(0), rtol=1e-10)
        np.testing.assert_allclose(arrays[f"{hook}.second_moment"], (x**2).mean(0), rtol=1e-12)
        np.testing.assert_array_equal(arrays[f"{hook}.max_abs"], np.abs(x).max(0))
        said = numbers["hooks"][hook]
        np.testing.assert_allclose(said["variance"], x.var(0).sum(), rtol=1e-10)
        assert said["max_abs"] == np.abs(x).max()
        assert said["norm_quantiles_by_position"].keys() == {"1-3", "4-15", "16-63", "64-255", "256-1023"}
        assert said["rows"] == len(x)
    before = [(path / name).read_bytes() for name in ("stats.json", "stats.safetensors")]
    write_stats(path)
    assert [(path / name).read_bytes() for name in ("stats.json", "stats.safetensors")] == before


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norms_neither_overflow_nor_vanish_in_float32(scale):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(300, 16)) * scale).astype(np.float32)
    x[7] = 0
    stats = shard_stats(x, "float32", np.ones(300, bool), np.zeros(300, int))
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    np.testing.assert_allclose(stats.norm_sum, norms.sum(), rtol=1e-6)
    assert stats.norm_bins["0"]["zero"] == 1
    assert sum(stats.norm_bins["0"].values()) == 300


THREADS = """
import hashlib, json
import numpy as np
from pipeline.store.statistics import shard_stats
x = (np.random.default_rng(0).normal(size=(4000, 1024)) + 3).astype(np.float16)
print(hashlib.sha256(json.dumps(shard_stats(x, "float16", np.ones(4000, bool), np.arange(4000) % 64).as_dict()).encode()).hexdigest())
"""


def test_the_digits_do_not_depend_on_the_number_of_threads():
    """Workers with other thread counts must write the same commit."""
    import os

    found = set()
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", THREADS], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
        )
        found.add(done.stdout)
    assert len(found) == 1


def test_a_store_without_an_unflagged_row_has_statistics_files_that_say_so(tmp_path):
    acts, columns = known_rows(40, {HOOK: 3})
    columns["flags"][:] = 1
    fill(tmp_path, make_meta(40, {HOOK: 3}), acts, columns)
    assert write_stats(tmp_path) == {}
    assert json.loads((tmp_path / "stats.json").read_text()) == {"rows": 40, "unflagged_rows": 0, "hooks": {}}
    with pytest.raises(StoreError, match="no unflagged committed row"):
        draw_stats(ActivationStore(tmp_path), tmp_path / "stats.png")


@pytest.mark.parametrize("hooks", [1, 4, 24])
def test_the_picture_is_drawn_for_one_hook_and_for_many(tmp_path, hooks):
    """Its ink covers the page: a panel that stayed empty would leave a white part."""
    from matplotlib.image import imread

    widths = {f"blocks.{i}.hook_resid_post": 32 for i in range(hooks)}
    acts, columns = known_rows(600, widths, context=128)
    fill(tmp_path, make_meta(600, widths, dtype="float16", shard_rows=256, chunk_rows=64), acts, columns)
    draw_stats(ActivationStore(tmp_path), tmp_path / "stats.png")
    first = (tmp_path / "stats.png").read_bytes()
    pixels = imread(tmp_path / "stats.png")[:, :, :3]
    ink = (pixels < 0.9).any(axis=2)
    across = 3 if hooks <= 4 else 2
    down = hooks if hooks <= 4 else 2
    for row in np.array_split(ink, down, axis=0):
        for panel in np.array_split(row, across, axis=1):
            assert 0.005 < panel.mean() < 0.6
    draw_stats(ActivationStore(tmp_path), tmp_path / "stats.png")
    assert (tmp_path / "stats.png").read_bytes() == first


@pytest.mark.parametrize("hooks", [1, 24])
@pytest.mark.parametrize("factor", [0, 1])
def test_a_single_row_and_one_of_zeros_are_drawn_without_what_a_logarithm_needs(tmp_path, hooks, factor):
    widths = {f"blocks.{i}.hook_resid_post": 8 for i in range(hooks)}
    acts, columns = known_rows(2, widths)
    columns["flags"][:] = [1, 0]
    fill(tmp_path, make_meta(2, widths), {hook: factor * x_ND for hook, x_ND in acts.items()}, columns)
    draw_stats(ActivationStore(tmp_path), tmp_path / "stats.png")
    assert (tmp_path / "stats.png").stat().st_size > 10_000


def test_every_line_of_the_picture_that_is_no_curve_is_in_the_legend(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_args, **_more: drawn.append(figure))
    acts, columns = known_rows(600, {HOOK: 32}, context=128)
    fill(tmp_path, make_meta(600, {HOOK: 32}), acts, columns)
    draw_stats(ActivationStore(tmp_path), tmp_path / "stats.png")
    (figure,) = drawn
    (legend,) = figure.legends
    styles = {line.get_label(): line.get_linestyle() for line in legend.get_lines()}
    straight = [
        line
        for ax in figure.axes
        for line in ax.get_lines()
        if line.get_linestyle() != "-" and line.get_linestyle() != "None"
    ]
    assert {line.get_label(): line.get_linestyle() for line in straight} == {
        k: v for k, v in styles.items() if v != "-"
    }
    assert len(set(styles.values())) == len(styles) == 3


MEMORY = """
import sys
from pathlib import Path
from tests.peak_memory import peak_kib
from pipeline.store.reader import ActivationStore
from pipeline.store.summary import info, write_stats
store = ActivationStore(Path(sys.argv[1]))
store.stats(next(iter(store.hooks)))
write_stats(store.backend)
info(store)
print(peak_kib())
"""


def test_opening_a_store_and_its_statistics_take_the_same_memory_whatever_the_number_of_shards(tmp_path):
    widths = {f"blocks.{i}.hook_resid_post": 2048 for i in range(4)}
    acts, columns = known_rows(64 * 8, widths)
    peaks = []
    for shards in (8, 64):
        path = tmp_path / str(shards)
        fill(path, make_meta(8 * shards, widths, dtype="float16", shard_rows=8), acts, columns)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
    vectors_kib = 3 * 4 * 2048 * 8 // 1024  # of one shard
    assert peaks[1] - peaks[0] < 56 * vectors_kib / 3


def test_statistics_are_of_one_pass_over_the_commits_and_kept(made, monkeypatch):
    path, read = made[0], []
    store = ActivationStore(path)
    get = type(store.backend).get
    monkeypatch.setattr(type(store.backend), "get", lambda self, key: read.append(key) or get(self, key))
    every = store.all_stats()
    assert read == [f"_commits/{shard:08d}.json" for shard in range(5)]
    assert store.stats(HOOK) is every[HOOK]
    assert len(read) == 5
