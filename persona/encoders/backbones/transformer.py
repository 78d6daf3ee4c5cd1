"""A causal pre-norm transformer with rotary positions: states of older events never change when one is added."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class CausalTransformer(nn.Module):
    """Decoder-only stack over event vectors (SASRec, Kang & McAuley 2018, with RoPE and SwiGLU)."""

    norm_class: type[nn.Module] = nn.LayerNorm

    def __init__(self, width: int, heads: int, layers: int, dropout: float, inner: int = 0, positions: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, dropout, inner or 2 * width, self.norm_class) for _ in range(layers)
        )
        self.norm = self.norm_class(width)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: list[torch.Tensor] | None = None,
        times: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """States and cache of `x` `[B, N, d]`; the cache is `[2, B, heads, M + N, d / heads]` for each layer."""
        new_cache = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, None if cache is None else cache[i])
            new_cache.append(kept)
        x = self.norm(x)
        return (x if mask is None else x * mask[..., None]), new_cache

    @staticmethod
    def keep(cache: list[torch.Tensor], row: int, unused: int) -> list[torch.Tensor]:
        """The keys and values of one row of the batch."""
        return [layer[:, row : row + 1, :, : layer.shape[3] - unused].clone() for layer in cache]


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm."""

    def __init__(self, width: int, heads: int, dropout: float, inner: int, norm_class: type[nn.Module]):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm_class(width), norm_class(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, N, d]` -> the same, and this layer's keys and values `[2, B, heads, M + N, d / heads]`."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [3, B, h, N, d/h]
        past = 0 if cache is None else cache.shape[3]
        q, k = rotate(qkv[:2], past)
        kv = torch.stack([k, qkv[2]])
        if cache is not None:
            kv = torch.cat([cache, kv], dim=3)
        attended = attend(q, kv)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * up)), kv


def attend(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Causal attention of the newest N rows `[B, h, N, e]` to keys and values of all rows, `[2, B, h, M + N, e]`."""
    length, past = q.shape[2], kv.shape[3] - q.shape[2]
    if not past:
        return F.scaled_dot_product_attention(q, kv[0], kv[1], is_causal=True)
    allowed = torch.ones(length, past + length, dtype=torch.bool, device=q.device).tril(past)
    return F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=allowed)


def rotate(x: torch.Tensor, start: int) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021) of `[..., N, e]` at positions `start` to `start + N - 1`."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** -(torch.arange(half, device=x.device) / half)
    angle = torch.arange(start, start + x.shape[-2], device=x.device)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
