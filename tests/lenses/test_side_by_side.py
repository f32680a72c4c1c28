"""How many prompts go side by side in one batch, and what the session is left like."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.lenses.heads import head_sweep
from pipeline.lenses.latents import latent_sweep
from pipeline.lenses.patching import patch_sweep, prompt_tokens
from sae.errors import ConfigError
from tests.interventions.tiny import prompt, run, sae_at, session, tiny

TEXT = "if self.name in self.text"
HEADS = 16  # of all blocks


def counted(sweep, s, *args, **options):
    """What progress was told: (done, of how many) after every batch."""
    seen = []
    sweep(s, tiny()[0], *args, **options, progress=lambda *numbers: seen.append(numbers))
    return seen


def steps(each, count=HEADS):
    return [(min(done + each, count), count) for done in range(0, count, each)]


@pytest.mark.parametrize("side_by_side", [1, 3])
def test_as_many_as_are_asked_for(side_by_side):
    s = session(n_seq_max=8)
    assert counted(head_sweep, s, TEXT, side_by_side=side_by_side) == steps(side_by_side)
    latents = counted(latent_sweep, s, sae_at(1), TEXT, side_by_side=side_by_side)
    assert latents == steps(side_by_side, latents[-1][1])
    texts = [TEXT, "if self.line in self.text", " self", " not"]
    assert counted(patch_sweep, s, *texts, heads=True, side_by_side=side_by_side) == steps(side_by_side)


@pytest.mark.parametrize(
    ("options", "count", "held"),
    [
        ({"n_ctx": 256}, 30, 8),
        ({"n_ctx": 256}, 60, 4),  # the cells that all share
        ({"n_ctx": 256, "n_batch": 100}, 30, 3),
        ({"n_ctx": 2048, "kv_unified": False}, 200, 8),  # cells of its own for each
        ({"n_ctx": 256, "n_batch": 60}, 60, 1),
    ],
)
def test_as_many_as_sequences_batch_and_context_hold(options, count, held):
    text = "Q" * (count - 1)  # a token each, after BOS
    s = session(**{"n_seq_max": 8, "n_batch": 2048} | options)
    assert counted(head_sweep, s, text) == steps(max(1, held - 1))  # beside the prompt as it is
    with pytest.raises(ConfigError, match=f"holds at most {held} prompts of {count} tokens"):
        head_sweep(s, tiny()[0], text, side_by_side=max(2, held))


def test_the_longest_prompt_that_a_batch_holds():
    count = len(prompt_tokens(tiny()[0], TEXT))
    assert counted(head_sweep, session(n_batch=count), TEXT) == steps(1)
    for options in ({"n_batch": count - 1}, {"n_batch": 512, "n_ctx": 512, "n_seq_max": 2, "kv_unified": False}):
        with pytest.raises(ConfigError, match="one batch of the context holds"):
            head_sweep(session(**options), tiny()[0], TEXT if "n_ctx" not in options else TEXT * 40)


def test_what_was_in_the_session_does_not_matter_and_nothing_of_the_edited_prompts_stays():
    s, tokens = session(n_seq_max=4), prompt()
    for sweep in (
        lambda: patch_sweep(s, tiny()[0], TEXT, "if self.line in self.text", " self", " not", blocks=[1]),
        lambda: head_sweep(s, tiny()[0], TEXT, blocks=[1]),
    ):
        run(s, tokens)
        sweep()
    places = np.zeros(len(tokens), np.int32), np.arange(len(tokens), dtype=np.int32)
    logits_V = s.decode(tokens, *places, logits="last")[0]
    np.testing.assert_allclose(logits_V, run(session(), tokens)[-1], atol=1e-5)
