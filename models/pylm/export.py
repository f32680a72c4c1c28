"""Write the trained pylm as a GGUF F16 file: `python -m models.pylm.export [OUT]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch

from . import data
from .model import Shape
from .train import TOKENIZER, WORK

OUT = Path(__file__).parents[2] / "pipeline" / "data" / "pylm.gguf"

# our parameter name -> GGUF tensor name, `{}` is the block
TENSORS = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "ffn_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from half-split RoPE order (HF) to llama.cpp's interleaved order."""
    rows, columns = w.shape
    return w.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def add_metadata(writer: gguf.GGUFWriter, shape: Shape, info: dict) -> None:
    writer.add_name("pylm")
    writer.add_description("Language model of Python source text, trained on the standard library.")
    writer.add_license("MIT")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d_model)
    writer.add_block_count(shape.blocks)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.d_head)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_string("pylm.python", info["python"])
    writer.add_uint32("pylm.steps", info["steps"])


def add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    spec = json.loads(path.read_text())["model"]
    tokens = [token for token, _ in sorted(spec["vocab"].items(), key=lambda item: item[1])]
    merges = [" ".join(m) if isinstance(m, list) else m for m in spec["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    special = {data.BOS, data.EOS}
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(data.BOS_ID)
    writer.add_eos_token_id(data.EOS_ID)
    writer.add_add_bos_token(True)


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    info = json.loads((WORK / "training.json").read_text())
    shape = Shape(**info["shape"])
    state = torch.load(WORK / "checkpoint.pt", weights_only=True)["model"]
    weights = {name: tensor.float().numpy() for name, tensor in state.items()}
    writer = gguf.GGUFWriter(out, "llama")
    add_metadata(writer, shape, info)
    add_tokenizer(writer, TOKENIZER)
    writer.add_tensor("token_embd.weight", weights["embed.weight"].astype(np.float16))
    writer.add_tensor("output_norm.weight", weights["norm.weight"])
    for block in range(shape.blocks):
        for ours, theirs in TENSORS.items():
            w = weights[f"layers.{block}.{ours}.weight"]
            if ours in ("q", "k"):
                w = interleaved(w, shape.heads if ours == "q" else shape.kv_heads)
            writer.add_tensor(f"blk.{block}.{theirs}.weight", w if w.ndim == 1 else w.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
