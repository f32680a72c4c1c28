"""HF's model of an architecture and the GGUF of the same weights; what HF computes at every hook point."""

from __future__ import annotations

import functools
import json
import operator
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pipeline.llama.model import Model
from tests.llama.architectures import ARCHITECTURES, BLOCKS, COMMON, FF, HEADS, KV_HEADS, VOCAB, Architecture
from tests.tiny_llama import BOS, BOS_ID, CONTEXT, EOS, EOS_ID, tokenizer

LENGTHS = (11, 5)  # none of them a number of heads
_folder = tempfile.TemporaryDirectory(prefix="architectures")


@functools.cache
def loaded(name: str) -> tuple[Model, Any, list[np.ndarray]]:
    """The model in llama.cpp, HF's twin, two sequences."""
    twin = hf_twin(ARCHITECTURES[name])
    path = Path(_folder.name) / f"{name}.gguf"
    write_gguf(path, ARCHITECTURES[name], twin)
    rng = np.random.default_rng(5)
    return Model(path), twin, [rng.integers(2, VOCAB, n) for n in LENGTHS]


def hf_twin(architecture: Architecture) -> Any:
    """HF's model, every weight drawn so that each part moves the output, its attention recorded."""
    import torch
    import transformers
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    transformers.AttentionInterface.register("recording", _recording)
    AttentionMaskInterface.register("recording", eager_mask)
    config_class = getattr(transformers, architecture.hf + ("TextConfig" if architecture.hf == "Gemma3" else "Config"))
    config = config_class(**(COMMON | architecture.settings), attn_implementation="recording")
    kind = "LMHeadModel" if architecture.hf == "GPT2" else "ForCausalLM"
    model = getattr(transformers, architecture.hf + kind)(config)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            x = rng.standard_normal(tuple(p.shape)).astype(np.float32)
            if p.dim() == 1:
                x = 0.1 * x + (1 if ("ln_" in name or "norm" in name) and name.endswith("weight") else 0)
            else:
                x *= 0.5 if any(part in name for part in ("emb", "wte", "wpe")) else 0.7 / 8
            p.copy_(torch.from_numpy(x))
    return model.eval()


def write_gguf(path: Path, architecture: Architecture, twin: Any) -> None:
    """The twin's weights under the names gguf-py has for them."""
    writer = gguf.GGUFWriter(path, architecture.gguf)
    _add_sizes(writer, twin.config)
    architecture.keys(writer)
    _add_tokenizer(writer)
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.gguf)
    names = gguf.get_tensor_name_map(kind, BLOCKS)
    for hf_name, tensor in twin.state_dict().items():
        if hf_name == "lm_head.weight" and twin.config.tie_word_embeddings:
            continue
        for name, weight in architecture.weights(hf_name, tensor.numpy(), twin.config):
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert found is not None, name
            writer.add_tensor(found, np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // HEADS
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", FF))
    writer.add_head_count(HEADS)
    writer.add_vocab_size(VOCAB)
    if hasattr(config, "num_key_value_heads"):
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
    for key, add in {"rms_norm_eps": writer.add_layer_norm_rms_eps, "layer_norm_eps": writer.add_layer_norm_eps,
                     "layer_norm_epsilon": writer.add_layer_norm_eps, "norm_epsilon": writer.add_layer_norm_eps}.items():  # fmt: skip
        if hasattr(config, key):
            add(getattr(config, key))
    if rope := getattr(config, "rope_parameters", None):
        rope = rope.get("full_attention", rope)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1)))


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    state = json.loads(tokenizer(VOCAB).to_str())["model"]
    by_id = sorted(state["vocab"], key=state["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(by_id)
    writer.add_token_types([gguf.TokenType.CONTROL if t in (BOS, EOS) else gguf.TokenType.NORMAL for t in by_id])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["merges"]])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)


_attention: dict[str, np.ndarray] = {}  # what the last forward pass's attention saw


def _recording(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """HF's own attention of this architecture; keeps q and k after RoPE and the weights."""
    forward = sys.modules[type(module).__module__].eager_attention_forward
    out, pattern = forward(module, query, key, value, mask, **options)
    place = f"blocks.{module.layer_idx}.attn."
    for site, x in (("rot_q", query), ("rot_k", key)):
        _attention[f"{place}hook_{site}"] = x[0].transpose(0, 1).flatten(1).numpy()
    _attention[f"{place}hook_pattern"] = pattern[0].transpose(0, 1).numpy()
    return out, pattern


def hf_values(name: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every hook point of the architecture -> (T, width) float32; a pattern (T, heads, T)."""
    import torch

    architecture, twin = ARCHITECTURES[name], loaded(name)[1]
    got: dict[str, np.ndarray] = {}
    norms: dict[str, Any] = {}
    handles = []

    def keep(point: str, module: Any, *, before: bool) -> None:
        def hook(_module: Any, inputs: Any, output: Any = None) -> None:
            x = inputs[0] if before else output[0] if isinstance(output, tuple) else output
            if x.ndim == 4 and x.shape[1] in (HEADS, KV_HEADS):  # (1, heads, T, width of a head)
                x = x.transpose(1, 2)
            got[point] = x.reshape(len(tokens), -1).numpy()

        handles.append(module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook))

    for b, layer in enumerate(operator.attrgetter(architecture.layers)(twin)):
        for site, place in architecture.parts.items():
            if site in architecture.lacks:
                continue
            module = operator.attrgetter(place.lstrip("<~"))(layer)
            keep(f"blocks.{b}.{site}", module, before=place[0] in "<~")
            if place.startswith("~"):
                norms[f"blocks.{b}.{site}"] = module
        keep(f"blocks.{b}.hook_resid_pre", layer, before=True)
        keep(f"blocks.{b}.hook_resid_post", layer, before=False)
    keep("ln_final.hook_normalized", operator.attrgetter(architecture.final_norm)(twin), before=False)
    with torch.no_grad():
        got["logits"] = twin(torch.from_numpy(tokens[None])).logits[0].numpy()
    for handle in handles:
        handle.remove()
    for point, module in norms.items():
        got[point] = normalised(got[point], module)
    _split_fused(got, architecture, twin.config)
    _add_expert_weights(got)
    lacks = {f"blocks.{b}.{site}" for b in range(BLOCKS) for site in architecture.lacks}
    return {point: x for point, x in (_attention | got).items() if point not in lacks}


def normalised(x_ND: np.ndarray, module: Any) -> np.ndarray:
    """What a norm of HF's makes of its input before gain and bias, in float64."""
    x_ND, eps = x_ND.astype(np.float64), getattr(module, "variance_epsilon", None) or module.eps
    if "RMSNorm" not in type(module).__name__:
        x_ND = x_ND - x_ND.mean(axis=1, keepdims=True)
    return x_ND / np.sqrt((x_ND**2).mean(axis=1, keepdims=True) + eps)


def _split_fused(got: dict[str, np.ndarray], architecture: Architecture, config: Any) -> None:
    for point in [point for point in got if point.endswith(".qkv")]:
        fused = got.pop(point)
        head = config.hidden_size // HEADS
        if architecture.by_head:
            parts = [x.reshape(len(x), -1) for x in np.split(fused.reshape(len(fused), HEADS, -1), 3, axis=2)]
        else:
            kv = getattr(config, "num_key_value_heads", HEADS) * head
            parts = np.split(fused, [HEADS * head, HEADS * head + kv], axis=1)
        for letter, x in zip("qkv", parts, strict=True):
            got[point.replace("qkv", f"attn.hook_{letter}")] = x


def _add_expert_weights(got: dict[str, np.ndarray]) -> None:
    for point in [point for point in got if point.endswith("hook_router_scores")]:
        exp = np.exp(got[point].astype(np.float64))
        got[point.replace("router_scores", "expert_weights")] = exp / exp.sum(1, keepdims=True)
