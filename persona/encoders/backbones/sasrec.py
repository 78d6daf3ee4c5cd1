"""SASRec (Kang & McAuley 2018): causal self-attention with learned positions and a pointwise ReLU network.

Unlike the paper, each layer is pre-norm for its residual too, which trains more stably.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from persona.encoders.backbones.transformer import CausalTransformer, attend


class SASRec(nn.Module):
    """Self-attention over event vectors; rows beyond the table of positions share its last one."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float, inner: int = 0, positions: int = 512):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(positions, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, inner or 4 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_normal_(self.positions)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: list[torch.Tensor] | None = None,
        times: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """States and cache of `x` `[B, N, d]`; the cache is `[2, B, heads, M + N, d / heads]` for each layer."""
        past = 0 if cache is None else cache[0].shape[3]
        places = torch.arange(past, past + x.shape[1], device=x.device).clamp(max=len(self.positions) - 1)
        x = self.dropout(x + self.positions[places])
        new_cache = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, None if cache is None else cache[i])
            new_cache.append(kept)
        x = self.norm(x)
        return (x if mask is None else x * mask[..., None]), new_cache

    keep = staticmethod(CausalTransformer.keep)


class Block(nn.Module):
    """Attention and the pointwise network, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, dropout: float, inner: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, N, d]` -> the same, and this layer's keys and values `[2, B, heads, M + N, d / heads]`."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [3, B, h, N, d/h]
        kv = qkv[1:] if cache is None else torch.cat([cache, qkv[1:]], dim=3)
        attended = attend(qkv[0], kv)  # [B, h, N, d/h]
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.down(self.dropout(F.relu(self.up(self.norm2(x)))))), kv
