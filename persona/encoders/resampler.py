"""The instruction-aware resampler: K learned queries that read the instruction and the user's event states.

A Q-Former (BLIP-2, Li et al. 2023) for users: in each layer the queries and the instruction's tokens attend to one
another, then to the event states. The queries' final states are the user tokens.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

AGES = 16
"""Buckets for how many events ago something happened: 0 to 7 each alone, then four to the doubling."""


class Resampler(nn.Module):
    """From states `[B, N, d]` and an instruction `[B, T, text_dim]` to user tokens `[B, K, d]`."""

    def __init__(self, text_dim: int, width: int, heads: int, layers: int, tokens: int, dropout: float):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, width) * 0.3)
        self.instruction = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.age = nn.Embedding(AGES, width)
        self.layers = nn.ModuleList(ResamplerLayer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        states: torch.Tensor,
        mask: torch.Tensor,
        instruction: torch.Tensor,
        instruction_mask: torch.Tensor,
        topic: torch.Tensor,
    ) -> torch.Tensor:
        """`mask` `[B, N]` and `instruction_mask` `[B, T]` are True at real positions; every row needs one state.

        `topic` `[B, d]` is the instruction as the event encoder would see it as a text: in the space of the events,
        so that an item that the instruction names is found in the history.
        """
        states = states + self.age(ages(mask))
        latents = self.instruction(instruction)
        latents = torch.cat([latents[:, :1] + topic[:, None], latents[:, 1:]], dim=1)
        count = len(self.queries)
        latents = torch.cat([self.queries.expand(len(states), -1, -1), latents], dim=1)  # [B, K + T, d]
        seen = torch.cat([instruction_mask.new_ones(len(states), count), instruction_mask], dim=1)
        for layer in self.layers:
            latents = layer(latents, seen, states, mask)
        return self.norm(latents[:, :count])


def ages(mask: torch.Tensor) -> torch.Tensor:
    """Bucket `[B, N]` of how many real positions come after each one."""
    after = (mask.sum(1, keepdim=True) - mask.cumsum(1)).clamp(min=0)
    coarse = 8 + (2 * torch.log2(after.clamp(min=8) / 8)).long()
    return torch.where(after < 8, after, coarse.clamp(max=AGES - 1))


class ResamplerLayer(nn.Module):
    """Self-attention among the latents, cross-attention to the states, and an MLP, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.state_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, seen: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`x` `[B, L, d]`, `seen` `[B, L]`, `states` `[B, N, d]`, `mask` `[B, N]` -> `[B, L, d]`."""
        normed = self.norm1(x)
        x = x + self.dropout(self.self_attention(normed, normed, seen))
        x = x + self.dropout(self.cross_attention(self.norm2(x), self.state_norm(states), mask))
        return x + self.dropout(self.mlp(self.norm3(x)))


class Attention(nn.Module):
    """Multi-head attention with a key mask."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`x` `[B, L, d]` looks at `memory` `[B, N, d]` where `mask` `[B, N]` is True."""
        batch, length, width = x.shape
        q = self.query(x).view(batch, length, self.heads, -1).transpose(1, 2)  # [B, h, L, d/h]
        k, v = self.key_value(memory).view(batch, memory.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.out(attended.transpose(1, 2).reshape(batch, length, width))
