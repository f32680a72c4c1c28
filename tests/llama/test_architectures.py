"""Hook points of many architectures, each against HF transformers: nothing is found by name."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.llama.hooks import BLOCK_SITES, MODEL_SITES, HookPoint
from pipeline.llama.session import Hook, capture
from sae.errors import HookError
from tests.llama.architectures import ARCHITECTURES, BLOCKS, HEADS, WINDOW, D
from tests.llama.hf_twins import hf_values, loaded
from tests.llama.support import exact, points, relative


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kv_unified", [True, False])
def test_every_point_equals_transformers(name, kv_unified):
    model, _, sequences = loaded(name)
    with exact(model, n_seq_max=2, n_ubatch=6, kv_unified=kv_unified) as session:
        found = capture(session, sequences, points(session))
    for mine, tokens in zip(found, sequences, strict=True):
        theirs = hf_values(name, tokens)
        assert set(mine) == set(theirs)
        for point in mine:
            assert relative(mine[point], theirs[point]) < ARCHITECTURES[name].tolerance, point


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_an_architecture_lacks_is_absent_and_refused_by_name(name):
    architecture, model = ARCHITECTURES[name], loaded(name)[0]
    sites = [site for site in BLOCK_SITES.values() if site not in architecture.lacks]
    expected = {f"blocks.{b}.{site}" for b in range(BLOCKS) for site in sites} | set(MODEL_SITES.values())
    assert set(model.hook_points()) == expected
    with exact(model) as session:
        for site in architecture.lacks:
            missing = f"blocks.0.{site}"
            with pytest.raises(HookError, match=rf"no hook point '{missing}'; this {architecture.gguf} model"):
                capture(session, [np.array([5])], [HookPoint.parse(missing)])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_are_counted_in_the_graph(name):
    assert loaded(name)[0].graph.heads() == dict.fromkeys(range(BLOCKS), HEADS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_early_stop_after_the_deepest_of_several_points_changes_no_row(name):
    model, _, sequences = loaded(name)
    chosen = [HookPoint.parse(f"blocks.{b}.{site}") for b, site in
              ((0, "attn.hook_v"), (0, "hook_resid_post"), (1, "hook_resid_pre"), (1, "attn.hook_z"))]  # fmt: skip
    with exact(model, n_seq_max=2, n_ubatch=6) as session:
        deepest = max(session.graph.find(point).index for point in chosen)
        assert deepest < len(session.graph.nodes) - 1
        full, stopped = (capture(session, sequences, chosen, stop_early=stop) for stop in (False, True))
    for a, b in zip(full, stopped, strict=True):
        assert a.keys() == b.keys() == {str(point) for point in chosen}
        assert all(np.array_equal(a[point], b[point]) for point in a)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flash_attention_is_on_by_default_and_only_the_pattern_needs_it_off(name):
    model, _, sequences = loaded(name)
    without = set(model.hook_points())
    with exact(model, flash_attn="auto") as session:
        assert any(node.op == "FLASH_ATTN_EXT" for node in session.graph.nodes)
        assert without - set(session.hook_points()) == {f"blocks.{b}.attn.hook_pattern" for b in range(BLOCKS)}
        found = capture(session, sequences[:1], points(session))[0]
        with pytest.raises(HookError, match="set flash_attn=off"):
            session.graph.find(HookPoint("pattern", 0))
    theirs = hf_values(name, sequences[0])
    for point, values in found.items():
        assert relative(values, theirs[point]) < 2e-3, point


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generated_tokens_give_the_rows_of_a_prompt_of_the_same_tokens(name):
    model, _, (tokens, _) = loaded(name)
    chosen = [HookPoint("resid_post", 0), HookPoint("z", 1)]
    rows: dict[tuple[HookPoint, int], np.ndarray] = {}

    def keep(point):
        return Hook(point, read=lambda r: rows.update({(point, int(p)): x.copy() for p, x in zip(r.pos_N, r.values_ND, strict=True)}))  # fmt: skip

    with exact(model) as session:
        (whole,) = capture(session, [tokens], chosen)
        for pos, token in enumerate(tokens):
            session.decode([token], [0], [pos], hooks=[keep(point) for point in chosen], logits="last")
    for point in chosen:
        stepwise = np.stack([rows[point, pos] for pos in range(len(tokens))])
        assert relative(stepwise, whole[str(point)]) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_unembedding_equals_the_models_own_last_steps(name):
    model, _, sequences = loaded(name)
    last = f"blocks.{BLOCKS - 1}.hook_resid_post"
    with exact(model) as session:
        (values,) = capture(session, sequences[:1], [HookPoint.parse(last), HookPoint.parse("logits")])
    assert relative(model.unembed().logits(values[last]), values["logits"]) < 1e-5


def test_an_edit_of_a_part_of_a_fused_product_equals_transformers():
    import torch

    model, twin, (tokens, _) = loaded("gpt2")
    delta = np.random.default_rng(2).standard_normal(D).astype(np.float32)
    for at, letter in enumerate("qkv"):
        shift = torch.zeros(3 * D)
        shift[at * D : (at + 1) * D] = torch.from_numpy(delta)
        handle = twin.transformer.h[0].attn.c_attn.register_forward_hook(lambda _m, _i, o, shift=shift: o + shift)
        with torch.no_grad():
            expected = twin(torch.from_numpy(tokens[None])).logits[0].numpy()
        handle.remove()
        hook = Hook(
            HookPoint.parse(f"blocks.0.attn.hook_{letter}"), edit=lambda rows: np.tile(delta, (len(rows.seq_N), 1))
        )
        with exact(model) as session:
            batch = (tokens, np.zeros(len(tokens), int), np.arange(len(tokens)))
            mine = session.decode(*batch, hooks=[hook], logits="all")
            session.clear()
            plain = session.decode(*batch, logits="all")
        assert relative(mine, expected) < 1e-3
        if letter != "k":  # the same shift of every key changes no attention weight
            assert relative(plain, expected) > 1e-2


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss"])
def test_a_sliding_window_hides_old_positions_in_its_blocks_only(name):
    model, _, (tokens, _) = loaded(name)
    with exact(model) as session:
        (found,) = capture(session, [tokens], [HookPoint("pattern", 0), HookPoint("pattern", 1)])
    last = len(tokens) - 1
    assert last >= WINDOW
    seen = [(found[f"blocks.{b}.attn.hook_pattern"][last] > 0).all(axis=0) for b in range(BLOCKS)]
    assert seen[0].tolist() == [last - pos < WINDOW for pos in range(len(tokens))]
    assert seen[1].all()


def test_a_partial_rotation_leaves_the_rest_of_each_head_as_it_was():
    model, _, (tokens, _) = loaded("gptneox")
    with exact(model) as session:
        (found,) = capture(session, [tokens], [HookPoint("q", 0), HookPoint("rot_q", 0)])
    before, after = (found[f"blocks.0.attn.hook_{site}"].reshape(len(tokens), HEADS, -1) for site in ("q", "rot_q"))
    turned = before.shape[2] // 4
    assert np.array_equal(before[..., turned:], after[..., turned:])
    assert relative(after[1:, :, :turned], before[1:, :, :turned]) > 0.1
