"""Transcoders and crosscoders on held-out rows, against numpy on rows captured by themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.config import EvaluateConfig
from pipeline.corpus.readers import Document
from pipeline.corpus.windows import windows
from pipeline.evaluation.ports import output_scales, ports_of
from pipeline.evaluation.wired import evaluate_wired
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Session, capture
from sae.checkpoint import load_weights, save_weights
from sae.errors import ConfigError
from sae.learner import Learner, Subject
from sae.metrics import Moments
from sae.model import input_scale
from sae.options import SAEOptions
from sae.train_config import TrainConfig
from sae.wiring import Wiring
from tests.sae.toy import random_weights
from tests.tiny_llama import write_tiny_llama

ONE = {"n_threads": 1, "kv_type": "f32", "flash_attn": "off"}
ALL = EvaluateConfig(tokens=0, splice_tokens=0)
D, F, K = 64, 128, 6
MID, OUT, POST = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"
EARLY = "blocks.0.hook_resid_mid"
POINTS = (EARLY, MID, OUT, POST)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The model, a table of short documents, its rows at four hook points in float64."""
    path = tmp_path_factory.mktemp("wired") / "tiny.gguf"
    write_tiny_llama(path)
    with Model(path) as model:
        texts = [f"def f{i}(a, b):\n    return {i} * (a + b)\n\n" * (2 + i % 3) for i in range(8)]
        table = windows(model, [Document(name=f"{i}.py", text=text) for i, text in enumerate(texts)], 32)
        with Session(model, n_ctx=512, n_seq_max=4, **ONE) as session:
            tokens = [table.window_tokens(w) for w in range(table.n_windows)]
            captured = capture(session, tokens, [HookPoint.parse(name) for name in POINTS])
        rows = {name: np.concatenate([c[name] for c in captured]).astype(np.float64) for name in POINTS}
        yield model, table, rows


def dense(w, x_NI):
    """a_NF and y_hat_NO in float64."""
    pre_NF = x_NI @ w.W_enc_FD.T.astype(np.float64) + w.b_enc_F
    if w.b_dec_subtracted:
        pre_NF -= w.W_enc_FD.astype(np.float64) @ w.b_dec_D
    a_NF = np.where(pre_NF >= np.sort(pre_NF, axis=1)[:, -w.k, None], np.maximum(pre_NF, 0), 0)
    return a_NF, a_NF @ w.W_dec_FD + w.b_dec_D


def fvu(y_ND, y_hat_ND):
    return ((y_ND - y_hat_ND) ** 2).sum() / ((y_ND - y_ND.mean(axis=0)) ** 2).sum()


def evaluated(tiny, weights):
    model, table, _ = tiny
    return evaluate_wired(model, weights, table, config=ALL, session=ONE)


def transcoder(**extra):
    fields = {"hook": MID, "hook_out": OUT, "b_dec_subtracted": False} | extra
    return random_weights(np.random.default_rng(0), d=D, latents=F, k=K, **fields)


def test_a_transcoder_is_judged_by_what_it_makes_of_the_output(tiny):
    _, table, rows = tiny
    keep = table.flags_N == 0
    w = transcoder(ports=((MID, D), (OUT, D)))
    a_NF, y_hat_ND = dense(w, rows[MID][keep])
    found = evaluated(tiny, w)
    assert found["fvu"] == pytest.approx(fvu(rows[OUT][keep], y_hat_ND), rel=1e-4)
    assert found["l0"] == pytest.approx((a_NF > 0).sum(axis=1).mean(), rel=1e-3)
    assert found["dead_share"] == pytest.approx((a_NF == 0).all(axis=0).mean(), abs=1.5 / F)
    assert (found["rows"], found["captured_rows"]) == (keep.sum(), table.rows)
    assert found["fvu_of"] == {OUT: pytest.approx(found["fvu"])}
    assert evaluated(tiny, transcoder()) == found  # an imported one names no ports


def test_one_output_is_in_its_own_units_where_the_file_does_not_say():
    moments = Moments(D)
    moments.update(1000 * np.random.default_rng(0).standard_normal((50, D)))
    assert output_scales(transcoder(), [moments]) == [1.0]
    assert output_scales(transcoder(training={"scales": [8.0, 0.5]}), [moments]) == [0.5]


def test_an_output_that_never_moves_has_scale_1_where_the_file_does_not_say():
    still, moving = Moments(D), Moments(D)
    still.update(np.ones((50, D)))
    moving.update(1000 * np.random.default_rng(0).standard_normal((50, D)))
    w = random_weights(np.random.default_rng(1), d=2 * D, latents=F, k=K, hook=MID, ports=((MID, D), (POST, D)))
    assert output_scales(w, [still, moving]) == [1.0, 1024.0]


def test_a_crosscoder_is_judged_at_all_its_hook_points_and_at_each(tiny):
    _, table, rows = tiny
    keep = table.flags_N == 0
    w = random_weights(np.random.default_rng(1), d=2 * D, latents=F, k=K, hook=MID, ports=((MID, D), (POST, D)))
    y_NO = np.concatenate([rows[MID], rows[POST]], axis=1)[keep]
    _, y_hat_NO = dense(w, y_NO)
    found = evaluated(tiny, w)
    parts = [slice(0, D), slice(D, 2 * D)]
    scale_P = [input_scale(float(y_NO[:, part].var(axis=0).sum()), D) for part in parts]
    scale_O = np.repeat(scale_P, D)
    assert found["scale_of"] == dict(zip((MID, POST), scale_P, strict=True))  # the file does not say
    assert found["fvu"] == pytest.approx(fvu(y_NO / scale_O, y_hat_NO / scale_O), rel=1e-4)
    own = evaluated(tiny, replace(w, training={"scales": [1, 0.25]}))
    scale_O = np.repeat([1, 0.25], D)
    assert own["fvu"] == pytest.approx(fvu(y_NO / scale_O, y_hat_NO / scale_O), rel=1e-4)
    assert own["fvu_of"] == found["fvu_of"]
    assert own["same_rows"]["fvu"] == pytest.approx(own["fvu"], rel=1e-4)  # of all windows, as here
    scatter_O = ((y_NO - y_NO.mean(axis=0)) ** 2).sum(axis=0)
    assert own["scatter"] == pytest.approx([scatter_O[part].sum() for part in parts], rel=1e-5)
    one = evaluated(tiny, replace(w, training={"scale": [2.0]}))
    assert one["fvu"] == pytest.approx(fvu(y_NO, y_hat_NO), rel=1e-4)
    assert found["fvu_of"] == {
        MID: pytest.approx(fvu(y_NO[:, :D], y_hat_NO[:, :D]), rel=1e-4),
        POST: pytest.approx(fvu(y_NO[:, D:], y_hat_NO[:, D:]), rel=1e-4),
    }
    assert found["inputs"] == [MID, POST]


TRAINED = {
    "crosscoder": Wiring(kind="crosscoder", inputs=((EARLY, D), (OUT, D), (POST, D))),
    "cross_layer": Wiring(kind="cross_layer", inputs=((EARLY, D), (MID, D)), outputs=((OUT, D), (POST, D))),
    "transcoder": Wiring(kind="transcoder", inputs=((MID, D),), outputs=((OUT, D),), skip=True),
}


@pytest.mark.parametrize("input_norm", ["dataset", "none"])
@pytest.mark.parametrize("kind", TRAINED)
def test_fvu_is_that_of_the_training_on_the_same_rows(tiny, tmp_path, kind, input_norm):
    model, table, rows = tiny
    wiring = TRAINED[kind]
    x_NW = np.concatenate([rows[name] for name, _ in (*wiring.inputs, *wiring.outputs)], axis=1)[table.flags_N == 0]
    mean_W = x_NW.mean(axis=0)
    variances = tuple(float(((x_NW - mean_W)[:, part] ** 2).sum(axis=1).mean()) for part in wiring.parts)
    config = TrainConfig(
        num_latents=F, k=K, batch_tokens=len(x_NW), encoder_dtype="float32", kernel="torch",
        options=SAEOptions(input_norm=input_norm),
    )  # fmt: skip
    subject = Subject(
        d_in=wiring.width, mean_D=mean_W, hook=wiring.inputs[0][0], host={}, wiring=wiring, variances=variances,
        variance=sum(variances[len(wiring.inputs) :] if wiring.two_sided else variances),
    )  # fmt: skip
    learner = Learner(config, subject, torch.device("cpu"))
    save_weights(tmp_path / "sae", learner.weights())  # the report is of the step that starts from these
    learner.train(*learner.prepare(x_NW.astype(np.float32)))
    logged = learner.report(1.0, 0.0)
    found = evaluate_wired(model, load_weights(tmp_path / "sae"), table, config=ALL, session=ONE)
    assert found["fvu"] == pytest.approx(logged["fvu"], rel=2e-6)
    assert found["l0"] == logged["l0"]
    outputs = [name for name, _ in wiring.outputs or wiring.inputs]
    assert list(found["fvu_of"]) == list(found["scale_of"]) == outputs
    if input_norm == "none":
        assert set(found["scale_of"].values()) == {1}
    elif kind != "transcoder":  # or the sums of raw columns would do
        assert len(set(found["scale_of"].values())) > 1


@pytest.mark.parametrize(
    "scales", [[1.0], [1.0, -1.0], [1.0, 0.0], [1.0, float("inf")], [1.0, "2"], [1.0, 10**400], 2.0]
)
def test_scales_that_cannot_be_are_refused(tiny, scales):
    w = random_weights(
        np.random.default_rng(1), d=2 * D, latents=F, k=K, hook=MID, ports=((MID, D), (POST, D)),
        training={"scales": scales},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"training\['scales'\] of 2 positive numbers"):
        evaluated(tiny, w)


@pytest.mark.parametrize("limits", [{OUT: "9"}, {MID: -1.0}, {MID: float("nan")}, {OUT: 10**400}, [1.0], 3])
def test_outlier_thresholds_that_cannot_be_are_refused(tiny, limits):
    with pytest.raises(ConfigError, match=r"training\['outlier_thresholds'\] of numbers from 0 on"):
        evaluated(tiny, transcoder(training={"outlier_thresholds": limits}))


def test_a_row_that_one_hook_point_leaves_out_is_left_out_at_all(tiny):
    _, table, rows = tiny
    norm_N = np.linalg.norm(rows[OUT], axis=1)
    limit = float(np.median(norm_N[table.flags_N == 0]))
    keep = (table.flags_N == 0) & (norm_N <= limit)
    found = evaluated(tiny, transcoder(training={"outlier_thresholds": {MID: 1e9, OUT: limit}}))
    assert found["rows"] == pytest.approx(keep.sum(), abs=1)
    with pytest.raises(ConfigError, match="every held-out row"):
        evaluated(tiny, transcoder(training={"outlier_thresholds": {OUT: 1e-9}}))


def test_the_columns_belong_to_what_is_read_and_what_is_written():
    read, written = (("a", 3), ("b", 2)), (("c", 4), ("d", 1))
    w = random_weights(
        np.random.default_rng(0), d=5, latents=8, k=2, hook="a", hook_out="c", b_dec_subtracted=False,
        ports=(*read, *written),
    )  # fmt: skip
    assert ports_of(w) == (read, written)
    plain = random_weights(np.random.default_rng(0), d=5, latents=8, k=2, hook="a")
    assert ports_of(plain) == ((("a", 5),), (("a", 5),)), "an SAE reconstructs the hook point it reads"
