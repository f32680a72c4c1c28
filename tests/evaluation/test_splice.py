"""The replacement inside llama.cpp against the same replacement inside HF transformers, and its identities."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pipeline.corpus.readers import Document
from pipeline.corpus.windows import FLAG_OUTLIER, FLAGS_ALL, windows
from pipeline.evaluation.losses import log_normaliser
from pipeline.evaluation.splice import CLEAN, SpliceConfig, TokenWindow, batches, splice, split_windows
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Session, capture
from sae.errors import ShapeError
from tests.tiny_llama import hf_model, write_tiny_llama

EXACT = {"kv_type": "f32", "flash_attn": "off", "n_threads": 1}  # one: waiting threads spin on a busy machine
TEXTS = ["def f(x):\n    return [x, x + 1]\n" * 6, "import os\n", "class A:\n    pass\n\n" * 9]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("splice") / "tiny.gguf"
    weights = write_tiny_llama(path)
    with Model(path) as model:
        table = windows(model, [Document(name=f"{i}.py", text=t) for i, t in enumerate(TEXTS)], 40)
        yield model, weights, split_windows(table)


def squash(x_ND):
    """A replacement that changes every row, differently."""
    return (0.6 * x_ND + 0.3 * np.roll(x_ND, 7, axis=1) + 0.05).astype(np.float32)


def hf_run(weights, cut, replaced, flagged):
    """Per counted token: (cross entropy, log-probabilities) with `replaced[block]` as block's output on unflagged rows."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = hf_model(weights)

    def hook(_module, _inputs, output, replace):
        hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        free = ~torch.from_numpy(state["flagged"])
        hidden[0, free] = torch.from_numpy(replace(hidden[0, free].numpy()))
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    state = {}
    ce, log_p = [], []
    handles = [
        model.model.layers[block].register_forward_hook(partial(hook, replace=replace))
        for block, replace in replaced.items()
    ]
    with torch.no_grad():
        for window, state["flagged"] in zip(cut, flagged, strict=True):
            tokens = torch.from_numpy(window.tokens.astype(np.int64))
            logits = model(tokens[None]).logits[0].double()
            logs = torch.log_softmax(logits, dim=-1).numpy()
            counted = np.flatnonzero(~state["flagged"][:-1])
            ce.append(-logs[counted, window.tokens[counted + 1]])
            log_p.append(logs[counted])
    for handle in handles:
        handle.remove()
    torch.set_num_threads(threads)
    return np.concatenate(ce), np.concatenate(log_p)


@pytest.mark.parametrize("block", [0, 3])
def test_cross_entropy_and_kl_equal_transformers_with_the_same_replacement(tiny, block):
    model, weights, cut = tiny
    runs = {"squash": squash, "zero": np.zeros_like}
    flagged = [w.flags != 0 for w in cut]
    clean_ce, clean_log = hf_run(weights, cut, {}, flagged)
    expected = {name: hf_run(weights, cut, {block: replace}, flagged) for name, replace in runs.items()}
    for batch_tokens in (16, 100):
        config = SpliceConfig(batch_tokens=batch_tokens, session=EXACT)
        result = splice(model, cut, runs, HookPoint("resid_post", block), config=config)
        np.testing.assert_allclose(result.ce[CLEAN], clean_ce, rtol=0, atol=1e-5)
        for name, (ce, logs) in expected.items():
            np.testing.assert_allclose(result.ce[name], ce, rtol=0, atol=3e-5)
            assert abs(result.ce[name].mean() - ce.mean()) < 1e-5
            kl = (np.exp(clean_log) * (clean_log - logs)).sum(axis=1)
            np.testing.assert_allclose(result.kl[name], kl, rtol=0, atol=3e-5)
            assert kl.mean() > 0.01


def test_returning_the_input_is_the_clean_run_bit_for_bit(tiny):
    model, _, cut = tiny
    config = SpliceConfig(session={"n_threads": 1})
    result = splice(model, cut, {"same": lambda x: x.copy()}, HookPoint("resid_mid", 1), config=config)
    np.testing.assert_array_equal(result.ce["same"], result.ce[CLEAN])
    assert (result.kl["same"] == 0).all()


def test_flagged_rows_reach_no_replacement_and_no_metric(tiny):
    model, weights, cut = tiny
    hook = HookPoint("resid_post", 1)
    with Session(model, n_ctx=512, n_seq_max=8, **EXACT) as session:
        norms = [np.linalg.norm(c[str(hook)], axis=1) for c in capture(session, [w.tokens for w in cut], [hook])]
    limit = float(np.quantile(np.concatenate(norms), 0.9))
    flagged = [(w.flags != 0) | (n > limit) for w, n in zip(cut, norms, strict=True)]
    seen = []

    def replace(x_ND):
        seen.append(x_ND)
        return squash(x_ND)

    config = SpliceConfig(outlier_norm=limit, session=EXACT)
    result = splice(model, cut, {"squash": replace}, hook, config=config)
    ce, _ = hf_run(weights, cut, {1: squash}, flagged)
    np.testing.assert_allclose(result.ce["squash"], ce, rtol=0, atol=3e-5)
    assert np.linalg.norm(np.concatenate(seen), axis=1).max() <= limit
    assert sum(map(len, seen)) == sum((~f).sum() for f in flagged)
    assert result.flagged_rows == sum(f.sum() for f in flagged)
    assert result.rows == sum(len(w.tokens) for w in cut)
    assert not any((w.flags & FLAG_OUTLIER).any() for w in cut)  # the caller's windows stay as they were


def test_a_window_longer_than_the_batch_gives_the_same_numbers_in_pieces(tiny, monkeypatch):
    model, _, cut = tiny
    hook = HookPoint("resid_post", 2)
    whole = splice(model, cut, {"squash": squash}, hook, config=SpliceConfig(session=EXACT))
    tiny_budget = SpliceConfig(logits_bytes=4 * model.n_vocab * 7, session=EXACT)  # 7 rows: the rest goes to a file
    pieces = splice(model, cut, {"squash": squash}, hook, config=tiny_budget)
    for run in (CLEAN, "squash"):
        np.testing.assert_allclose(pieces.ce[run], whole.ce[run], rtol=0, atol=1e-5)
    np.testing.assert_allclose(pieces.kl["squash"], whole.kl["squash"], rtol=0, atol=1e-5)


def test_documents_and_windows_of_the_counted_tokens_are_named(tiny):
    model, _, cut = tiny
    result = splice(model, cut, {}, HookPoint("resid_post", 0), config=SpliceConfig(session=EXACT))
    counted = [int((w.flags[:-1] == 0).sum()) for w in cut]
    np.testing.assert_array_equal(result.window_N, np.repeat(np.arange(len(cut)), counted))
    few = splice(
        model, cut, {}, HookPoint.parse("blocks.1.hook_resid_post"), config=SpliceConfig(batch_tokens=40, session=EXACT)
    )
    np.testing.assert_array_equal(few.window_N, result.window_N)  # windows of one batch after another
    np.testing.assert_array_equal(result.document_N, np.repeat([w.document for w in cut], counted))


def test_a_row_whose_logits_alone_are_not_finite_is_flagged(tiny, monkeypatch):
    model, _, cut = tiny
    hook, runs = HookPoint("resid_post", 0), {"squash": squash}
    whole = splice(model, cut, runs, hook, config=SpliceConfig(session=EXACT))
    calls = []

    def spoiled(logits_NV):
        calls.append(len(logits_NV))
        return np.where((len(calls) == 1) & (np.arange(len(logits_NV)) == 3), np.nan, log_normaliser(logits_NV))

    monkeypatch.setattr("pipeline.evaluation.splice.log_normaliser", spoiled)
    found = splice(model, cut, runs, hook, config=SpliceConfig(session=EXACT))
    assert cut[0].flags[3] == 0
    assert found.flagged_rows == whole.flagged_rows + 1
    assert len(found.ce["clean"]) == len(whole.ce["clean"]) - 1
    assert np.isfinite(found.ce["squash"]).all()
    assert np.isfinite(found.kl["squash"]).all()


def test_observers_see_the_logits_of_every_counted_row(tiny):
    model, _, cut = tiny
    rows: dict[str, list[np.ndarray]] = {}

    def observe(run, logits_NV, log_z_N):
        rows.setdefault(run, []).append(np.exp(logits_NV.astype(np.float64) - log_z_N[:, None]).sum(axis=1))

    result = splice(
        model,
        cut,
        {"zero": np.zeros_like},
        HookPoint("resid_post", 0),
        config=SpliceConfig(session=EXACT),
        observe=observe,
    )
    assert set(rows) == {CLEAN, "zero"}
    for sums in rows.values():
        assert len(np.concatenate(sums)) == len(result.document_N)
        np.testing.assert_allclose(np.concatenate(sums), 1, atol=1e-5)


def test_batches_hold_whole_windows_and_lose_none(tiny):
    _, _, cut = tiny
    groups = list(batches(cut, 90))
    assert [w.document for g in groups for w in g] == [w.document for w in cut]
    assert all(sum(len(w.tokens) for w in g) <= 90 for g in groups)
    short = [TokenWindow(tokens=np.zeros(2, int), flags=np.zeros(2, int), document=i) for i in range(60)]
    groups = list(batches([*short, cut[0]], 90))
    assert max(map(len, groups)) * len(cut[0].tokens) <= 180  # one long window does not blow the KV up


def test_no_windows_or_a_reconstruction_of_another_width_is_said(tiny):
    model, _, cut = tiny
    with pytest.raises(ShapeError, match="held-out windows"):
        splice(model, [], {}, HookPoint("resid_post", 0))
    with pytest.raises(ShapeError, match="run 'half'"):
        splice(model, cut, {"half": lambda x: x[:, :8]}, HookPoint("resid_post", 0))


def test_windows_where_every_row_is_flagged_count_nothing(tiny):
    model, _, cut = tiny
    flagged = [TokenWindow(tokens=w.tokens, flags=np.full(len(w.tokens), FLAGS_ALL), document=0) for w in cut[:2]]
    result = splice(model, flagged, {"zero": np.zeros_like}, HookPoint("resid_post", 0))
    assert len(result.document_N) == 0
    assert result.flagged_rows == result.rows
