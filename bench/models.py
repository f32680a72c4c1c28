"""The models both sides run: a 100M random Llama of any GGUF type with its HF twin, and the HF twin of the demo model.

Weights are drawn tensor by tensor from their HF names, so that every file holds the same ones and no more than one
tensor is in memory. A truncated GGUF is the same file without its last blocks: what llama.cpp can do at best when
only the first blocks are wanted.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
MATRIX_STD = 0.02
_BLOCK_NAMES = {
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
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama; the default has 125M parameters, 76M of them in blocks."""

    d: int = 768
    blocks: int = 12
    heads: int = 12
    kv_heads: int = 4
    ff: int = 2048
    vocab: int = 32000
    context: int = 2048
    eps: float = 1e-5
    theta: float = 10000.0

    @property
    def name(self) -> str:
        return f"llama_d{self.d}_b{self.blocks}_h{self.heads}_{self.kv_heads}_ff{self.ff}_v{self.vocab}"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """HF's name without `.weight` to shape."""
        d, kv = self.d, self.d // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens": (self.vocab, d),
            "model.norm": (d,),
            "lm_head": (self.vocab, d),
        }
        block = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (d, d)}
        block |= {"self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d)}
        block |= {"mlp.gate_proj": (self.ff, d), "mlp.up_proj": (self.ff, d), "mlp.down_proj": (d, self.ff)}
        for i in range(self.blocks):
            found |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
        return found


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Ones for a norm, else Gaussian; the same values whoever asks."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    rng = np.random.default_rng(list(name.encode()))
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(MATRIX_STD)


def gguf_name(hf_name: str) -> str:
    if hf_name in _TOP_NAMES:
        return _TOP_NAMES[hf_name] + ".weight"
    _, _, block, rest = hf_name.split(".", 3)
    return f"blk.{block}.{_BLOCK_NAMES[rest]}.weight"


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """RoPE pairs from half a head apart (HF) to beside each other (GGUF)."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def half_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """RoPE pairs from beside each other (GGUF) to half a head apart (HF)."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, shape: Shape, kind: str) -> Path:
    """The random Llama with its matrices in `kind`."""
    with _partial(path) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        _add_settings(writer, shape, kind)
        _add_vocabulary(writer, shape.vocab)
        quantisation = gguf.GGMLQuantizationType[kind]
        for name, size in shape.tensors().items():
            values = weight(name, size)
            if len(size) == 1:
                writer.add_tensor(gguf_name(name), values)
                continue
            if name.endswith(("q_proj", "k_proj")):
                values = neighbours(values, shape.heads if name.endswith("q_proj") else shape.kv_heads)
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)
        _finish(writer)
    return path


def write_hf(folder: Path, shape: Shape) -> Path:
    """The same weights as an HF model folder, float32."""
    tensors = {f"{name}.weight": weight(name, size) for name, size in shape.tensors().items()}
    return _write_hf(folder, shape, tensors, tied=False)


def write_truncated(source: Path, path: Path, blocks: int, *, vocab: int = 0) -> Path:
    """The first `blocks` blocks of a GGUF. `vocab` > 0: only so many tokens and no tokenizer.

    With a small vocabulary the logits of every token cost nothing: a way to have llama.cpp compute all of the last
    block for every token, which it leaves out where no logits are asked for.
    """
    reader = gguf.GGUFReader(source)
    architecture = _value(reader, "general.architecture")
    changed: dict[str, Any] = {f"{architecture}.block_count": blocks}
    if vocab:
        tokens = _value(reader, "tokenizer.ggml.tokens")[:vocab]
        changed |= {f"{architecture}.vocab_size": vocab, "tokenizer.ggml.model": "no_vocab"}
        changed |= {"tokenizer.ggml.tokens": tokens}
    with _partial(path) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        _copy_settings(reader, writer, changed, drop="tokenizer." if vocab else "-")
        for tensor in reader.tensors:
            if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= blocks:
                continue
            data = (
                tensor.data[:vocab] if vocab and tensor.name in ("token_embd.weight", "output.weight") else tensor.data
            )
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
        _finish(writer)
    return path


def write_requantised(source: Path, path: Path, kind: str) -> Path:
    """The same model with its matrices in another type."""
    reader = gguf.GGUFReader(source)
    quantisation = gguf.GGMLQuantizationType[kind]
    with _partial(path) as partial:
        writer = gguf.GGUFWriter(partial, _value(reader, "general.architecture"))
        _copy_settings(reader, writer, {"general.file_type": FILE_TYPES[kind]})
        for tensor in reader.tensors:
            if len(tensor.shape) == 1:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
                continue
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)
        _finish(writer)
    return path


def _copy_settings(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, changed: dict[str, Any], drop: str = "-") -> None:
    for field in reader.fields.values():
        own = field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.alignment")
        if own or (field.name.startswith(drop) and field.name not in changed):
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, changed.get(field.name, field.contents()), field.types[0], inner)


def read_shape(path: Path) -> Shape:
    """The shape of a llama GGUF."""
    reader = gguf.GGUFReader(path)
    if _value(reader, "general.architecture") != "llama":
        raise ValueError(f"{path} is no llama")
    keys = {"d": "embedding_length", "blocks": "block_count", "heads": "attention.head_count"}
    keys |= {"kv_heads": "attention.head_count_kv", "ff": "feed_forward_length", "vocab": "vocab_size"}
    keys |= {"context": "context_length", "eps": "attention.layer_norm_rms_epsilon", "theta": "rope.freq_base"}
    return Shape(**{name: _value(reader, f"llama.{key}") for name, key in keys.items()})


def write_hf_twin(source: Path, folder: Path) -> Path:
    """The weights of a llama GGUF, as they are after dequantisation, as an HF model folder in float32."""
    shape = read_shape(source)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    tensors = {}
    for name, size in shape.tensors().items():
        if gguf_name(name) not in found:
            continue  # tied output
        tensor = found[gguf_name(name)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(size)
        if name.endswith(("q_proj", "k_proj")):
            values = half_apart(values, shape.heads if name.endswith("q_proj") else shape.kv_heads)
        tensors[f"{name}.weight"] = np.ascontiguousarray(values)
    return _write_hf(folder, shape, tensors, tied="lm_head.weight" not in tensors)


def _write_hf(folder: Path, shape: Shape, tensors: dict[str, np.ndarray], *, tied: bool) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.d,
        "intermediate_size": shape.ff,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with _partial(folder / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


class _partial:
    """A file under another name until it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            os.replace(self.partial, self.path)
        else:
            self.partial.unlink(missing_ok=True)


def _add_settings(writer: gguf.GGUFWriter, shape: Shape, kind: str) -> None:
    writer.add_name("random llama")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d)
    writer.add_block_count(shape.blocks)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.d // shape.heads)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocab)


def _add_vocabulary(writer: gguf.GGUFWriter, vocab: int) -> None:
    """A vocabulary nobody reads text with: the benchmarks draw token ids."""
    words = vocab - 259
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(f"\u2581t{i}" for i in range(words))]
    )
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(words)])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256 + [kinds.NORMAL] * words)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"no {key} in the GGUF file")
    return field.contents()
