"""One tiny model in F32 and its HF twin. llama.cpp is mapped before torch: keep the import order."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np

from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Hook, Session
from tests.tiny_llama import BOS_ID, hf_model, write_tiny_llama

BLOCKS, D, HEADS, KV_HEADS, VOCAB = 4, 64, 4, 2, 512
LENGTHS = (17, 5, 40, 1, 23)
_folder = tempfile.TemporaryDirectory(prefix="tiny")


@functools.cache
def tiny(dtype: str = "F32", tied: bool = False) -> tuple[Model, dict[str, np.ndarray]]:
    """The model in llama.cpp and the weights it holds."""
    path = Path(_folder.name) / f"{dtype}-{tied}.gguf"
    weights = write_tiny_llama(path, dtype=dtype, tied=tied)
    return Model(path), weights


def exact(model: Model | None = None, **options) -> Session:
    """A context in the most exact setting."""
    defaults = {"n_ctx": 512, "n_seq_max": 5, "n_threads": 1, "kv_type": "f32", "flash_attn": "off"}
    return Session(model or tiny()[0], **(defaults | options))


@functools.cache
def sequences() -> list[np.ndarray]:
    """Unequal random sequences; the second and the third start alike, so that tokens alone cannot tell them apart."""
    rng = np.random.default_rng(0)
    found = [np.r_[BOS_ID, rng.integers(2, VOCAB, n - 1)].astype(np.int32) for n in LENGTHS]
    found[2][:5] = found[1]
    return found


def flat(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, sequence ids and positions of one batch, sequence after sequence."""
    lengths = [len(p) for p in parts]
    return (
        np.concatenate(parts),
        np.repeat(np.arange(len(parts)), lengths),
        np.concatenate([np.arange(n) for n in lengths]),
    )


def points(session: Session) -> list[HookPoint]:
    return [HookPoint.parse(name) for name in session.hook_points()]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b|| in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def collect(point: str) -> tuple[Hook, dict[tuple[int, int], np.ndarray]]:
    """A reading hook and the rows it saw, by (sequence, position)."""
    rows: dict[tuple[int, int], np.ndarray] = {}

    def read(r):
        for s, p, x in zip(r.seq_N.tolist(), r.pos_N.tolist(), r.values_ND, strict=True):
            assert (s, p) not in rows
            rows[s, p] = x.copy()

    return Hook(HookPoint.parse(point), read=read), rows


def rotate_half(x: np.ndarray, head: int, theta: float = 10000.0) -> np.ndarray:
    """HF's RoPE of (T, heads * head) in float64."""
    positions = np.arange(len(x))[:, None, None]
    angle = positions * theta ** (-np.arange(0, head, 2) / head)
    angle = np.concatenate([angle, angle], -1)
    y = x.astype(np.float64).reshape(len(x), -1, head)
    turned = np.concatenate([-y[..., head // 2 :], y[..., : head // 2]], -1)
    return (y * np.cos(angle) + turned * np.sin(angle)).reshape(len(x), -1)


def hf_values(weights: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What HF transformers computes at every hook point, (T, width) float32."""
    import torch

    model = hf_model(weights, heads=HEADS)
    got: dict[str, np.ndarray] = {}
    epsilon: dict[str, float] = {}

    def output(name):
        return lambda _m, _i, o: got.__setitem__(name, (o[0] if isinstance(o, tuple) else o)[0].numpy())

    def inputs(name):
        return lambda _m, i: got.__setitem__(name, i[0][0].numpy())

    for i, layer in enumerate(model.model.layers):
        p, a = f"blocks.{i}.", layer.self_attn
        layer.register_forward_pre_hook(inputs(p + "hook_resid_pre"))
        layer.post_attention_layernorm.register_forward_pre_hook(inputs(p + "hook_resid_mid"))
        epsilon[p] = layer.input_layernorm.variance_epsilon
        layer.register_forward_hook(output(p + "hook_resid_post"))
        a.register_forward_hook(output(p + "hook_attn_out"))
        layer.mlp.register_forward_hook(output(p + "hook_mlp_out"))
        layer.mlp.down_proj.register_forward_pre_hook(inputs(p + "mlp.hook_post"))
        a.o_proj.register_forward_pre_hook(inputs(p + "attn.hook_z"))
        for letter in "qkv":
            getattr(a, f"{letter}_proj").register_forward_hook(output(f"{p}attn.hook_{letter}"))
    model.model.norm.register_forward_hook(output("ln_final.hook_normalized"))
    with torch.no_grad():
        out = model(torch.from_numpy(tokens[None].astype(np.int64)), output_attentions=True)
    got["logits"] = out.logits[0].numpy()
    for p, eps in epsilon.items():
        for name, before in (("ln1", "hook_resid_pre"), ("ln2", "hook_resid_mid")):
            x = got[p + before].astype(np.float64)
            got[f"{p}{name}.hook_normalized"] = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)
    for i, weights_HTT in enumerate(out.attentions):
        got[f"blocks.{i}.attn.hook_pattern"] = weights_HTT[0].numpy().transpose(1, 0, 2)
        for letter in "qk":
            got[f"blocks.{i}.attn.hook_rot_{letter}"] = rotate_half(got[f"blocks.{i}.attn.hook_{letter}"], D // HEADS)
    return got
