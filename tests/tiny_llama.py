"""A llama model small enough to check everything on: random weights, a real byte-level BPE tokenizer, a GGUF file.

Two views of the same weights: the GGUF that llama.cpp loads, and HF's LlamaForCausalLM in float32 as the
independent oracle. Import this module before torch: llama.cpp has to be mapped first.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
NORM_EPS = 1e-5
ROPE_THETA = 10000.0
CONTEXT = 512
CHAT_MARKERS = ["<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def tokenizer(vocab: int = 512) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokeniser, trained on modules of the standard library."""
    names = ["argparse", "textwrap"] if vocab <= 1024 else ["argparse", "textwrap", "inspect", "tarfile", "typing"]
    texts = []
    for name in names:
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        texts.append(Path(found.origin).read_text(encoding="utf-8"))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.encode_special_tokens = True  # specials spelled out in a text stay text
    assert bpe.get_vocab_size() == vocab
    return bpe


def random_weights(
    *, seed: int, blocks: int, d: int, heads: int, kv_heads: int, ff: int, vocab: int, tied: bool
) -> dict[str, np.ndarray]:
    """float32 weights in HF names and row order: every part moves the output, none amplifies rounding."""
    rng = np.random.default_rng(seed)
    kv = d // heads * kv_heads

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(d)).astype(np.float32)

    w = {"model.embed_tokens.weight": (rng.standard_normal((vocab, d)) * 0.7).astype(np.float32)}
    for i in range(blocks):
        p = f"model.layers.{i}."
        w[p + "input_layernorm.weight"] = norm()
        w[p + "self_attn.q_proj.weight"] = matrix(d, d)
        w[p + "self_attn.k_proj.weight"] = matrix(kv, d)
        w[p + "self_attn.v_proj.weight"] = matrix(kv, d)
        w[p + "self_attn.o_proj.weight"] = matrix(d, d, 0.5)
        w[p + "post_attention_layernorm.weight"] = norm()
        w[p + "mlp.gate_proj.weight"] = matrix(ff, d)
        w[p + "mlp.up_proj.weight"] = matrix(ff, d)
        w[p + "mlp.down_proj.weight"] = matrix(d, ff, 0.5)
    w["model.norm.weight"] = norm()
    if not tied:
        w["lm_head.weight"] = matrix(vocab, d, 2.0)
    return w


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(hf_name: str) -> str:
    """The GGUF name of one of HF's llama weights."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    top["lm_head.weight"] = "output.weight"
    if hf_name in top:
        return top[hf_name]
    _, _, block, rest = hf_name.split(".", 3)
    return f"blk.{block}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def interleave_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """HF keeps a head's RoPE pairs half a head apart, GGUF beside each other."""
    rows = weight.shape[0]
    return np.ascontiguousarray(weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape))


def write_tiny_llama(
    path: str | os.PathLike[str],
    *,
    dtype: str = "F32",
    seed: int = 0,
    blocks: int = 4,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ff: int = 96,
    vocab: int = 512,
    tied: bool = False,
    chat_markers: bool = False,
) -> dict[str, np.ndarray]:
    """Write the GGUF (matrices in `dtype`: F32, F16, BF16, Q8_0 or Q4_0); return the weights it holds, float32, HF order.

    With `chat_markers` the last two tokens are those that the chat template spells.
    """
    weights = random_weights(
        seed=seed, blocks=blocks, d=d, heads=heads, kv_heads=kv_heads, ff=ff, vocab=vocab, tied=tied
    )
    kind = gguf.GGMLQuantizationType[dtype]
    writer = gguf.GGUFWriter(os.fspath(path), "llama")
    writer.add_name("tiny")
    writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}[dtype])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(d)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(d // heads)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_vocab_size(vocab)
    _add_tokenizer(writer, vocab, chat_markers)
    for name, weight in weights.items():
        if weight.ndim == 1:
            writer.add_tensor(gguf_name(name), weight)
            continue
        packed = gguf.quants.quantize(weight, kind)
        weights[name] = gguf.quants.dequantize(packed, kind).astype(np.float32).reshape(weight.shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = interleave_rows(weight, heads if "q_proj" in name else kv_heads)
            packed = gguf.quants.quantize(rows, kind)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def write_tiny_encoder(
    path: str | os.PathLike[str], llama: str | os.PathLike[str], weights: dict[str, np.ndarray]
) -> None:
    """The tiny llama's file again as a eurobert, which has no logits: its blocks compute the same, but for tokens ahead.

    Its graph ends with the normalised residual, so no hook point has a name on it.
    """
    source, writer = gguf.GGUFReader(os.fspath(llama)), gguf.GGUFWriter(os.fspath(path), "eurobert")
    for key in source.fields.values():
        if not key.name.startswith(("GGUF.", "general.architecture")):
            kind, *inner = key.types
            name = key.name.replace("llama.", "eurobert.")
            writer.add_key_value(name, key.contents(), kind, inner[-1] if inner else None)
    for name, weight in weights.items():
        if name != "lm_head.weight":
            writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, vocab: int, chat_markers: bool) -> None:
    state = json.loads(tokenizer(vocab).to_str())["model"]
    by_id = sorted(state["vocab"], key=state["vocab"].__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    if chat_markers:  # in place of the last two merges
        by_id[-2:], merges = CHAT_MARKERS, merges[:-2]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(by_id)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if t in (BOS, EOS, *CHAT_MARKERS) else normal for t in by_id])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def hf_model(weights: dict[str, np.ndarray], *, heads: int = 4) -> Any:
    """HF's LlamaForCausalLM in float32 with exactly these weights; the shape is read from them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    d = weights["model.norm.weight"].shape[0]
    head_dim = d // heads
    config = LlamaConfig(
        vocab_size=weights["model.embed_tokens.weight"].shape[0],
        hidden_size=d,
        intermediate_size=weights["model.layers.0.mlp.up_proj.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("q_proj.weight") for name in weights),
        num_attention_heads=heads,
        num_key_value_heads=weights["model.layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
        tie_word_embeddings="lm_head.weight" not in weights,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model
