from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipeline.lenses import patching as module
from pipeline.lenses.patching import patch_sweep, prompt_tokens, show_tokens, single_token
from sae.errors import ConfigError, HookError
from tests.interventions.tiny import BLOCKS, hf_logits, prompt, residual, session, tiny

CLEAN, CORRUPTED = "if self.name in self.text", "if self.line in self.text"
ANSWER, WRONG = " self", " not"


def sweep(s, **options):
    return patch_sweep(s, tiny()[0], CLEAN, CORRUPTED, ANSWER, WRONG, **options)


def equal_prompts():
    """Two prompts of equal token counts; the texts above are chosen so, the tokeniser is ours."""
    model = tiny()[0]
    clean, corrupted = prompt_tokens(model, CLEAN), prompt_tokens(model, CORRUPTED)
    assert len(clean) == len(corrupted)
    return clean, corrupted


def test_the_prompts_of_the_tests_differ_in_the_middle_only():
    clean, corrupted = equal_prompts()
    differing = np.flatnonzero(clean != corrupted)
    assert 0 < differing[0] <= differing[-1] < len(clean) - 1


@pytest.mark.parametrize(("site", "part"), [("hook_resid_post", None), ("hook_mlp_out", "mlp")])
def test_every_cell_is_the_same_patch_in_hf(site, part):
    clean, corrupted = equal_prompts()
    result = sweep(session(n_seq_max=8), site=site)
    answer, wrong = (single_token(tiny()[0], text, "") for text in (ANSWER, WRONG))
    assert result.grid_LP.shape == (BLOCKS, len(clean))

    def difference(logits_TV):
        return float(logits_TV[-1, answer]) - float(logits_TV[-1, wrong])

    clean_d, corrupted_d = (difference(hf_logits(tokens, {})) for tokens in (clean, corrupted))
    assert result.clean_difference == pytest.approx(clean_d, abs=1e-4)
    assert result.corrupted_difference == pytest.approx(corrupted_d, abs=1e-4)
    for block in range(BLOCKS):
        source_TD = residual(session(), clean, f"blocks.{block}.{site}")
        for position in range(len(clean)):

            def change(x_TD, source_TD=source_TD, position=position):
                out = x_TD.copy()
                out[position] = source_TD[position]
                return out

            patched = difference(hf_logits(corrupted, {(block, part) if part else block: change}))
            expected = (patched - corrupted_d) / (clean_d - corrupted_d)
            assert result.grid_LP[block, position] == pytest.approx(expected, abs=1e-3)


def test_what_must_be_zero_and_one_is():
    clean, corrupted = equal_prompts()
    grid_LP = sweep(session(n_seq_max=4)).grid_LP
    same = np.flatnonzero(np.cumsum(clean != corrupted) == 0)
    np.testing.assert_allclose(grid_LP[:, same], 0, atol=1e-6)  # before the prompts differ
    np.testing.assert_allclose(grid_LP[-1, :-1], 0, atol=1e-6)  # the last block's other rows lead nowhere
    assert grid_LP[-1, -1] == pytest.approx(1, abs=1e-4)
    assert np.abs(grid_LP[:-1]).max() > 0.05


@pytest.mark.parametrize("site", ["hook_resid_post", "hook_mlp_out", "attn.hook_z"])
@pytest.mark.parametrize("kv_unified", [True, False])
def test_variants_side_by_side_equal_one_at_a_time(site, kv_unified):
    one = sweep(session(), site=site, side_by_side=1)
    many = sweep(session(n_seq_max=8, n_ctx=512, kv_unified=kv_unified), site=site)
    np.testing.assert_allclose(many.grid_LP, one.grid_LP, atol=2e-4)
    assert np.abs(one.grid_LP).max() > 0.05


def test_a_batch_cut_into_micro_batches_changes_nothing():
    one = sweep(session(), side_by_side=1)
    cut = sweep(session(n_seq_max=8, n_ubatch=9))
    np.testing.assert_allclose(cut.grid_LP, one.grid_LP, atol=2e-4)


def test_some_blocks_and_positions_are_the_same_cells_and_progress_counts_them():
    whole, seen = sweep(session(n_seq_max=4)), []
    part = sweep(
        session(n_seq_max=4), blocks=[2, 0], positions=[3, 1], progress=lambda done, total: seen.append((done, total))
    )
    np.testing.assert_allclose(part.grid_LP, whole.grid_LP[np.ix_([2, 0], [3, 1])], atol=2e-4)
    assert seen[-1] == (4, 4)
    assert part.to_dict()["blocks"] == [2, 0]


def test_prompts_of_unequal_length_are_refused_with_both_tokenisations():
    with pytest.raises(ConfigError, match="same number of tokens, got") as caught:
        patch_sweep(session(), tiny()[0], CLEAN, CORRUPTED + " zz", ANSWER, WRONG)
    model = tiny()[0]
    for text in (CLEAN, CORRUPTED + " zz"):
        assert show_tokens(model, prompt_tokens(model, text)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_answer_of_several_tokens_is_refused_with_its_split():
    split = show_tokens(tiny()[0], tiny()[0].tokenize(b" selfqq"))
    with pytest.raises(ConfigError, match="answer: ' selfqq' should be one token") as caught:
        patch_sweep(session(), tiny()[0], CLEAN, CORRUPTED, " selfqq", WRONG)
    assert split in str(caught.value)


def test_equal_prompts_equal_answers_and_foreign_sites_are_refused():
    with pytest.raises(ConfigError, match="are the same"):
        patch_sweep(session(), tiny()[0], CLEAN, CLEAN, ANSWER, WRONG)
    with pytest.raises(ConfigError, match="answer and wrong are the same token"):
        patch_sweep(session(), tiny()[0], CLEAN, CORRUPTED, ANSWER, ANSWER)
    with pytest.raises(HookError, match="hook_resid_post"):
        sweep(session(), site="hook_residual")
    with pytest.raises(HookError):
        sweep(session(), blocks=[BLOCKS])
    with pytest.raises(ConfigError, match="can be read, not patched"):
        sweep(session(), site="attn.hook_pattern")
    count = len(equal_prompts()[0])
    for position in (-1, count):
        with pytest.raises(ConfigError, match=rf"should be 0\.\.{count - 1} of"):
            sweep(session(), positions=[position])
    with pytest.raises(ConfigError, match="one batch of the context holds"):
        sweep(session(n_batch=count - 1))
    with pytest.raises(ConfigError, match="holds at most 1 prompts"):
        sweep(session(), side_by_side=2)


def test_the_other_way_round_is_the_same_share_of_the_other_answer():
    back = patch_sweep(session(n_seq_max=4), tiny()[0], CORRUPTED, CLEAN, ANSWER, WRONG)
    whole = sweep(session(n_seq_max=4))
    assert (back.clean_difference - back.corrupted_difference) * (
        whole.clean_difference - whole.corrupted_difference
    ) < 0
    assert back.grid_LP[-1, -1] == pytest.approx(1, abs=1e-4)
    said = back.to_dict()
    assert said["clean_difference"] == back.clean_difference != back.corrupted_difference
    assert said["corrupted_difference"] == back.corrupted_difference
    assert (said["clean_tokens"], said["corrupted_tokens"]) == tuple(t.tolist() for t in equal_prompts()[::-1])
    assert (said["answer"], said["wrong"]) == (single_token(tiny()[0], ANSWER, ""), single_token(tiny()[0], WRONG, ""))
    assert (said["heads"], said["positions"]) == ([], list(range(len(back.clean_tokens))))


def test_what_a_patch_moves_is_counted_from_the_prompt_beside_it(monkeypatch):
    plain_V = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    monkeypatch.setattr(
        module, "decoded", lambda _, __, variants, *_more, **_options: [([plain_V] * len(variants), plain_V)]
    )
    np.testing.assert_array_equal(sweep(session()).grid_LP, 0)


def test_the_strongest_is_the_largest_share_and_no_hole():
    part = sweep(session(), blocks=[0], positions=[0])
    grid_LP = np.array([[-2.0, np.nan, 0.1], [0.2, 0.3, np.nan]])
    assert dataclasses.replace(part, grid_LP=grid_LP).strongest() == (1, 1)


def test_prompt_tokens_start_with_bos_and_read_special_text_as_text(monkeypatch):
    model = tiny()[0]
    assert show_tokens(model, model.tokenize(b"a\n")) == "|a|\\n|"
    assert prompt_tokens(model, "ab").tolist() == prompt("ab").tolist()
    assert (prompt_tokens(model, "<|eos|>") != model.eos).all()
    monkeypatch.setattr(model, "add_bos", False)
    assert prompt_tokens(model, "ab").tolist() == prompt("ab")[1:].tolist()
    with pytest.raises(ConfigError, match="same number of tokens, got 0 and 0"):
        patch_sweep(session(), model, "", "", ANSWER, WRONG)
