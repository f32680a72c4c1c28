"""CE and KL of a model that runs on what a transcoder or crosscoder makes of its activations.

The oracle captures the undisturbed rows, reconstructs them densely in float64, puts them in place by a plain edit of
each hook point, one window after another, and takes CE and KL from the logits in float64.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from pipeline.corpus.readers import Document
from pipeline.corpus.windows import windows
from pipeline.evaluation.ports import ports_of
from pipeline.evaluation.wired import evaluate_wired
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Hook, Session, capture
from sae.errors import ConfigError, ShapeError
from sae.weights import SAEWeights
from tests.evaluation.test_wired import ALL, MID, ONE, OUT, POST, D, F, K, dense
from tests.sae.toy import random_weights
from tests.tiny_llama import write_tiny_llama

LATE, LATE_OUT = "blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out"
NEXT = "blocks.3.hook_resid_pre"  # the tensor of POST
POINTS = (MID, OUT, POST, NEXT, LATE, LATE_OUT)
STUDENT_10 = 2.2281388520  # 0.975 quantile of Student's t with 10 degrees of freedom, from a table


class Tiny:
    """A model, short documents, the undisturbed rows of POINTS, float32 and of all windows in order."""

    def __init__(self, model):
        self.model = model
        texts = [f"def f{i}(a, b):\n    return {i} * (a + b)\n\n" * (2 + i % 3) for i in range(11)]
        self.table = windows(model, [Document(name=f"{i}.py", text=text) for i, text in enumerate(texts)], 32)
        tokens = [self.table.window_tokens(w) for w in range(self.table.n_windows)]
        with Session(model, n_ctx=512, n_seq_max=4, **ONE) as session:
            captured = capture(session, tokens, [HookPoint.parse(name) for name in POINTS])
        self.rows = {name: np.concatenate([c[name] for c in captured]) for name in POINTS}
        self.free_N = self.table.flags_N == 0

    def logs(self, replaced, free_N):
        """log p (rows, V) of every row, float64, with `replaced[hook point]` in place of the free rows."""
        found = []
        with Session(self.model, n_ctx=64, **ONE) as session:
            for start, stop in zip(self.table.window_starts, self.table.window_starts[1:], strict=False):

                def edit(rows, y_ND, start=start):
                    at_N = start + rows.pos_N
                    return np.where(free_N[at_N, None], y_ND[at_N] - rows.values_ND, 0).astype(np.float32)

                hooks = [Hook(point=HookPoint.parse(n), edit=partial(edit, y_ND=y)) for n, y in replaced.items()]
                n = stop - start
                tokens_N = self.table.token_N[start:stop]
                logits_NV = session.decode(tokens_N, np.zeros(n, int), np.arange(n), hooks=hooks, logits="all")
                z_NV = np.asarray(logits_NV, np.float64)
                z_NV -= z_NV.max(axis=1, keepdims=True)
                found.append(z_NV - np.log(np.exp(z_NV).sum(axis=1, keepdims=True)))
                session.clear()
        return np.concatenate(found)

    def losses(self, replaced, free_N=None):
        """CE and KL to the undisturbed run of every counted token, and its document."""
        free_N = self.free_N if free_N is None else free_N
        counted = np.flatnonzero(free_N & np.r_[np.diff(self.table.window_N) == 0, False])
        clean, run = (self.logs(y, free_N)[counted] for y in ({}, replaced))
        ce = -run[np.arange(len(counted)), self.table.token_N[counted + 1]]
        return ce, (np.exp(clean) * (clean - run)).sum(axis=1), self.table.doc_N[counted]

    def reconstruction(self, w):
        """{output: y_hat of every row}, float64."""
        inputs, outputs = ports_of(w)
        _, y_hat_NO = dense(w, np.concatenate([self.rows[name] for name, _ in inputs], axis=1).astype(np.float64))
        ends = np.cumsum([width for _, width in outputs])
        return {name: part for (name, _), part in zip(outputs, np.split(y_hat_NO, ends[:-1], axis=1), strict=True)}

    def evaluate(self, w, baselines=None):
        return evaluate_wired(self.model, w, self.table, config=ALL, baselines=baselines, session=ONE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("wired_splice") / "tiny.gguf"
    write_tiny_llama(path)
    with Model(path) as model:
        yield Tiny(model)


def wired(kind, seed=0) -> SAEWeights:
    """Weights nobody trained, of each kind; the later input of the cross-layer transcoder lies behind its first output."""
    rng = np.random.default_rng(seed)
    if kind == "transcoder":
        return random_weights(rng, d=D, latents=F, k=K, hook=MID, hook_out=OUT, b_dec_subtracted=False)
    if kind == "crosscoder":
        return random_weights(rng, d=2 * D, latents=F, k=K, hook=MID, ports=((MID, D), (POST, D)))
    W_enc_FI = rng.standard_normal((F, 2 * D))
    W_enc_FI[: F // 2, D:] = 0
    W_enc_FI[F // 2 :, :D] = 0
    return random_weights(
        rng, d=2 * D, latents=F, k=K, W_enc_FD=W_enc_FI, hook=MID, hook_out=OUT,
        b_dec_subtracted=False, ports=((MID, D), (LATE, D), (OUT, D), (LATE_OUT, D)),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["transcoder", "crosscoder", "cross_layer"])
def test_ce_and_kl_are_those_of_the_model_with_the_reconstruction_put_in_by_hand(tiny, kind):
    w = wired(kind)
    found, made = tiny.evaluate(w), tiny.reconstruction(w)
    assert list(made) == list(found["fvu_of"])
    ends = np.cumsum([part.shape[1] for part in made.values()])
    means = dict(zip(made, np.split(w.mean_D, ends[:-1]), strict=True))
    clean, *_ = tiny.losses({})
    ce, kl, document_N = tiny.losses(made)
    zero, zero_kl, _ = tiny.losses({name: np.zeros_like(y) for name, y in made.items()})
    mean, *_ = tiny.losses({name: np.tile(means[name], (len(y), 1)) for name, y in made.items()})
    close = partial(pytest.approx, abs=2e-5)
    assert found["ce_clean"] == close(clean.mean())
    assert found["ce_sae"] == close(ce.mean())
    assert found["ce_zero"] == close(zero.mean())
    assert found["ce_mean"] == close(mean.mean())
    assert found["kl"] == close(kl.mean())
    assert found["baselines"]["zero"]["kl"] == close(zero_kl.mean())
    assert found["delta_ce_nats"] == close(ce.mean() - clean.mean())
    assert kl.mean() > 0.1
    assert found["splice_rows"] == len(ce)
    recovered = (zero.mean() - ce.mean()) / (zero.mean() - clean.mean())
    if zero.mean() > clean.mean():
        assert found["ce_recovered"] == pytest.approx(recovered, rel=1e-3)
    else:
        assert found["ce_recovered"] is None
    assert found["cluster_kind"] == "document"
    documents, which = np.unique(document_N, return_inverse=True)
    m, delta = len(documents), ce - clean
    assert m == 11
    off_C = np.bincount(which, weights=delta - delta.mean())
    half = STUDENT_10 * np.sqrt(m / (m - 1) * (off_C**2).sum()) / len(delta)
    assert found["delta_ce_ci95"] == pytest.approx([delta.mean() - half, delta.mean() + half], abs=1e-4)


def test_inputs_are_those_of_the_undisturbed_run(tiny):
    """An input behind a replaced output would be another in a model that ran on its own replacements."""
    w = wired("cross_layer")
    made = tiny.reconstruction(w)
    disturbed = {}

    def keep(rows, start):
        disturbed[start] = rows.values_ND.copy()

    with Session(tiny.model, n_ctx=64, **ONE) as session:
        for start, stop in zip(tiny.table.window_starts, tiny.table.window_starts[1:], strict=False):

            def edit(rows, start=start):
                free_N1 = tiny.free_N[start + rows.pos_N, None]
                return np.where(free_N1, made[OUT][start + rows.pos_N] - rows.values_ND, 0).astype(np.float32)

            hooks = [
                Hook(point=HookPoint.parse(OUT), edit=edit),
                Hook(point=HookPoint.parse(LATE), read=partial(keep, start=start)),
            ]
            n = stop - start
            session.decode(tiny.table.token_N[start:stop], np.zeros(n, int), np.arange(n), hooks=hooks, logits="all")
            session.clear()
    late_ND = np.concatenate(list(disturbed.values()))
    x_NI = np.concatenate([tiny.rows[MID], late_ND], axis=1).astype(np.float64)
    own_ND = dense(w, x_NI)[1][:, D:]
    other, *_ = tiny.losses(made | {LATE_OUT: own_ND})
    assert abs(other.mean() - tiny.evaluate(w)["ce_sae"]) > 1e-3


def identity(points, outputs=()):
    """Reads and gives back the same numbers: a positive and a negative latent for each column."""
    columns = D * len(points)
    both_FD = np.concatenate([np.eye(columns), -np.eye(columns)])
    zeros = np.zeros(columns)
    return SAEWeights(
        W_enc_FD=both_FD, b_enc_F=np.zeros(2 * columns), W_dec_FD=both_FD, b_dec_D=zeros, mean_D=zeros, variance=1.0,
        k=columns, hook=points[0], hook_out=outputs[0] if outputs else "", variant="threshold", threshold_F=np.zeros(2 * columns),
        b_dec_subtracted=False, ports=tuple((name, D) for name in (*points, *outputs)),
    )  # fmt: skip


@pytest.mark.parametrize("w", [identity([POST], [NEXT]), identity([MID, POST])], ids=["transcoder", "crosscoder"])
def test_the_identity_recovers_everything(tiny, w):
    found = tiny.evaluate(w)
    assert found["ce_recovered"] == 1
    assert found["ce_recovered_ci95"] == [1, 1]
    assert (found["delta_ce_nats"], found["kl"], found["fvu"], found["same_rows"]["fvu"]) == (0, 0, 0, 0)
    assert found["baselines"]["zero"]["ce_recovered"] == 0


def test_hook_points_of_other_widths_patterns_and_two_names_of_one_tensor_are_refused(tiny):
    with pytest.raises(ShapeError, match=f"expected {D} values a row at blocks.1.mlp.hook_post, as the SAE"):
        tiny.evaluate(identity(["blocks.1.mlp.hook_post"], [OUT]))
    with pytest.raises(ConfigError, match=r"blocks\.1\.attn\.hook_pattern has a pattern"):
        tiny.evaluate(identity(["blocks.1.attn.hook_pattern"], [OUT]))
    with pytest.raises(ConfigError, match=f"{POST} and {NEXT} are one tensor of this model"):
        tiny.evaluate(identity([POST, NEXT]))


@pytest.mark.parametrize("kind", ["transcoder", "crosscoder", "cross_layer"])
def test_a_reconstruction_of_zeros_is_zero_ablation(tiny, kind):
    w = wired(kind)
    nothing = replace(w, W_dec_FD=np.zeros_like(w.W_dec_FD), b_dec_D=np.zeros_like(w.b_dec_D), b_dec_subtracted=False)
    found = tiny.evaluate(nothing)
    zero = found["baselines"]["zero"]
    assert found["ce_sae"] == found["ce_zero"] != found["ce_clean"]
    assert (found["kl"], found["delta_ce_nats"]) == (zero["kl"], zero["delta_ce_nats"])
    assert found["ce_recovered"] in (0, None)


def test_rows_beyond_a_threshold_of_any_hook_point_pass_unchanged_and_do_not_count(tiny):
    norm_N = np.sort(np.linalg.norm(tiny.rows[MID][tiny.free_N], axis=1))
    at = len(norm_N) * 3 // 4 + int(np.diff(norm_N[len(norm_N) * 3 // 4 :][:40]).argmax())
    limit = float(norm_N[at] + norm_N[at + 1]) / 2  # no rounding crosses it
    w = replace(wired("transcoder"), training={"outlier_thresholds": {MID: limit, OUT: 1e9}})
    free_N = tiny.free_N & (np.linalg.norm(tiny.rows[MID], axis=1) <= limit)
    found = tiny.evaluate(w)
    ce, kl, _ = tiny.losses(tiny.reconstruction(w), free_N)
    assert found["splice_rows"] == len(ce)
    assert found["ce_sae"] == pytest.approx(ce.mean(), abs=2e-5)
    assert found["kl"] == pytest.approx(kl.mean(), abs=2e-5)
    assert found["splice_flagged_share"] == pytest.approx(1 - free_N.mean(), rel=1e-12)
    everywhere, *_ = tiny.losses(tiny.reconstruction(w))
    assert abs(everywhere.mean() - ce.mean()) > 1e-3


def test_the_spliced_rows_have_the_quality_of_the_split_where_they_are_the_split(tiny):
    found = tiny.evaluate(wired("crosscoder"))
    for key in ("fvu", "l0", "cosine", "l2_ratio"):
        assert found["same_rows"][key] == pytest.approx(found[key], rel=1e-5)
    assert found["baselines"]["zero"]["l0"] == 0
    assert found["baselines"]["mean"].keys() == found["baselines"]["zero"].keys()
