"""Several SAEs at several blocks in one forward pass, each with another kind of edit, against HF in float64."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.generate import generate
from pipeline.interventions.ablate import Ablate
from pipeline.interventions.clamp import Clamp
from pipeline.interventions.replace import Reconstruct
from pipeline.interventions.steer import Steer
from pipeline.llama.encoder import GgmlEncoder
from pipeline.llama.hooks import HookPoint
from pipeline.readout import Reader

from .tiny import dense_acts, hf_logits, prompt, relative, residual, run, sae_at, session, tiny

POST = "blocks.{}.hook_resid_post"


def point(block):
    return HookPoint.parse(POST.format(block))


def but_bos(edit):
    def change(x_TD):
        return np.concatenate([x_TD[:1], edit(x_TD[1:])])

    return change


def all_edits(saes, encoders):
    """Per block an intervention, and the same change in float64."""
    firing = {}
    for block, sae in saes.items():
        a_TF = dense_acts(sae, residual(session(), prompt(), POST.format(block)))
        firing[block] = tuple(np.argsort(-a_TF[1:].sum(axis=0))[:2].tolist())
    W = {block: sae.W_dec_FD.astype(np.float64) for block, sae in saes.items()}

    def acts(block, x_ND, latents):
        return dense_acts(saes[block], x_ND)[:, list(latents)]

    def common(block):
        return {"point": point(block), "weights": saes[block]}

    ours = [
        Steer(**common(0), latents=(3, 9), coeffs=(2.0, -1.0)),
        Clamp(**common(1), latents=firing[1], values=(1.5, 0.25), encoder=encoders[1]),
        Ablate(**common(2), latents=firing[2], encoder=encoders[2]),
        Reconstruct(**common(3), encoder=encoders[3]),
    ]
    change = {
        0: lambda x: x + 2.0 * W[0][3] - W[0][9],
        1: lambda x: x + (np.array([1.5, 0.25]) - acts(1, x, firing[1])) @ W[1][list(firing[1])],
        2: lambda x: x - acts(2, x, firing[2]) @ W[2][list(firing[2])],
        3: lambda x: dense_acts(saes[3], x) @ W[3] + saes[3].b_dec_D,
    }
    return ours, {block: but_bos(edit) for block, edit in change.items()}


@pytest.mark.parametrize("kind", ["numpy", "ggml"])
def test_steer_clamp_ablate_and_reconstruct_at_four_blocks_at_once_are_hfs(kind):
    tokens = prompt()
    saes = {block: sae_at(block, seed=block) for block in range(4)}
    encoders = {b: GgmlEncoder(w, n_threads=1) if kind == "ggml" else None for b, w in saes.items()}
    ours, change = all_edits(saes, encoders)
    logits = run(session(), tokens, ours)
    oracle = hf_logits(tokens, change)
    assert relative(logits, oracle) < 2e-5
    for block in range(4):  # each edit matters
        fewer = {b: edit for b, edit in change.items() if b != block}
        assert relative(oracle, hf_logits(tokens, fewer)) > 1e-3, block


def test_every_reader_sees_what_the_edits_before_its_point_led_to():
    """The tokens are read again in one piece with the same edits: the residual before each block's own edit."""
    tokens = prompt()
    saes = {block: sae_at(block, seed=block) for block in (1, 3)}
    steer = Steer(point=point(1), weights=saes[1], latents=(5,), coeffs=(3.0,))
    readers = [Reader(sae, top=6) for sae in saes.values()]
    events = list(generate(session(), tiny()[0], tokens, interventions=[steer], readers=readers, max_tokens=4))
    ids = np.array([e.token for e in events], np.int32)
    plain_TD = residual(session(), ids, POST.format(1))  # the reading at the steered point is of the model's own value
    steered_TD = residual(session(), ids, POST.format(3), [steer])
    for reading, sae, x_TD in ((0, saes[1], plain_TD), (1, saes[3], steered_TD)):
        a_TF = dense_acts(sae, x_TD)
        for event, a_F in zip(events[1:], a_TF[1:], strict=True):
            latents = dict(event.readings[reading].latents)
            assert set(latents) == set(np.flatnonzero(a_F).tolist())
            np.testing.assert_allclose(list(latents.values()), a_F[list(latents)], rtol=1e-3, atol=1e-4)
