"""Every latent off, one at a time, against HF with the same change made in float64; `ggscope latents`."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from convert.sae_gguf import write_sae_gguf
from pipeline.cli import main
from pipeline.interventions.ablate import Ablate
from pipeline.lenses.latents import latent_sweep
from pipeline.lenses.patching import prompt_tokens
from pipeline.llama.encoder import GgmlEncoder
from pipeline.llama.hooks import HookPoint
from pipeline.stages import latents as stage
from sae.encoders import NumpyEncoder, encoder_of
from sae.errors import ConfigError
from sae.runtime import encode, latent_values
from tests.interventions.tiny import (
    dense_acts,
    hf_logits,
    logprobs,
    residual,
    run,
    sae_at,
    session,
    tiny,
    token,
    write_tiny_llama,
)

TEXT, ANSWER, WRONG = "if self.name in self.text", " self", " not"
BLOCK = 1


def sweep(s, weights, *answers, **options):
    return latent_sweep(s, tiny()[0], weights, TEXT, *answers, **options)


def transcoder():
    rng = np.random.default_rng(4)
    w = sae_at(BLOCK)
    return dataclasses.replace(
        w, b_dec_subtracted=False, b_enc_F=w.b_enc_F - w.W_enc_FD @ w.b_dec_D, W_dec_FD=rng.standard_normal(w.W_dec_FD.shape).astype(np.float32) / 8,
        hook=f"blocks.{BLOCK}.hook_resid_pre", hook_out=f"blocks.{BLOCK}.hook_mlp_out",
    )  # fmt: skip


@pytest.mark.parametrize("answers", [(), (ANSWER, WRONG)])
def test_every_number_is_hfs_with_that_latent_off(answers):
    tokens, w = prompt_tokens(tiny()[0], TEXT), sae_at(BLOCK)
    result = sweep(session(n_seq_max=8), w, *answers)
    a_TF = dense_acts(w, residual(session(), tokens, w.hook))
    a_TF[0] = 0  # BOS
    np.testing.assert_array_equal(np.sort(result.latents_N), np.flatnonzero(a_TF.max(0) > 0))
    assert result.active == len(result.latents_N) > 20
    clean_V = logprobs(hf_logits(tokens, {})[-1])
    answer = token(ANSWER) if answers else int(clean_V.argmax())

    def measure(logprob_V):
        return logprob_V[answer] - (logprob_V[token(WRONG)] if answers else 0)

    assert result.target.plain == pytest.approx(measure(clean_V), abs=1e-4)
    for row, latent in enumerate(result.latents_N.tolist()):
        place = int(a_TF[:, latent].argmax())
        assert result.position_N[row] == place
        assert result.activation_N[row] == pytest.approx(a_TF[place, latent], rel=1e-4)
        assert result.tokens_N[row] == np.count_nonzero(a_TF[:, latent])

        def off(x_TD, latent=latent):
            acts_T = dense_acts(w, x_TD)[:, latent]
            acts_T[0] = 0
            return x_TD - acts_T[:, None] * w.W_dec_FD[latent].astype(np.float64)

        without_V = logprobs(hf_logits(tokens, {BLOCK: off})[-1])
        kl = (np.exp(clean_V) * (clean_V - without_V)).sum()
        assert result.effect_N[row] == pytest.approx(measure(without_V) - measure(clean_V), abs=3e-4)
        assert result.kl_N[row] == pytest.approx(kl, abs=1e-5 + 2e-3 * kl)
    assert np.abs(result.effect_N).max() > 0.05
    effects = np.abs(result.effect_N[result.ranked()])
    assert (np.diff(effects) <= 0).all()
    said = result.to_dict()
    assert (said["active"], said["answer"]) == (result.active, answer)
    for name, column in {"latent": "latents", "kl_nats": "kl"}.items() | {
        (same, same) for same in ("activation", "position", "tokens", "effect", "likeliest")
    }:
        assert [one[name] for one in said["latents"]] == getattr(result, f"{column}_N").tolist()


@pytest.mark.parametrize("weights", [sae_at, transcoder], ids=["sae", "transcoder"])
@pytest.mark.parametrize("kind", ["numpy", "ggml", "of other biases"])
def test_side_by_side_equals_one_at_a_time(weights, kind):
    w = weights(BLOCK) if weights is sae_at else weights()
    other = NumpyEncoder(dataclasses.replace(w, b_enc_F=w.b_enc_F + 0.2))  # to see that it is asked
    encoder = {"numpy": None, "ggml": GgmlEncoder(w, n_threads=1), "of other biases": other}[kind]
    many = sweep(session(n_seq_max=8, n_ctx=512), w, encoder=encoder)
    tokens = prompt_tokens(tiny()[0], TEXT)
    x_TD = residual(session(), tokens, w.hook)
    for latent, place, activation in zip(many.latents_N, many.position_N, many.activation_N, strict=True):
        found = encoder_of(w, encoder).encode(x_TD[[place]])
        assert activation == pytest.approx(latent_values(w, x_TD[[place]], [latent], encoded=found)[0, 0], rel=1e-3)
    clean_V = logprobs(run(session(), tokens)[-1])
    point = HookPoint.parse(w.hook_out or w.hook)
    for row, latent in enumerate(many.latents_N.tolist()):
        edit = Ablate(point=point, weights=w, latents=(latent,), encoder=encoder)
        alone_V = logprobs(run(session(), tokens, [edit])[-1])
        answer = many.target.answer
        assert many.effect_N[row] == pytest.approx(alone_V[answer] - clean_V[answer], abs=2e-4)
    assert np.abs(many.effect_N).max() > 0.01


def test_the_latents_of_tokens_that_matter_come_first_where_not_all_are_looked_at():
    tokens, w, seen = prompt_tokens(tiny()[0], TEXT), sae_at(BLOCK), []
    whole = sweep(session(n_seq_max=4), w)
    part = sweep(session(n_seq_max=4), w, most=5, progress=lambda done, total: seen.append((done, total)))
    a_TF = dense_acts(w, residual(session(), tokens, w.hook))
    clean_V = logprobs(hf_logits(tokens, {})[-1])
    score_F = np.zeros(w.num_latents)
    for t in range(1, len(tokens)):

        def off(x_TD, t=t):
            out = x_TD.copy()
            out[t] -= dense_acts(w, x_TD)[t] @ w.W_dec_FD.astype(np.float64)
            return out

        without_V = logprobs(hf_logits(tokens, {BLOCK: off})[-1])
        kl = (np.exp(clean_V) * (clean_V - without_V)).sum()
        score_F += kl * a_TF[t] ** 2 / (a_TF[t] ** 2).sum()
    assert part.latents_N.tolist() == np.argsort(-score_F)[:5].tolist()
    by_latent = dict(zip(whole.latents_N.tolist(), whole.effect_N, strict=True))
    np.testing.assert_allclose(part.effect_N, [by_latent[latent] for latent in part.latents_N.tolist()], atol=2e-4)
    runs = len(tokens) - 1 + 5
    assert (part.active, seen[-1]) == (whole.active, (runs, runs))
    assert sorted(seen) == seen
    assert sweep(session(n_seq_max=4), w, most=whole.active).latents_N.tolist() == whole.latents_N.tolist()


def test_a_prompt_on_which_nothing_fires_has_no_latents():
    silent = dataclasses.replace(sae_at(BLOCK), b_enc_F=np.full(128, -1e4, np.float32))
    for result in (sweep(session(), silent), latent_sweep(session(), tiny()[0], sae_at(BLOCK), "")):
        assert (result.active, len(result.latents_N), result.ranked(), result.to_dict()["latents"]) == (0, 0, [], [])
    with pytest.raises(ConfigError, match="should be one token"):
        sweep(session(), sae_at(BLOCK), " selfqq")


def test_the_command_says_and_draws_the_strongest_latents(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ggscope"])
    monkeypatch.setenv("COLUMNS", "200")
    write_tiny_llama(tmp_path / "tiny.gguf")
    w = dataclasses.replace(sae_at(BLOCK), host=tiny()[0].id.as_dict())
    busy = int(encode(w, residual(session(), prompt_tokens(tiny()[0], TEXT), w.hook))[0][-1, 0])
    w = dataclasses.replace(w, labels={busy: "the word $self$"})
    write_sae_gguf(tmp_path / "sae.gguf", w)
    given = [
        "model.path=tiny.gguf",
        "model.n_threads=1",
        "model.kv_type=f32",
        "model.flash_attn=off",
        "sae.path=sae.gguf",
    ]
    args = ["--prompt", TEXT, "--answer", ANSWER, "--wrong", WRONG, "run_dir=made", "latents.top=128"]
    encoders = []

    def asked(*args, encoder, **options):
        encoders.append(encoder)
        return latent_sweep(*args, encoder=encoder, **options)

    monkeypatch.setattr(stage, "latent_sweep", asked)
    assert main(["latents", *given, *args]) == 0
    said = capsys.readouterr().out
    values = json.loads((tmp_path / "made" / "latents.json").read_text())
    expected = sweep(session(n_seq_max=8), w, ANSWER, WRONG)
    effects = {one["latent"]: one["effect"] for one in values["latents"]}
    assert effects == pytest.approx(dict(zip(expected.latents_N.tolist(), expected.effect_N, strict=True)), abs=1e-3)
    assert {one["latent"]: one["label"] for one in values["latents"]}[busy] == "the word $self$"
    assert f"{busy} (the word $self$)" in said
    assert f"logit difference '{ANSWER}' - '{WRONG}'" in said
    assert f"{expected.active} of {expected.active} active latents" in said
    assert imread(tmp_path / "made" / "latents.png").shape[1] > 800
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    first = max(values["latents"], key=lambda one: abs(one["effect"]))
    assert manifest["metrics"]["strongest"] == first["latent"]
    assert main(["latents", *given, *args[:2], "latents.format=json", "latents.most=3", "apply.encoder=numpy"]) == 0
    printed = capsys.readouterr()
    shown = json.loads(printed.out)
    assert f"3 of {expected.active} active latents" in " ".join(printed.err.split())
    assert [isinstance(encoder, GgmlEncoder) for encoder in encoders] == [True, False]
    assert (shown["measure"], len(shown["latents"]), shown["active"]) == ("logprob", 3, expected.active)
    assert main(["latents", *given]) == 2
    assert "--prompt" in capsys.readouterr().err
    write_sae_gguf(tmp_path / "silent.gguf", dataclasses.replace(w, b_enc_F=np.full(128, -1e4, np.float32)))
    assert main(["latents", *given[:-1], "sae.path=silent.gguf", *args[:2]]) == 2
    assert "no latent fires on this prompt" in capsys.readouterr().err
