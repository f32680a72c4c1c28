"""The sweep over all heads against HF, one head off at a time; `ggscope heads`."""

from __future__ import annotations

import dataclasses
import io
import json
import sys

import gguf
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from pipeline.cli import main
from pipeline.config import Config, ModelConfig
from pipeline.lenses.heads import head_sweep
from pipeline.lenses.next_token import effects, next_token
from pipeline.lenses.patching import patch_sweep, prompt_tokens
from pipeline.run import RunContext
from pipeline.stages.next_token import session_for
from pipeline.store.commits import commit_key
from sae.errors import ConfigError
from tests.interventions.test_heads import EACH, HEADS, without
from tests.interventions.tiny import BLOCKS, hf_logits, logprobs, residual, session, tiny, token, write_tiny_llama

TEXT, ANSWER, WRONG = "if self.name in self.text", " self", " not"


def sweep(s, *answers, **options):
    return head_sweep(s, tiny()[0], TEXT, *answers, **options)


@pytest.mark.parametrize("answers", [(), (ANSWER,), (ANSWER, WRONG)])
@pytest.mark.parametrize("by_mean", [False, True])
def test_every_number_is_hfs_with_that_head_off(answers, by_mean):
    tokens = prompt_tokens(tiny()[0], TEXT)
    means = {b: residual(session(), tokens, f"blocks.{b}.attn.hook_z").mean(0) for b in range(BLOCKS)}
    result = sweep(session(n_seq_max=8), *answers, means=means if by_mean else None)
    clean_V = logprobs(hf_logits(tokens, {})[-1])
    answer = token(answers[0]) if answers else int(clean_V.argmax())

    def measure(logprob_V):
        return logprob_V[answer] - (logprob_V[token(WRONG)] if len(answers) > 1 else 0)

    assert result.target.answer == answer
    assert result.target.likeliest == int(clean_V.argmax())
    assert result.target.measure == ("logit_difference" if len(answers) > 1 else "logprob")
    assert result.target.plain == pytest.approx(measure(clean_V), abs=1e-4)
    for block in range(BLOCKS):
        for head in range(HEADS):
            change = without(head, value_D=means[block] if by_mean else None)
            without_V = logprobs(hf_logits(tokens, {(block, "z"): change})[-1])
            kl = (np.exp(clean_V) * (clean_V - without_V)).sum()
            assert result.effect_LH[block, head] == pytest.approx(measure(without_V) - measure(clean_V), abs=2e-4)
            assert result.kl_LH[block, head] == pytest.approx(kl, abs=1e-5 + 1e-3 * kl)
            two = np.sort(without_V)[-2:]
            if two[1] - two[0] > 1e-3:
                assert result.likeliest_LH[block, head] == int(without_V.argmax())
    assert np.abs(result.effect_LH).max() > 0.05
    assert result.kl_LH.max() > 1e-3
    said = result.to_dict()
    wrong = token(WRONG) if len(answers) > 1 else None
    assert (said["answer"], said["wrong"], said["likeliest"]) == (answer, wrong, int(clean_V.argmax()))
    assert (said["tokens"], said["plain"]) == (tokens.tolist(), result.target.plain)
    for name, values_LH in (("effect", "effect_LH"), ("kl_nats", "kl_LH"), ("likeliest", "likeliest_LH")):
        assert [one[name] for one in said["heads"]] == getattr(result, values_LH).ravel().tolist()


@pytest.fixture
def uneven(monkeypatch):
    """The model as one whose block 2 has half as many heads, of twice the width, and whose block 1 has none."""
    monkeypatch.setattr(tiny()[0].graph, "heads", lambda: {0: HEADS, 2: HEADS // 2})


@pytest.mark.parametrize("blocks", [None, [2, 0]])
def test_blocks_with_fewer_heads_are_swept_by_their_own(uneven, blocks):
    tokens = prompt_tokens(tiny()[0], TEXT)
    means = {b: residual(session(), tokens, f"blocks.{b}.attn.hook_z").mean(0) for b in (0, 2)}
    result = sweep(session(n_seq_max=4), ANSWER, blocks=blocks, means=means)
    clean = logprobs(hf_logits(tokens, {})[-1])[token(ANSWER)]
    row = result.blocks.index(2)
    assert result.counts[row] == 2
    for head in range(2):
        change = without(2 * head, 2 * head + 1, value_D=means[2])
        effect = logprobs(hf_logits(tokens, {(2, "z"): change})[-1])[token(ANSWER)] - clean
        assert result.effect_LH[row, head] == pytest.approx(effect, abs=2e-4)
    assert np.isnan(result.effect_LH[row, 2:]).all()
    assert np.isnan(result.kl_LH[row, 2:]).all()
    assert (result.likeliest_LH[row, 2:] == -1).all()
    assert len(result.ranked()) == len(result.to_dict()["heads"]) == HEADS + 2


def test_blocks_with_fewer_heads_are_patched_by_their_own(uneven):
    texts = TEXT, "if self.line in self.text", ANSWER, WRONG
    whole = patch_sweep(session(n_seq_max=4), tiny()[0], *texts, heads=True, blocks=[2, 0])
    assert whole.heads == tuple(range(HEADS))
    source_TD, old_TD = (
        residual(session(), prompt_tokens(tiny()[0], text), "blocks.2.attn.hook_z") for text in texts[:2]
    )
    for head in range(2):
        part = slice(2 * head * EACH, 2 * (head + 1) * EACH)
        mixed_TD = old_TD.copy()
        mixed_TD[:, part] = source_TD[:, part]
        logits_V = hf_logits(prompt_tokens(tiny()[0], texts[1]), {(2, "z"): lambda _, rows=mixed_TD: rows})[-1]
        moved = logits_V[token(ANSWER)] - logits_V[token(WRONG)] - whole.corrupted_difference
        share = moved / (whole.clean_difference - whole.corrupted_difference)
        assert whole.grid_LP[0, head] == pytest.approx(share, abs=1e-3)
    assert whole.to_dict()["grid"][0][2:] == [None, None]
    assert whole.grid_LP[whole.strongest()] == np.nanmax(whole.grid_LP)
    with pytest.raises(ConfigError, match=r"attention heads, \[0, 2\]; got 1"):
        patch_sweep(session(), tiny()[0], *texts, heads=True, blocks=[1])


def test_heads_are_patched_at_the_positions_that_are_named():
    texts = TEXT, "if self.line in self.text", ANSWER, WRONG
    whole, part, none = (
        patch_sweep(session(n_seq_max=4), tiny()[0], *texts, heads=True, blocks=[1], positions=positions)
        for positions in (None, [3, 4], [0])
    )
    np.testing.assert_allclose(none.grid_LP, 0, atol=1e-5)  # before the prompts differ
    assert np.abs(part.grid_LP - whole.grid_LP).max() > 1e-3


@pytest.mark.parametrize("kv_unified", [True, False])
def test_side_by_side_equals_one_at_a_time(kv_unified):
    one = sweep(session(), side_by_side=1)
    seen = []
    many = sweep(
        session(n_seq_max=8, n_ctx=512, kv_unified=kv_unified), progress=lambda done, total: seen.append((done, total))
    )
    np.testing.assert_allclose(many.effect_LH, one.effect_LH, atol=2e-4)
    np.testing.assert_allclose(many.kl_LH, one.kl_LH, atol=1e-5)
    assert seen[-1] == (BLOCKS * HEADS, BLOCKS * HEADS)
    assert len(seen) == 3  # seven heads beside the prompt as it is


def test_some_blocks_are_the_same_rows_and_the_largest_effects_come_first():
    whole, part = sweep(session(n_seq_max=4)), sweep(session(n_seq_max=4), blocks=[2, 0, 2])
    np.testing.assert_allclose(part.effect_LH, whole.effect_LH[[2, 0]], atol=2e-4)
    assert part.blocks == (2, 0)
    effects = [abs(whole.effect_LH[place]) for place in whole.ranked()]
    assert effects == sorted(effects, reverse=True)
    assert len(effects) == BLOCKS * HEADS
    assert part.to_dict()["heads"][1]["head"] == "L2H1"


def test_bad_prompts_answers_and_blocks_are_refused(monkeypatch):
    model = tiny()[0]
    likeliest = model.piece(sweep(session(n_seq_max=8), blocks=[0]).target.likeliest).decode()
    for options, said in (
        ({"answer": " selfqq"}, "answer: ' selfqq' should be one token"),
        ({"answer": ANSWER, "wrong": ANSWER}, "wrong: ' self' is the answer"),
        ({"wrong": likeliest}, "is the likeliest next token; name an answer"),
        ({"blocks": [BLOCKS]}, rf"attention heads, 0\.\.{BLOCKS - 1}; got {BLOCKS}"),
    ):
        with pytest.raises(ConfigError, match=said):
            head_sweep(session(), tiny()[0], TEXT, **options)
    with pytest.raises(ConfigError, match="one batch of the context holds"):
        head_sweep(session(n_ctx=256), tiny()[0], TEXT * 60)
    monkeypatch.setattr(tiny()[0].graph, "heads", dict)
    with pytest.raises(ConfigError, match="no block with attention heads"):
        sweep(session())
    monkeypatch.setattr(tiny()[0], "add_bos", False)
    with pytest.raises(ConfigError, match="the prompt has no token"):
        next_token(session(), tiny()[0], "")


@pytest.mark.parametrize("n_seq_max", [1, 8])
def test_heads_patched_from_the_clean_run_are_hfs(n_seq_max):
    clean, corrupted = (prompt_tokens(tiny()[0], text) for text in (TEXT, "if self.line in self.text"))
    result = patch_sweep(
        session(n_seq_max=n_seq_max), tiny()[0], TEXT, "if self.line in self.text", ANSWER, WRONG, heads=True
    )

    def difference(logits_TV):
        return float(logits_TV[-1, token(ANSWER)]) - float(logits_TV[-1, token(WRONG)])

    clean_d, corrupted_d = (difference(hf_logits(tokens, {})) for tokens in (clean, corrupted))
    assert result.site == "attn.hook_z"
    assert result.grid_LP.shape == (BLOCKS, HEADS)
    for block in range(BLOCKS):
        source_TD = residual(session(), clean, f"blocks.{block}.attn.hook_z")
        for head in range(HEADS):

            def change(x_TD, source_TD=source_TD, part=slice(head * EACH, (head + 1) * EACH)):
                out = x_TD.copy()
                out[:, part] = source_TD[:, part]
                return out

            expected = (difference(hf_logits(corrupted, {(block, "z"): change})) - corrupted_d) / (
                clean_d - corrupted_d
            )
            assert result.grid_LP[block, head] == pytest.approx(expected, abs=1e-3)
    assert np.abs(result.grid_LP).max() > 0.05
    row, column = result.strongest()
    assert result.grid_LP[row, column] == result.grid_LP.max()


@pytest.fixture
def tiny_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ggscope"])
    monkeypatch.setenv("COLUMNS", "200")
    write_tiny_llama(tmp_path / "tiny.gguf")
    return tmp_path


def ggscope(name, *args):
    return main([name, "model.path=tiny.gguf", "model.n_threads=1", *args])


def test_the_command_prints_the_strongest_heads_and_draws_all(tiny_here, capsys):
    assert ggscope("heads", "--prompt", TEXT, "--answer", ANSWER, "--wrong", WRONG, "heads.top=3", "run_dir=made") == 0
    said = capsys.readouterr().out
    values = json.loads((tiny_here / "made" / "heads.json").read_text())
    assert len(values["heads"]) == BLOCKS * HEADS
    ranked = sorted(values["heads"], key=lambda one: -abs(one["effect"]))
    shown = [line for line in said.splitlines() if " L" in line and "│" in line]
    assert len(shown) == 3
    for line, one in zip(shown, ranked, strict=False):
        assert one["head"] in line
        assert f"{one['effect']:+.3f}" in line
        assert f"{one['kl_nats']:.3f}" in line
    assert f"logit difference '{ANSWER}' - '{WRONG}'" in said
    assert (values["answer"], values["answer_text"]) == (token(ANSWER), ANSWER)
    assert values["tokens"] == prompt_tokens(tiny()[0], TEXT).tolist()
    assert "".join(values["text"]).endswith(TEXT)
    assert all(
        tiny()[0].piece(one["likeliest"]).decode("utf-8", "replace") == one["likeliest_text"] for one in values["heads"]
    )
    assert imread(tiny_here / "made" / "heads.png").shape[0] > 200
    metrics = json.loads((tiny_here / "made" / "manifest.json").read_text())["metrics"]
    assert metrics["strongest"] == ranked[0]["head"]
    assert metrics["effect"] == ranked[0]["effect"]


def test_the_mean_comes_from_a_store_of_the_model(tiny_here, capsys):
    (tiny_here / "a.txt").write_text("def walk(tree):\n    return [node for node in tree]\n" * 40)
    corpus = ["corpus=text", "corpus.paths=[a.txt]", "corpus.split=all", "corpus.context_tokens=24"]
    extract = [*corpus, "extract.calibration_tokens=400", "store.shard_rows=512", "run_dir=captured"]
    assert ggscope("extract", "hook.points=[blocks.*.attn.hook_z]", *extract) == 0
    capsys.readouterr()
    (store,) = (tiny_here / "captured").glob("*.zarr")
    results = {}
    for name, more in (("zero", []), ("mean", [f"heads.mean={store}"])):
        assert ggscope("heads", "--prompt", TEXT, "heads.format=json", *more, f"run_dir={name}") == 0
        results[name] = json.loads(capsys.readouterr().out)
        assert results[name]["in_place"] == name
        inputs = json.loads((tiny_here / name / "manifest.json").read_text())["inputs"]
        assert ("mean" in inputs) == bool(more)
    effects = {name: np.array([one["effect"] for one in found["heads"]]) for name, found in results.items()}
    from pipeline.store.reader import ActivationStore

    opened = ActivationStore(store)
    means = {b: opened.stats(f"blocks.{b}.attn.hook_z").mean_D.astype(np.float32) for b in range(BLOCKS)}
    expected = head_sweep(session(n_seq_max=8, kv_type="f16"), tiny()[0], TEXT, means=means)
    np.testing.assert_allclose(effects["mean"], expected.effect_LH.ravel(), atol=5e-3)
    assert np.abs(effects["mean"] - effects["zero"]).max() > 0.01
    assert len(opened.commits) > 1
    (store / commit_key(0)).unlink()
    assert ggscope("heads", "--prompt", TEXT, "heads.blocks=[1]", f"heads.mean={store}", "run_dir=part") == 0
    rows = ActivationStore(store).stats("blocks.1.attn.hook_z").count
    assert 0 < rows < opened.stats("blocks.1.attn.hook_z").count
    shards = len(opened.commits)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"warning: a mean of {rows:,} rows: the capture of captured/{store.name} is not finished ({shards - 1} of {shards} shards)"
        in said
    )
    assert ggscope("extract", "hook.points=[blocks.0.attn.hook_z]", *extract[:-1], "run_dir=one") == 0
    (other,) = (tiny_here / "one").glob("*.zarr")
    capsys.readouterr()
    assert ggscope("heads", "--prompt", TEXT, f"heads.mean={other}") == 2
    said = capsys.readouterr().err
    assert "expected blocks.1.attn.hook_z" in said
    assert "ggscope extract" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "--prompt"),
        (["--prompt", TEXT, "heads.blocks=[9]"], "got 9"),
        (["--prompt", TEXT, "--wrong", "nosuchtoken"], "wrong: 'nosuchtoken' should be one token"),
        (["--prompt", TEXT, "heads.mean=nothing.zarr"], "heads.mean: no activation store at"),
        (["--prompt", TEXT, "model.n_ctx=4"], "raise model.n_ctx"),
    ],
)
def test_bad_input_is_one_line(tiny_here, args, said, capsys):
    assert ggscope("heads", *args) == 2
    assert said in capsys.readouterr().err


def test_patching_by_head_names_the_head(tiny_here, capsys):
    texts = ["--clean", TEXT, "--corrupted", "if self.line in self.text", "--answer", ANSWER, "--wrong", WRONG]
    assert ggscope("patch", *texts, "patch.heads=true", "run_dir=made") == 0
    said = capsys.readouterr().out
    values = json.loads((tiny_here / "made" / "patch.json").read_text())
    assert values["heads"] == list(range(HEADS))
    grid_LH = np.array(values["grid"])
    row, head = np.unravel_index(grid_LH.argmax(), grid_LH.shape)
    assert f"at L{values['blocks'][row]}H{head}" in said
    assert "head 3" in said
    assert ggscope("patch", *texts, "patch.heads=true", "patch.site=hook_mlp_out") == 2
    assert "patch.heads=true patches attn.hook_z, got patch.site=hook_mlp_out" in capsys.readouterr().err
    assert ggscope("patch", *texts[:-1], ANSWER) == 2
    assert f"answer and wrong are the same token, {ANSWER!r}" in capsys.readouterr().err


def test_a_prompt_longer_than_a_batch_is_decoded_beside_itself(tmp_path):
    context = RunContext(command="heads", folder=tmp_path, config=Config(), console=Console(file=io.StringIO()))
    model = tiny()[0]
    for count, beside in ((5, 16), (128, 16), (200, 10)):
        with session_for(context, model, count) as s:
            assert (s.n_seq_max, s.n_batch, s.n_ubatch) == (beside, beside * count, beside * count)
            assert s.n_ctx_seq >= count
    wide = dataclasses.replace(context, config=dataclasses.replace(Config(), model=ModelConfig(n_ctx=6000)))
    with session_for(wide, model, 2500) as s:
        assert (s.n_seq_max, s.n_batch, s.n_ubatch) == (2, 5000, 2048)
    with session_for(wide, model, 4000) as s:
        assert (s.n_seq_max, s.n_batch) == (1, 4000)


def test_what_changes_nothing_is_exactly_zero_in_a_batch_of_one_pass(tmp_path):
    context = RunContext(command="heads", folder=tmp_path, config=Config(), console=Console(file=io.StringIO()))
    model = tiny()[0]
    text = TEXT * 8
    with session_for(context, model, len(prompt_tokens(model, text))) as s:
        target = next_token(s, model, text)
        found = effects(s, target, list(range(30)), lambda batch: [])
    np.testing.assert_array_equal(found.effect_N, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_without_finite_logits_is_refused(value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf", "r+")
    (norm,) = [tensor for tensor in reader.tensors if tensor.name == "output_norm.weight"]
    norm.data[3] = value
    reader.data.flush()
    texts = ["--clean", TEXT, "--corrupted", "if self.line in self.text", "--answer", ANSWER, "--wrong", WRONG]
    for words in (["heads", "--prompt", TEXT], ["patch", *texts], ["patch", *texts, "patch.heads=true"]):
        assert ggscope(*words) == 2
        assert "not finite, so nothing can be measured" in capsys.readouterr().err
