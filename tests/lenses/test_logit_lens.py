from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from pipeline.lenses import logit_lens as module
from pipeline.lenses.logit_lens import logit_lens
from pipeline.stages.lens import table, written
from sae.errors import ConfigError
from tests.interventions.tiny import BLOCKS, prompt, session, tiny, twin


def hf_lens(tokens):
    """log-probabilities (L+1, T, V) in float64 through HF's own norm and head."""
    import torch

    with torch.no_grad():
        out = twin().model(torch.tensor(tokens[None].astype(np.int64)), output_hidden_states=True)
        states = list(out.hidden_states[:-1])  # HF's last one is after the final norm
        captured = []
        handle = twin().model.norm.register_forward_hook(lambda _m, inputs, _o: captured.append(inputs[0]))
        twin().model(torch.tensor(tokens[None].astype(np.int64)))
        handle.remove()
        states.append(captured[0])
        logits = [twin().lm_head(twin().model.norm(state))[0].double() for state in states]
        return np.stack([torch.log_softmax(row, dim=-1).numpy() for row in logits])


@pytest.mark.parametrize("chunk_bytes", [1, 64 << 20])
def test_every_cell_is_hfs(monkeypatch, chunk_bytes):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)  # 1: position by position
    tokens = prompt()
    result = logit_lens(session(), tiny()[0], tokens, top=5)
    log_q_LTV = hf_lens(tokens)
    order_LTK = np.argsort(-log_q_LTV, axis=2)[:, :, :5]
    np.testing.assert_array_equal(result.top_tokens_LTK, order_LTK)
    np.testing.assert_allclose(
        result.top_probs_LTK, np.exp(np.take_along_axis(log_q_LTV, order_LTK, axis=2)), rtol=1e-4
    )
    np.testing.assert_allclose(result.entropy_LT, -(np.exp(log_q_LTV) * log_q_LTV).sum(axis=2), rtol=1e-4)
    kl_LT = (np.exp(log_q_LTV[-1]) * (log_q_LTV[-1] - log_q_LTV)).sum(axis=2)
    np.testing.assert_allclose(result.kl_LT, kl_LT, rtol=1e-4, atol=1e-6)
    following = np.take_along_axis(log_q_LTV[:, :-1], tokens[None, 1:, None].astype(np.int64), axis=2)[..., 0]
    np.testing.assert_allclose(result.next_logprob_LT[:, :-1], following, atol=1e-4)
    assert np.isnan(result.next_logprob_LT[:, -1]).all()


def test_the_last_block_is_the_models_logits_and_no_earlier_one_is():
    result = logit_lens(session(), tiny()[0], prompt())
    assert result.last_block_error < 1e-5
    assert np.abs(result.kl_LT[-1]).max() < 1e-8
    assert result.kl_LT[:-1].min() > 1e-3


def test_rows_are_named_from_the_embedding_up():
    result = logit_lens(session(), tiny()[0], prompt())
    assert result.hooks == ("blocks.0.hook_resid_pre", *(f"blocks.{block}.hook_resid_post" for block in range(BLOCKS)))


def test_a_prompt_longer_than_a_batch_gives_the_same_lens():
    tokens = prompt()
    whole, parts = (logit_lens(s, tiny()[0], tokens) for s in (session(), session(n_batch=7)))
    np.testing.assert_allclose(parts.top_probs_LTK, whole.top_probs_LTK, rtol=1e-4)
    assert parts.last_block_error < 1e-5


@pytest.mark.parametrize(
    ("count", "top", "message"), [(0, 5, "1 to 256 tokens"), (257, 5, "got 257"), (4, 0, "top: expected 1 to 512")]
)
def test_what_cannot_be_shown_is_refused(count, top, message):
    with pytest.raises(ConfigError, match=message):
        logit_lens(session(), tiny()[0], np.full(count, 40), top=top)


@pytest.mark.parametrize("top", [1, 3])
def test_the_table_shows_as_many_tokens_as_asked_for(top):
    model, heard = tiny()[0], io.StringIO()
    result = logit_lens(session(), model, prompt()[:4], top=top)
    Console(width=1000, file=heard).print(table(model, result))
    for token, p in zip(result.top_tokens_LTK.flat, result.top_probs_LTK.flat, strict=True):
        assert f"{written(model, token)} {p:.2f} " in heard.getvalue()
    assert len(re.findall(r" [01]\.\d\d │", heard.getvalue())) == result.top_probs_LTK.size == 4 * (BLOCKS + 1) * top
