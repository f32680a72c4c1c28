"""The whole report on the tiny model, from inputs to a file."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from pipeline.config import ReportConfig
from pipeline.corpus.readers import Document
from pipeline.corpus.windows import windows
from pipeline.lenses.heads import head_sweep
from pipeline.lenses.latents import latent_sweep
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Session, capture
from pipeline.report.collect import (
    ReportInputs,
    build_report,
    collect,
    headline,
    judged_on,
    read_training_curve,
    trained_on,
)
from pipeline.report.latents import even_order
from sae import runtime
from sae.errors import FormatError
from sae.untrained import untrained_weights
from tests.tiny_llama import write_tiny_llama

ONE = {"n_threads": 1, "kv_type": "f32", "flash_attn": "off"}
HOOK = "blocks.2.hook_resid_post"
NAMED = (5, 17, 40)
TEXT = '"""Docs of {0}."""\n\n\ndef f{0}(a, b="<script>"):\n    # note {0}\n    return [{0} * (a + b)]\n\n'


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_tiny_llama(folder / "tiny.gguf")
    texts = {f"{i}.py": TEXT.format(i) * (2 + i % 3) for i in range(12)}
    rows = [{"step": s, "tokens": 2048 * s, "fvu": 1 / (s + 1), "dead": 13} for s in (1, 2, 3, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with Model(folder / "tiny.gguf") as model:
        table = windows(model, [Document(name=n, text=t) for n, t in texts.items()], 64)
        tokens = [table.window_tokens(w) for w in range(table.n_windows)]
        with Session(model, n_ctx=512, n_seq_max=4, **ONE) as session:
            x_ND = np.concatenate([c[HOOK] for c in capture(session, tokens, [HookPoint.parse(HOOK)])])
        free_ND = x_ND[table.flags_N == 0]
        plain = untrained_weights(64, 128, 4, free_ND.mean(axis=0), 30.0, HOOK, {}, 0, sample_ND=free_ND)
        weights = dataclasses.replace(plain, labels={latent: f"called {latent}" for latent in NAMED})
        inputs = ReportInputs(
            model=model, weights=weights, windows=table, evaluation={"fvu": 0.5, "ce_recovered": 0.9},
            config=ReportConfig(top_latents=6, contexts=3, tokens=0, prompt="def f1("), session=ONE,
            metrics_path=folder / "metrics.jsonl", dead_after_tokens=1000, corpus_name="a few lines",
            sources={n: t.encode() for n, t in texts.items()},
        )  # fmt: skip
        data = build_report(folder / "report.html", inputs)
        a_NF = np.zeros((table.rows, 128), np.float32)
        idx, vals = runtime.encode(weights, x_ND)
        np.put_along_axis(a_NF, idx, vals, axis=1)
        a_NF[table.flags_N != 0] = 0
        model.test_weights = weights
        yield folder, data, table, a_NF, model


def test_the_file_is_one_page_with_all_sections_and_no_leftover(built):
    folder, data, *_ = built
    page = (folder / "report.html").read_text()
    for part in ('id="latents"', 'id="steering"', 'id="next"', 'id="lens"', 'id="made"', "Training", "Is it any good?"):
        assert part in page
    assert "<script" not in page
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl", "report.html", "tiny.gguf"]
    assert "6 latents shown" in headline(data)


def test_rows_trained_on_stand_beside_those_captured():
    assert (
        trained_on(2_201_600, 900_000) == "2\u2009201\u2009600 rows, drawn in 2.4 passes from 900\u2009000 activations"
    )
    assert trained_on(2048, 900_000) == "2\u2009048 rows, drawn from 900\u2009000 activations"
    assert trained_on(2048, 0) == "2\u2009048 rows of activations"
    assert trained_on(None, 0) == "activations"


def test_documents_that_were_trained_on_are_not_called_kept_out(built):
    assert judged_on({"documents_trained_on": 0}) == "documents kept out of the training"
    assert judged_on({"documents_trained_on": 3}) == "held-out documents, 3 of which were trained on too"
    assert judged_on({"documents_trained_on": None}) == judged_on({}) == "held-out documents"
    assert built[1].summary.endswith("read a few lines; judged on held-out documents.")


def test_labels_stand_on_the_cards(built):
    folder, data, *_ = built
    page = (folder / "report.html").read_text()
    labels = {card.latent: card.label for card in data.latents}
    assert labels == {latent: f"called {latent}" if latent in NAMED else "" for latent in labels}
    assert set(labels) & set(NAMED)
    assert all(f'<span class="label">{label}</span>' in page for label in labels.values() if label)


def test_contexts_show_the_tokens_and_activations_of_the_table(built):
    _, data, table, a_NF, model = built
    assert len(data.latents) == 6
    for card in data.latents:
        column = a_NF[:, card.latent]
        fires = column > 0
        assert card.density == pytest.approx(fires.sum() / (table.flags_N == 0).sum())
        assert card.max_activation == pytest.approx(column.max(), rel=1e-4)
        assert sum(card.histogram) == fires.sum()
        peaks = [max(column[table.doc_N == d]) for d in np.unique(table.doc_N)]
        strongest = sorted(peaks, reverse=True)[: len(card.contexts)]
        np.testing.assert_allclose([c.values[c.peak] for c in card.contexts], strongest, rtol=1e-4)
        for context in card.contexts:
            rows = np.flatnonzero(np.isclose(column, context.values[context.peak], rtol=1e-4))
            row = next(r for r in rows if table.byte_offset_N[r] == context.byte_offset)
            first = row - context.peak
            shown = table.token_N[first : first + len(context.pieces)]
            assert context.pieces == [model.piece(int(t)).decode("utf-8", "backslashreplace") for t in shown]
            np.testing.assert_allclose(context.values, column[first : first + len(shown)], atol=1e-3)
            text = TEXT.format(context.document.removesuffix(".py")) * 4
            assert context.line == text.encode()[: context.byte_offset].count(b"\n") + 1


def test_the_steered_latent_is_one_of_the_cards_and_moves_its_tokens(built):
    _, data, *_ = built
    assert data.steering is not None
    assert data.steering.latent in {card.latent for card in data.latents}
    assert data.steering.log_prob[-1] > data.steering.log_prob[2]
    assert data.steering.kl[2] == 0
    assert len(data.completions) == 2
    assert data.lens is not None
    assert len(data.lens.cells) == 5


def test_the_next_token_s_latents_and_heads_are_those_of_the_sweeps(built):
    _, data, _, _, model = built
    found = data.next_token
    with Session(model, n_ctx=256, **ONE) as session:
        latents = latent_sweep(session, model, model.test_weights, "def f1(")
        heads = head_sweep(session, model, "def f1(")
    assert found.active == latents.active
    rows = latents.ranked()[: len(found.latents)]
    assert len(rows) == min(12, latents.active)
    np.testing.assert_allclose([one.effect for one in found.latents], latents.effect_N[rows], atol=3e-4)
    assert all(one.label == (f"called {one.latent}" if one.latent in NAMED else "") for one in found.latents)
    assert found.probability == pytest.approx(np.exp(latents.target.plain), abs=1e-4)
    np.testing.assert_allclose(found.heads, heads.effect_LH, atol=3e-4)
    assert found.blocks == [0, 1, 2, 3]


def test_a_long_prompt_has_no_sweeps(built):
    _, _, table, _, model = built
    prompt = "def f1(" * 40
    inputs = ReportInputs(
        model=model, weights=model.test_weights, windows=table, evaluation={"fvu": 0.5, "ce_recovered": 0.9},
        config=ReportConfig(top_latents=0, tokens=64, prompt=prompt), session=ONE,
    )  # fmt: skip
    assert collect(inputs).next_token is None


def test_a_resumed_runs_repeated_steps_count_once(built):
    folder, *_ = built
    curve = read_training_curve(folder / "metrics.jsonl", 128, 1000)
    assert curve.tokens == [2048, 4096, 6144]
    assert curve.fvu == [1 / 2, 1 / 3, 1 / 4]
    assert curve.dead_share == [13 / 128] * 3


@pytest.mark.parametrize(
    "line",
    [
        b'{"tok',
        b"\xff",
        b'{"tokens": "a", "fvu": 1}',
        b'{"tokens": 1, "fvu": [1]}',
        b'{"tokens": 1, "fvu": 1, "dead": "x"}',
    ],
)
def test_a_damaged_training_log_is_named(line, tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"tokens": 1, "fvu": 0.5}\n' + line)
    with pytest.raises(FormatError, match="line 2"):
        read_training_curve(tmp_path / "m.jsonl", 128)


def test_windows_come_from_all_documents_in_turn(built):
    _, _, table, *_ = built
    order = even_order(table, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(table.n_windows))
    documents = table.doc_N[table.window_starts[order]]
    sizes = np.bincount(table.doc_N[table.window_starts[:-1]])
    assert len(set(documents[: len(sizes)].tolist())) == len(sizes)  # each once before any twice
    twice = int((sizes >= 2).sum())
    assert len(set(documents[len(sizes) : len(sizes) + twice].tolist())) == twice
