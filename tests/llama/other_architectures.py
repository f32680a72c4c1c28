"""Tiny GGUFs of architectures that differ where hook points are found: fused qkv, layer norm, parallel residual, ..."""

from __future__ import annotations

import json
import os
from typing import Any

import gguf
import numpy as np

from tests.tiny_llama import BOS, BOS_ID, CONTEXT, EOS, EOS_ID, tokenizer

BLOCKS, D, HEADS, FF, VOCAB = 2, 64, 4, 96, 512


def _start(path: str | os.PathLike[str], architecture: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(os.fspath(path), architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(D)
    writer.add_block_count(BLOCKS)
    writer.add_head_count(HEADS)
    writer.add_vocab_size(VOCAB)
    state = json.loads(tokenizer(VOCAB).to_str())["model"]
    by_id = sorted(state["vocab"], key=state["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(by_id)
    writer.add_token_types([gguf.TokenType.CONTROL if t in (BOS, EOS) else gguf.TokenType.NORMAL for t in by_id])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["merges"]])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    return writer


def _finish(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _state(model: Any) -> dict[str, np.ndarray]:
    """Re-draw every weight so that each part moves the output; return them by HF's names."""
    import torch

    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            x = rng.standard_normal(tuple(p.shape)).astype(np.float32)
            if p.dim() == 1:
                x = 0.1 * x + (1 if ("ln_" in name or "norm" in name) and name.endswith("weight") else 0)
            else:
                x *= 0.5 if "emb" in name or "wte" in name or "wpe" in name else 0.7 / 8
            p.copy_(torch.from_numpy(x))
    model.eval()
    return {k: v.detach().numpy() for k, v in model.state_dict().items()}


def gpt2(path: str | os.PathLike[str]) -> Any:
    """Layer norm, learnt positions, one product for q, k and v, biases, tied output; returns HF's model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=D, n_layer=BLOCKS, n_head=HEADS, n_inner=FF,
        attn_implementation="eager", bos_token_id=BOS_ID, eos_token_id=EOS_ID,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    w = _state(model)
    writer = _start(path, "gpt2")
    writer.add_feed_forward_length(FF)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    tensors = {
        "token_embd.weight": w["transformer.wte.weight"],
        "position_embd.weight": w["transformer.wpe.weight"],
        "output_norm.weight": w["transformer.ln_f.weight"],
        "output_norm.bias": w["transformer.ln_f.bias"],
        "output.weight": w["transformer.wte.weight"],
    }
    names = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm"}
    names |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    for i in range(BLOCKS):
        for hf, ours in names.items():
            weight = w[f"transformer.h.{i}.{hf}.weight"]
            tensors[f"blk.{i}.{ours}.weight"] = weight.T if weight.ndim == 2 else weight  # HF's Conv1D is transposed
            tensors[f"blk.{i}.{ours}.bias"] = w[f"transformer.h.{i}.{hf}.bias"]
    _finish(writer, tensors)
    return model


def gptneox(path: str | os.PathLike[str]) -> Any:
    """Attention and MLP side by side on the same residual: there is no resid_mid; returns HF's model."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCAB, max_position_embeddings=CONTEXT, hidden_size=D, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, intermediate_size=FF, use_parallel_residual=True, attn_implementation="eager",
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, rotary_pct=1.0, hidden_act="gelu_new",
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    w = _state(model)
    writer = _start(path, "gptneox")
    writer.add_feed_forward_length(FF)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_parallel_residual(True)
    tensors = {
        "token_embd.weight": w["gpt_neox.embed_in.weight"],
        "output_norm.weight": w["gpt_neox.final_layer_norm.weight"],
        "output_norm.bias": w["gpt_neox.final_layer_norm.bias"],
        "output.weight": w["lm_head.weight"],
    }
    names = {"input_layernorm": "attn_norm", "attention.dense": "attn_output", "post_attention_layernorm": "ffn_norm"}
    names |= {"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}
    for i in range(BLOCKS):
        p = f"gpt_neox.layers.{i}."
        for hf, ours in names.items():
            for kind in ("weight", "bias"):
                tensors[f"blk.{i}.{ours}.{kind}"] = w[f"{p}{hf}.{kind}"]
        for kind in ("weight", "bias"):  # HF: per head q, k, v; GGUF: all q, all k, all v
            fused = w[f"{p}attention.query_key_value.{kind}"]
            parts = fused.reshape(HEADS, 3, D // HEADS, *fused.shape[1:]).swapaxes(0, 1)
            tensors[f"blk.{i}.attn_qkv.{kind}"] = parts.reshape(fused.shape)
    _finish(writer, tensors)
    return model


def qwen3(path: str | os.PathLike[str]) -> Any:
    """A norm on each head of q and k before RoPE, and RoPE pairs half a head apart; returns HF's model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB, max_position_embeddings=CONTEXT, hidden_size=D, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=32, intermediate_size=FF, rms_norm_eps=1e-6,
        attn_implementation="eager", bos_token_id=BOS_ID, eos_token_id=EOS_ID, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    w = _state(model)
    writer = _start(path, "qwen3")
    writer.add_feed_forward_length(FF)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_freq_base(10000.0)
    tensors = {"token_embd.weight": w["model.embed_tokens.weight"], "output_norm.weight": w["model.norm.weight"]}
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {
        f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"
    }
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for i in range(BLOCKS):
        for hf, ours in names.items():
            tensors[f"blk.{i}.{ours}.weight"] = w[f"model.layers.{i}.{hf}.weight"]
    _finish(writer, tensors)
    return model


def gemma2(path: str | os.PathLike[str]) -> Any:
    """Norms after attention and MLP too, soft-capped scores and logits, scaled embeddings; returns HF's model."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCAB, max_position_embeddings=CONTEXT, hidden_size=D, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=16, intermediate_size=FF, rms_norm_eps=1e-6,
        attn_implementation="eager", bos_token_id=BOS_ID, eos_token_id=EOS_ID, sliding_window=4096,
        query_pre_attn_scalar=16, final_logit_softcapping=5.0, attn_logit_softcapping=2.0, hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    w = _state(model)
    writer = _start(path, "gemma2")
    writer.add_feed_forward_length(FF)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_attn_logit_softcapping(2.0)
    writer.add_final_logit_softcapping(5.0)
    writer.add_sliding_window(4096)
    tensors = {"token_embd.weight": w["model.embed_tokens.weight"], "output_norm.weight": w["model.norm.weight"] + 1}
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}
    names |= {"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for i in range(BLOCKS):
        for hf, ours in names.items():  # the converter adds gemma's +1 to norm weights
            tensors[f"blk.{i}.{ours}.weight"] = w[f"model.layers.{i}.{hf}.weight"] + ("norm" in hf)
    _finish(writer, tensors)
    return model
