"""One tiny F32 model, its HF twin with rows changed at will, and random SAEs that fire on it.

llama.cpp first, torch after it: tests.tiny_llama imports torch only inside `hf_model`.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np

from pipeline.interventions.base import Sequences, edit_hooks, edits_key
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import Hook, Session
from sae.weights import SAEWeights
from tests.tiny_llama import BOS_ID, hf_model, write_tiny_llama

D, BLOCKS = 64, 4
TEXT = "def add(self, first, second):\n    return first + second\n"


@functools.cache
def tiny() -> tuple[Model, dict[str, np.ndarray]]:
    """The model and its weights, made once."""
    folder = tempfile.TemporaryDirectory(prefix="tiny")
    path = Path(folder.name) / "tiny.gguf"
    weights = write_tiny_llama(path)
    model = Model(path)
    model.test_folder = folder  # type: ignore[attr-defined] - lives as long as the model
    return model, weights


@functools.cache
def twin():
    return hf_model(tiny()[1])


def session(**options) -> Session:
    """A context that computes in float32 throughout: identities need it."""
    defaults = {"n_ctx": 256, "n_batch": 256, "n_threads": 1, "kv_type": "f32", "flash_attn": "off"}
    return Session(tiny()[0], **(defaults | options))


def prompt(text: str = TEXT) -> np.ndarray:
    return np.concatenate([[BOS_ID], tiny()[0].tokenize(text.encode())]).astype(np.int32)


def run(s: Session, tokens, interventions=(), *, hooks=(), prompt_tokens=None, logits="all", flags=None):
    """One whole sequence in one decode: logits, with hooks that see the values after the edits."""
    sequences = Sequences()
    sequences.start(0, flags if flags is not None else tokens == BOS_ID)
    if prompt_tokens is not None:
        sequences.prompt_tokens[0] = prompt_tokens
    s.clear()
    return s.decode(
        tokens,
        np.zeros(len(tokens), np.int32),
        np.arange(len(tokens), dtype=np.int32),
        hooks=[*edit_hooks(interventions, sequences), *hooks],
        logits=logits,
        edits_key=edits_key(interventions, sequences),
    )


def residual(s: Session, tokens, hook: str, interventions=(), **options) -> np.ndarray:
    """Rows of a hook point after the edits, in order of position."""
    out = np.full((len(tokens), D), np.nan, np.float32)

    def read(rows):
        out[rows.pos_N] = rows.values_ND

    run(s, tokens, interventions, hooks=[Hook(HookPoint.parse(hook), read=read)], **options)
    assert not np.isnan(out).any()
    return out


def hf_logits(tokens, edits) -> np.ndarray:
    """HF's logits with `edits[block](x_TD float64) -> x_TD` applied to the residual after each block, or to what a part
    of it puts out: key `(block, "mlp")`; `(block, "z")`: to what the attention's output projection reads."""
    import torch

    handles = []
    for block, edit in edits.items():

        def change(_module, _inputs, output, edit=edit):
            x_TD = output[0] if isinstance(output, tuple) else output
            changed = torch.from_numpy(edit(x_TD[0].double().numpy())).to(x_TD.dtype)[None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        def change_input(_module, inputs, edit=edit):
            return (torch.from_numpy(edit(inputs[0][0].double().numpy())).to(inputs[0].dtype)[None], *inputs[1:])

        layer = twin().model.layers[block if isinstance(block, int) else block[0]]
        if not isinstance(block, int) and block[1] == "z":
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(change_input))
            continue
        module = layer if isinstance(block, int) else getattr(layer, block[1])
        handles.append(module.register_forward_hook(change))
    try:
        with torch.no_grad():
            return twin()(torch.tensor(np.asarray(tokens)[None].astype(np.int64))).logits[0].numpy()
    finally:
        for handle in handles:
            handle.remove()


def sae_at(block: int, *, num_latents=128, k=6, seed=0) -> SAEWeights:
    """A random SAE centred on the residual it reads, so that its latents really fire."""
    rng = np.random.default_rng(seed)
    x_TD = residual(session(), prompt(), f"blocks.{block}.hook_resid_post")[1:]
    W_dec_FD = rng.standard_normal((num_latents, D)).astype(np.float32)
    W_dec_FD /= np.linalg.norm(W_dec_FD, axis=1, keepdims=True)
    mean_D = x_TD.mean(axis=0)
    return SAEWeights(
        W_enc_FD=W_dec_FD * rng.uniform(0.4, 0.8, (num_latents, 1)).astype(np.float32),
        b_enc_F=(0.1 * rng.standard_normal(num_latents)).astype(np.float32),
        W_dec_FD=W_dec_FD,
        b_dec_D=mean_D,
        mean_D=mean_D,
        variance=float(((x_TD - mean_D) ** 2).sum(axis=1).mean()),
        k=k,
        hook=f"blocks.{block}.hook_resid_post",
    )


def dense_acts(w: SAEWeights, x_ND) -> np.ndarray:
    """a_NF in float64, all latents: ReLU, then all but the k largest of a row set to zero."""
    pre_NF = (np.asarray(x_ND, np.float64) - w.b_dec_D) @ w.W_enc_FD.astype(np.float64).T + w.b_enc_F
    a_NF = np.maximum(pre_NF, 0)
    a_NF[a_NF < np.sort(a_NF, axis=1)[:, [-w.k]]] = 0
    return a_NF


def relative(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


def logprobs(logits_V) -> np.ndarray:
    """log softmax in nats, float64."""
    shifted_V = np.asarray(logits_V, np.float64) - np.max(logits_V)
    return shifted_V - np.log(np.exp(shifted_V).sum())


def token(text: str) -> int:
    """The one token of a text."""
    (found,) = tiny()[0].tokenize(text.encode())
    return int(found)
