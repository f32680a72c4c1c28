"""Architectures as HF builds them, tiny and random: what is special about each, in one table.

A row says which of HF's settings differ, what the GGUF writer does to the weights beyond giving them their GGUF name,
where in HF's modules each hook point lies, and which points the architecture lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np

from tests.tiny_llama import BOS_ID, CONTEXT, EOS_ID, interleave_rows

BLOCKS, D, HEADS, KV_HEADS, FF, VOCAB = 2, 64, 4, 2, 96, 512
EXPERTS, EXPERT_FF = 6, 48
WINDOW = 8  # of the sliding-window layers; shorter than the longest test sequence

COMMON = {
    "vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS,
    "intermediate_size": FF, "max_position_embeddings": CONTEXT, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID,
    "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
GROUPED = {"num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-6}

# Hook point -> HF's module in a block; `<` is that module's input, `~` a norm's output before its gain and bias. `qkv` is
# one product for all three.
LLAMA_PARTS = {
    "ln1.hook_normalized": "~input_layernorm",
    "ln2.hook_normalized": "~post_attention_layernorm",
    "hook_resid_mid": "<post_attention_layernorm",
    "hook_attn_out": "self_attn",
    "hook_mlp_out": "mlp",
    "mlp.hook_post": "<mlp.down_proj",
    "attn.hook_q": "self_attn.q_proj",
    "attn.hook_k": "self_attn.k_proj",
    "attn.hook_v": "self_attn.v_proj",
    "attn.hook_z": "<self_attn.o_proj",
}
QK_NORM = {"attn.hook_q": "self_attn.q_norm", "attn.hook_k": "self_attn.k_norm"}
POST_NORMS = {"hook_attn_out": "post_attention_layernorm", "hook_mlp_out": "post_feedforward_layernorm"}
GEMMA_PARTS = LLAMA_PARTS | POST_NORMS | {
    "hook_resid_mid": "<pre_feedforward_layernorm", "ln2.hook_normalized": "~pre_feedforward_layernorm",
}  # fmt: skip
GPT2_PARTS = {
    "ln1.hook_normalized": "~ln_1", "ln2.hook_normalized": "~ln_2",
    "hook_resid_mid": "<ln_2", "hook_attn_out": "attn", "hook_mlp_out": "mlp",
    "mlp.hook_post": "<mlp.c_proj", "qkv": "attn.c_attn", "attn.hook_z": "<attn.c_proj",
}  # fmt: skip
GPTNEOX_PARTS = {
    "ln1.hook_normalized": "~input_layernorm", "ln2.hook_normalized": "~post_attention_layernorm",
    "hook_resid_mid": "<post_attention_layernorm", "hook_attn_out": "attention", "hook_mlp_out": "mlp",
    "mlp.hook_post": "<mlp.dense_4h_to_h", "qkv": "attention.query_key_value", "attn.hook_z": "<attention.dense",
}  # fmt: skip

PHI2_PARTS = LLAMA_PARTS | {
    "attn.hook_z": "<self_attn.dense", "mlp.hook_post": "<mlp.fc2", "ln2.hook_normalized": "~input_layernorm",
}  # fmt: skip

Weights = Iterator[tuple[str, np.ndarray]]
NORM_SITES = ("ln1.hook_normalized", "ln2.hook_normalized")
ROUTER_SITES = ("mlp.hook_router_scores", "mlp.hook_expert_weights")
MOE_PARTS = {site: place for site, place in LLAMA_PARTS.items() if site != "mlp.hook_post"} | {
    ROUTER_SITES[0]: "mlp.gate"
}
MOE = {"num_experts_per_tok": 2}


def as_it_is(name: str, weight: np.ndarray, config: Any) -> Weights:
    yield name, weight


def interleaved(name: str, weight: np.ndarray, config: Any) -> Weights:
    """q and k rows with RoPE pairs beside each other."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        weight = interleave_rows(weight, HEADS if "q_proj" in name else KV_HEADS)
    yield name, weight


def conv1d(name: str, weight: np.ndarray, config: Any) -> Weights:
    """GPT-2's linear layers are stored transposed."""
    yield name, weight.T if weight.ndim == 2 and ".h." in name else weight


def split_by_part(name: str, weight: np.ndarray, config: Any) -> Weights:
    """HF: q, k and v of one head after the other; GGUF: all q, all k, all v."""
    if "query_key_value" in name:
        parts = weight.reshape(HEADS, 3, D // HEADS, *weight.shape[1:]).swapaxes(0, 1)
        weight = parts.reshape(weight.shape)
    yield name, weight


def norm_plus_one(name: str, weight: np.ndarray, config: Any) -> Weights:
    """Gemma multiplies by 1 + weight; the GGUF holds the sum."""
    yield name, weight + 1 if name.endswith("norm.weight") else weight


def stacked_experts(name: str, weight: np.ndarray, config: Any) -> Weights:
    """HF: gate and up in one (experts, 2 x width, D); GGUF: one tensor for each."""
    if name.endswith("experts.gate_up_proj"):
        for part, rows in zip(("gate_proj", "up_proj"), np.split(weight, 2, axis=1), strict=True):
            yield name.replace("gate_up_proj", part) + ".weight", rows
    else:
        yield name + (".weight" if name.endswith("experts.down_proj") else ""), weight


def interleaved_experts(name: str, weight: np.ndarray, config: Any) -> Weights:
    """Mixtral: a llama with experts."""
    for new_name, part in stacked_experts(name, weight, config):
        yield from interleaved(new_name, part, config)


def alternating_experts(name: str, weight: np.ndarray, config: Any) -> Weights:
    """gpt-oss: experts are stored transposed, columns of gate and up in turn, and have biases."""
    kind = ".bias" if name.endswith("_bias") else ".weight"
    stem = name.removesuffix("_bias")
    if "experts." in name and weight.ndim == 3:
        weight = weight.transpose(0, 2, 1)
    if stem.endswith("gate_up_proj"):
        yield stem.replace("gate_up_proj", "gate_proj") + kind, weight[:, 0::2]
        yield stem.replace("gate_up_proj", "up_proj") + kind, weight[:, 1::2]
    else:
        yield stem + kind if "experts." in name or name.endswith("sinks") else name, weight


def gemma2_keys(writer: gguf.GGUFWriter) -> None:
    writer.add_attn_logit_softcapping(2.0)
    writer.add_final_logit_softcapping(5.0)
    writer.add_sliding_window(WINDOW)


def gemma3_keys(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(WINDOW)
    writer.add_sliding_window_pattern([True, False])
    writer.add_rope_freq_base_swa(10_000.0)


def expert_keys(writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(EXPERT_FF)


def shared_expert_keys(writer: gguf.GGUFWriter) -> None:
    expert_keys(writer)
    writer.add_expert_shared_feed_forward_length(32)


def gpt_oss_keys(writer: gguf.GGUFWriter) -> None:
    expert_keys(writer)
    writer.add_sliding_window(WINDOW)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One row of the table. `lacks` are names after `blocks.N.`; routers are lacked by all without experts."""

    gguf: str  # general.architecture
    hf: str  # prefix of HF's config and model classes
    settings: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=lambda: LLAMA_PARTS)
    weights: Callable[[str, np.ndarray, Any], Weights] = as_it_is
    keys: Callable[[gguf.GGUFWriter], None] = lambda writer: None
    lacks: tuple[str, ...] = ROUTER_SITES
    tolerance: float = 1e-5
    by_head: bool = False  # HF's fused product has q, k, v of one head side by side
    final_norm: str = "model.norm"
    layers: str = "model.layers"


GPTNEOX = Architecture(
    gguf="gptneox", hf="GPTNeoX", parts=GPTNEOX_PARTS, weights=split_by_part, by_head=True, tolerance=1e-3,
    settings={"hidden_act": "gelu_new", "rotary_pct": 0.25, "use_parallel_residual": True},
    keys=lambda writer: writer.add_parallel_residual(True), lacks=("hook_resid_mid", *ROUTER_SITES),
    final_norm="gpt_neox.final_layer_norm", layers="gpt_neox.layers",
)  # fmt: skip
QWEN3 = GROUPED | {"head_dim": 32}

# Tolerance 1e-3: llama.cpp's GELU is a table of F16 values.
ARCHITECTURES: dict[str, Architecture] = {
    # heads that share keys
    "llama": Architecture(gguf="llama", hf="Llama", settings=GROUPED, weights=interleaved),
    # heads wider than D / heads
    "mistral": Architecture(
        gguf="llama", hf="Mistral", weights=interleaved,
        settings=GROUPED | {"head_dim": 32, "sliding_window": None},
    ),
    # biases of q, k, v
    "qwen2": Architecture(gguf="qwen2", hf="Qwen2", settings=GROUPED),
    # a norm on each head of q and k, tied output
    "qwen3": Architecture(
        gguf="qwen3", hf="Qwen3", settings=QWEN3 | {"tie_word_embeddings": True}, parts=LLAMA_PARTS | QK_NORM,
    ),
    # a router and experts
    "qwen3moe": Architecture(
        gguf="qwen3moe", hf="Qwen3Moe", weights=stacked_experts, keys=expert_keys, lacks=("mlp.hook_post",),
        parts=MOE_PARTS | QK_NORM,
        settings=QWEN3 | MOE | {"num_experts": EXPERTS, "moe_intermediate_size": EXPERT_FF, "norm_topk_prob": True},
    ),
    # ... beside an expert that sees every token
    "qwen2moe": Architecture(
        gguf="qwen2moe", hf="Qwen2Moe", weights=stacked_experts, keys=shared_expert_keys, lacks=("mlp.hook_post",),
        parts=MOE_PARTS,
        settings=GROUPED | MOE | {"num_experts": EXPERTS, "moe_intermediate_size": EXPERT_FF,
                                  "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    # ... in a llama
    "mixtral": Architecture(
        gguf="llama", hf="Mixtral", weights=interleaved_experts, keys=expert_keys, lacks=("mlp.hook_post",),
        parts=MOE_PARTS,
        settings=GROUPED | MOE | {"num_local_experts": EXPERTS, "intermediate_size": EXPERT_FF, "sliding_window": None},
    ),
    # ... a router with a bias, its softmax only over the experts chosen; attention sinks
    "gpt_oss": Architecture(
        gguf="gpt-oss", hf="GptOss", weights=alternating_experts, keys=gpt_oss_keys,
        lacks=("mlp.hook_post", "mlp.hook_expert_weights"), parts=MOE_PARTS | {ROUTER_SITES[0]: "mlp.router"},
        settings=GROUPED | MOE | {
            "num_local_experts": EXPERTS, "intermediate_size": EXPERT_FF, "head_dim": 16, "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    # norms after attention and MLP too, capped scores and logits, scaled embeddings, every second block a window
    "gemma2": Architecture(
        gguf="gemma2", hf="Gemma2", weights=norm_plus_one, parts=GEMMA_PARTS, keys=gemma2_keys, tolerance=1e-3,
        settings=GROUPED | {"head_dim": 32, "query_pre_attn_scalar": 32, "final_logit_softcapping": 5.0,
                            "attn_logit_softcapping": 2.0, "sliding_window": WINDOW, "tie_word_embeddings": True},
    ),
    # ... and norms on q and k, and another RoPE frequency in the blocks with a window
    "gemma3": Architecture(
        gguf="gemma3", hf="Gemma3", weights=norm_plus_one, parts=GEMMA_PARTS | QK_NORM, keys=gemma3_keys,
        tolerance=1e-3,
        settings=GROUPED | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW,
                            "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
    ),
    # one product for q, k, v, one for gate and up
    "phi3": Architecture(
        gguf="phi3", hf="Phi3", settings=GROUPED,
        parts={k: v for k, v in LLAMA_PARTS.items() if k[:-1] != "attn.hook_" or k[-1] == "z"}
        | {"qkv": "self_attn.qkv_proj"},
    ),
    # layer norm, learnt positions, one product for q, k, v
    "gpt2": Architecture(
        gguf="gpt2", hf="GPT2", parts=GPT2_PARTS, weights=conv1d, tolerance=1e-3,
        settings={"n_inner": FF, "tie_word_embeddings": True},
        lacks=("attn.hook_rot_q", "attn.hook_rot_k", *ROUTER_SITES),
        final_norm="transformer.ln_f", layers="transformer.h",
    ),
    # attention and MLP side by side on one residual; a quarter of each head turns
    "gptneox": GPTNEOX,
    # ... and one after the other
    "gptneox_sequential": Architecture(
        gguf="gptneox", hf="GPTNeoX", parts=GPTNEOX_PARTS, weights=split_by_part, by_head=True, tolerance=1e-3,
        settings=GPTNEOX.settings | {"use_parallel_residual": False},
        keys=lambda writer: writer.add_parallel_residual(False),
        final_norm=GPTNEOX.final_norm, layers=GPTNEOX.layers,
    ),
    # attention and MLP added to each other before the residual; biases everywhere
    "phi2": Architecture(
        gguf="phi2", hf="Phi", settings={"hidden_act": "gelu_new"}, tolerance=1e-3, parts=PHI2_PARTS,
        lacks=("hook_resid_mid", *ROUTER_SITES), final_norm="model.final_layernorm",
    ),
    # norms only after attention and MLP, and over all heads of q and k at once
    "olmo2": Architecture(
        gguf="olmo2", hf="Olmo2", settings=GROUPED,
        parts=LLAMA_PARTS | QK_NORM | POST_NORMS | {"hook_resid_mid": "<mlp"}, lacks=(*NORM_SITES, *ROUTER_SITES),
    ),
}  # fmt: skip
