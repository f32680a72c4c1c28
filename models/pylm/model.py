"""pylm in PyTorch: RoPE, RMSNorm, SwiGLU, grouped-query attention, tied embeddings (Llama, HF row order)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    vocab: int = 4096
    d_model: int = 256
    blocks: int = 6
    heads: int = 4
    kv_heads: int = 2
    d_ff: int = 704
    context: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def d_head(self) -> int:
        return self.d_model // self.heads

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


def rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos, sin of every position, (T, d_head), in HF's half-split layout."""
    inv_freq = shape.rope_theta ** (-torch.arange(0, shape.d_head, 2).float() / shape.d_head)
    angle = torch.outer(torch.arange(shape.context).float(), inv_freq).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d, kv = shape.d_model, shape.kv_heads * shape.d_head
        self.attn_norm = nn.RMSNorm(d, eps=shape.norm_eps)
        self.q, self.k = nn.Linear(d, d, bias=False), nn.Linear(d, kv, bias=False)
        self.v, self.o = nn.Linear(d, kv, bias=False), nn.Linear(d, d, bias=False)
        self.ffn_norm = nn.RMSNorm(d, eps=shape.norm_eps)
        self.gate, self.up = nn.Linear(d, shape.d_ff, bias=False), nn.Linear(d, shape.d_ff, bias=False)
        self.down = nn.Linear(shape.d_ff, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (b, t, d) = self.shape, x.shape
        h = self.attn_norm(x)
        q = rotate(self.q(h).view(b, t, s.heads, s.d_head).transpose(1, 2), cos, sin)
        k = rotate(self.k(h).view(b, t, s.kv_heads, s.d_head).transpose(1, 2), cos, sin)
        v = self.v(h).view(b, t, s.kv_heads, s.d_head).transpose(1, 2)
        groups = s.heads // s.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        a = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, t, d))
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PyLM(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.d_model)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                out = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * shape.blocks) ** 0.5 if out else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, V) logits."""
        x = self.embed(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]  # type: ignore[index]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed.weight)
