"""What a person is given to read."""

from __future__ import annotations

import numpy as np

from pipeline.analysis.choose import choose_latents
from pipeline.analysis.firings import LatentStats


def stats(rows=100_000, latents=300, seed=0):
    rng = np.random.default_rng(seed)
    count_F = (rows * 10 ** rng.uniform(-4, -0.5, latents)).astype(int)
    count_F[:20] = 0
    return LatentStats(
        count_F=count_F,
        max_F=np.ones(latents),
        mean_square_F=rng.random(latents),
        breadth_F=count_F / 2,
        groups=64,
        token_r2_F=np.where(count_F > 0, np.tile([0.05, 0.95, 0.99], latents // 3), np.nan),
        top_token_F=np.zeros(latents, int),
        top_share_F=np.ones(latents),
    )


def test_half_of_the_latents_read_their_surroundings_and_none_is_dead_or_dense():
    s = stats()
    chosen = choose_latents(s, 100_000, 40)
    assert len(chosen) == len(set(chosen)) == 40
    assert sum(s.token_r2_F[f] < 0.5 for f in chosen) == 20
    assert s.count_F[chosen].min() >= 40
    assert s.count_F[chosen].max() <= 3000


def test_the_odd_place_is_for_a_latent_that_reads_its_surroundings():
    s = stats()
    assert sum(s.token_r2_F[f] < 0.5 for f in choose_latents(s, 100_000, 7)) == 4


def test_frequencies_are_mixed_not_only_the_most_frequent():
    s = stats()
    logs = np.log10(s.count_F[choose_latents(s, 100_000, 40)])
    assert logs.max() - logs.min() > 1


def test_preferred_latents_take_every_other_place_of_their_kind():
    s = stats()
    context = [f for f in range(300) if s.token_r2_F[f] < 0.5 and 100 < s.count_F[f] < 2000][-3:]
    chosen = choose_latents(s, 100_000, 12, preferred=context)
    assert chosen[0:6:2] == context
    assert not set(chosen[1:6:2]) & set(context)


def test_forty_firings_are_enough_and_the_most_frequent_third_comes_first():
    s = stats()
    s.token_r2_F[:], s.mean_square_F[:] = 0.1, 1.0
    s.count_F[:] = 0
    s.count_F[:6], s.breadth_F[:] = [40, 39, 90, 91, 900, 901], 50.0
    assert choose_latents(s, 100_000, 5) == [5, 3, 0, 4, 2]  # of each third in turn


def test_latents_of_a_few_documents_are_left_out_while_there_are_others():
    s = stats()
    s.breadth_F[:] = np.where(np.arange(300) % 2, 7.0, 9.0)
    assert all(f % 2 == 0 for f in choose_latents(s, 100_000, 20))
    s.breadth_F[:] = 7.0
    assert len(choose_latents(s, 100_000, 20)) == 20


def test_one_kind_missing_fills_the_list_with_the_other():
    s = stats()
    s.token_r2_F[:] = np.where(np.isnan(s.token_r2_F), np.nan, 0.9)
    assert len(choose_latents(s, 100_000, 12)) == 12


def test_a_tiny_run_still_gives_what_fires_and_an_empty_one_nothing():
    s = stats(rows=60)
    assert set(choose_latents(s, 60, 5)) <= set(np.flatnonzero(s.count_F).tolist())
    s.count_F[:] = 0
    s.token_r2_F[:] = np.nan
    assert choose_latents(s, 60, 5) == []
