"""The guess of BatchTopK's edge, and the entries that it leaves in."""

from __future__ import annotations

import pytest
import torch

from sae.batch_select import LEAST_SLACK, MARGIN, Edge, Entries, Guess, batch_edge, entries_from, largest, select_batch

TINY = torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("latents", [30, 512])  # one by one; by groups
def test_entries_of_the_least_and_those_that_are_no_number_are_kept_with_their_place(latents):
    pre_NF = torch.randn(6, latents, generator=torch.Generator().manual_seed(0))
    pre_NF[2, 5], pre_NF[4, 7], pre_NF[5, 9] = torch.nan, 1.5, torch.inf
    found = entries_from(pre_NF, 1.5, 3, first_row=100)
    wanted_NF = ~(pre_NF < 1.5)
    got_NF = torch.zeros_like(wanted_NF)
    got_NF[found.row_P - 100, found.latent_P] = True
    assert torch.equal(got_NF, wanted_NF)
    torch.testing.assert_close(found.value_P, pre_NF[found.row_P - 100, found.latent_P], equal_nan=True)


def test_of_equal_entries_the_earlier_row_then_the_lower_latent_is_taken_whatever_their_order():
    entries = Entries(torch.tensor([1, 0, 0, 2]), torch.tensor([0, 9, 3, 0]), torch.tensor([1.0, 1.0, 1.0, 5.0]))
    assert largest(entries, Edge(1.0, 2), 10).tolist() == [False, True, True, True]


def test_exactly_as_many_as_wanted_have_an_edge_of_their_own():
    assert batch_edge(torch.tensor([3.0, 2.0]), 2) == Edge(2.0, 1)
    assert batch_edge(torch.tensor([3.0, 2.0]), 3) == Edge(TINY, 1)


def test_bfloat16_names_candidates_below_its_own_edge():
    values_NF = torch.tensor([[1.0, 1.001, 0.5]])
    by_NF = torch.tensor([[1.0, 1 - MARGIN / 2, 0.5]], dtype=torch.bfloat16)  # the order is the other way round
    assert select_batch(values_NF, 1, by_NF).tolist() == [[False, True, False]]


def test_a_guess_is_good_only_where_all_that_matters_was_seen_and_goes_on_as_it_was():
    guess = Guess()
    guess.least = 2.0
    assert not guess.good(5, 10, 3.0)  # too few
    assert guess.least < 2.0
    guess.least = 2.0
    assert not guess.good(20, 10, 1.5)  # what matters lies below
    assert guess.least < 1.5
    guess = Guess()
    guess.least = 1.0
    before = guess.state()[1]
    assert guess.good(20, 10, 1.5)
    assert LEAST_SLACK <= guess.state()[1] < before
    assert 1.0 < guess.least < 1.5
    again = Guess()
    again.load(guess.state())
    assert again.state() == guess.state()
    assert again.good(20, 10, 1.6) == guess.good(20, 10, 1.6)
    assert again.least == guess.least


def test_a_guess_that_stays_too_high_ends_with_all_positive_entries():
    guess, passes = Guess(), 0
    guess.least = 1e30
    while not guess.good(0, 10, 0.0):
        passes += 1
    assert guess.least == TINY
    assert passes < 8
