"""Hook points of architectures built differently, against HF transformers: nothing is found by name."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Hook, capture
from sae.errors import HookError
from tests.llama import other_architectures
from tests.llama.other_architectures import BLOCKS, HEADS, VOCAB, D
from tests.llama.support import exact, points, relative

TOLERANCE = {"gpt2": 1e-3, "gptneox": 1e-3, "gemma2": 1e-3, "qwen3": 1e-5}  # llama.cpp's GELU is an F16 table
LENGTHS = (11, 4)
_folder = tempfile.TemporaryDirectory(prefix="architectures")


@functools.cache
def loaded(name: str):
    """The model in llama.cpp, HF's twin, two sequences."""
    path = Path(_folder.name) / f"{name}.gguf"
    twin = getattr(other_architectures, name)(path)
    rng = np.random.default_rng(5)
    return Model(path), twin, [rng.integers(2, VOCAB, n) for n in LENGTHS]


def modules(name: str, twin):
    """Per block: where HF has the residual's parts; `<` means the module's input."""
    if name == "gpt2":
        for layer in twin.transformer.h:
            yield layer, {"hook_attn_out": layer.attn, "hook_mlp_out": layer.mlp, "<hook_resid_mid": layer.ln_2,
                          "qkv": layer.attn.c_attn, "<attn.hook_z": layer.attn.c_proj,
                          "<mlp.hook_post": layer.mlp.c_proj}  # fmt: skip
    elif name == "gptneox":
        for layer in twin.gpt_neox.layers:
            yield layer, {"hook_attn_out": layer.attention, "hook_mlp_out": layer.mlp,
                          "qkv": layer.attention.query_key_value, "<attn.hook_z": layer.attention.dense,
                          "<mlp.hook_post": layer.mlp.dense_4h_to_h}  # fmt: skip
    else:
        post = name == "gemma2"  # normalised again before it is added
        for layer in twin.model.layers:
            a = layer.self_attn
            yield layer, {"hook_attn_out": layer.post_attention_layernorm if post else a,
                          "hook_mlp_out": layer.post_feedforward_layernorm if post else layer.mlp,
                          "<hook_resid_mid": layer.pre_feedforward_layernorm if post else layer.post_attention_layernorm,
                          "attn.hook_q": a.q_proj if post else a.q_norm, "attn.hook_k": a.k_proj if post else a.k_norm,
                          "attn.hook_v": a.v_proj, "<attn.hook_z": a.o_proj,
                          "<mlp.hook_post": layer.mlp.down_proj}  # fmt: skip


def hf_values(name: str, twin, tokens: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    got: dict[str, np.ndarray] = {}
    handles = []

    def keep(key, before=False):
        def hook(_m, i, o=None):
            x = i[0] if before else o[0] if isinstance(o, tuple) else o
            got[key] = x.detach().numpy().reshape(len(tokens), -1)

        return hook

    for b, (layer, parts) in enumerate(modules(name, twin)):
        parts = parts | {"<hook_resid_pre": layer, "hook_resid_post": layer}
        for key, module in parts.items():
            place = f"blocks.{b}.{key.removeprefix('<')}"
            before = key.startswith("<")
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handles.append(register(keep(place, before)))
    out = twin(torch.from_numpy(tokens[None]), output_attentions=True)
    for handle in handles:
        handle.remove()
    for b, pattern in enumerate(out.attentions):
        got[f"blocks.{b}.attn.hook_pattern"] = pattern[0].detach().numpy().transpose(1, 0, 2)
        if (fused := got.pop(f"blocks.{b}.qkv", None)) is not None:
            shape = (len(tokens), HEADS, 3, -1) if name == "gptneox" else (len(tokens), 3, HEADS, D // HEADS)
            parts_3 = np.moveaxis(fused.reshape(shape), 2 if name == "gptneox" else 1, 0)
            for letter, x in zip("qkv", parts_3, strict=True):
                got[f"blocks.{b}.attn.hook_{letter}"] = x.reshape(len(tokens), -1)
    got["logits"] = out.logits[0].detach().numpy()
    return got


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("kv_unified", [True, False])
def test_every_point_equals_transformers(name, kv_unified):
    model, twin, sequences = loaded(name)
    with exact(model, n_seq_max=2, n_ubatch=6, kv_unified=kv_unified) as session:
        found = capture(session, sequences, points(session))
    for mine, tokens in zip(found, sequences, strict=True):
        theirs = hf_values(name, twin, tokens)
        compared = set(mine) & set(theirs)
        assert set(theirs) <= set(mine)
        assert len(compared) >= BLOCKS * (9 if name == "gptneox" else 10)
        for point in compared:
            assert relative(mine[point], theirs[point]) < TOLERANCE[name], point


@pytest.mark.parametrize("name", TOLERANCE)
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
        expected = twin(torch.from_numpy(tokens[None])).logits[0].detach().numpy()
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


def test_a_point_an_architecture_lacks_is_absent_and_refused_by_name():
    for name, missing in {"gptneox": "blocks.0.hook_resid_mid", "gpt2": "blocks.0.attn.hook_rot_q"}.items():
        model = loaded(name)[0]
        assert missing not in model.hook_points()
        with exact(model) as session, pytest.raises(HookError, match=rf"no hook point '{missing}'; this {name} model"):
            capture(session, [np.array([5])], [HookPoint.parse(missing)])
