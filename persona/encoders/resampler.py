"""The instruction-aware resampler: K learned queries that read the instruction and the user's event states.

A Q-Former (BLIP-2, Li et al. 2023) for users: in each layer the queries and the instruction's tokens attend to one
another, then to the event states. The queries' final states are the user tokens. What depends on the user alone
(`memory`) and on the instruction alone (`ask`) can be kept; `read` brings the two together.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

AGES = 16
"""Buckets for how many events ago something happened: 0 to 7 each alone, then four to the doubling."""


class Resampler(nn.Module):
    """From states `[B, N, d]` and an instruction `[B, T, text_dim]` to user tokens `[B, K, d]`."""

    def __init__(
        self, text_dim: int, width: int, heads: int, layers: int, tokens: int, dropout: float, match: bool = False
    ):
        """With `match` the queries also see how the newest state meets what the instruction names; see `read`."""
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, width) * 0.3)
        self.instruction = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.age = nn.Embedding(AGES, width)
        self.layers = nn.ModuleList(ResamplerLayer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.match = nn.Linear(width + 1, width) if match else None

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
        latents, seen = self.ask(instruction, instruction_mask, topic)
        newest = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
        return self.read(latents, seen, self.memory(states, mask), mask, newest * topic)

    def memory(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The users' side: keys and values `[layers, 2, B, heads, N, d / heads]`, the same for every instruction."""
        states = states + self.age(ages(mask))
        return torch.stack([layer.memory(states) for layer in self.layers])

    def ask(
        self, instruction: torch.Tensor, instruction_mask: torch.Tensor, topic: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The instructions' side: latents `[B, K + T, d]` and their mask `[B, K + T]`, the same for every user."""
        latents = self.instruction(instruction)
        latents = torch.cat([latents[:, :1] + topic[:, None], latents[:, 1:]], dim=1)
        latents = torch.cat([self.queries.expand(len(latents), -1, -1), latents], dim=1)
        seen = torch.cat([instruction_mask.new_ones(len(latents), len(self.queries)), instruction_mask], dim=1)
        return self.layers[0].mix(latents, seen), seen

    def read(
        self,
        latents: torch.Tensor,
        seen: torch.Tensor | None,
        memory: torch.Tensor,
        mask: torch.Tensor | None,
        match: torch.Tensor,
    ) -> torch.Tensor:
        """What `ask` made reads what `memory` made: user tokens `[B, K, d]`. A mask of None hides nothing.

        `match` `[B, d]` is the newest state times the topic, element by element. Where the instruction names an item,
        its sum is that item's next-item score, which attention, whose weights sum to 1, could hardly find out.
        """
        count = len(self.queries)
        if self.match is not None:
            score = match.sum(1, keepdim=True) / match.shape[1] ** 0.5
            met = self.match(torch.cat([match, score], dim=1))  # [B, d]
            latents = torch.cat([latents[:, :count] + met[:, None], latents[:, count:]], dim=1)
        for number, layer in enumerate(self.layers):
            if number:
                latents = layer.mix(latents, seen)
            if number == len(self.layers) - 1:
                latents = latents[:, :count]  # nobody looks at the instruction after this
            latents = layer.read(latents, memory[number], mask)
        return self.norm(latents)


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

    def memory(self, states: torch.Tensor) -> torch.Tensor:
        """Keys and values of states `[B, N, d]`: `[2, B, heads, N, d / heads]`."""
        return self.cross_attention.keys_values(self.state_norm(states))

    def mix(self, x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """The latents `[B, L, d]` look at one another, where `seen` `[B, L]`."""
        normed = self.norm1(x)
        return x + self.dropout(self.self_attention(normed, self.self_attention.keys_values(normed), seen))

    def read(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The latents `[B, L, d]` look at the states behind `memory`, where `mask` `[B, N]`."""
        x = x + self.dropout(self.cross_attention(self.norm2(x), memory, mask))
        return x + self.dropout(self.mlp(self.norm3(x)))


class Attention(nn.Module):
    """Multi-head attention with a key mask, whose keys and values can be kept."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def keys_values(self, x: torch.Tensor) -> torch.Tensor:
        """Keys and values of `x` `[B, N, d]`, `[2, B, heads, N, d / heads]`."""
        return self.key_value(x).view(len(x), x.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x: torch.Tensor, keys_values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`x` `[B, L, d]` looks at what `keys_values` was made of, where `mask` `[B, N]` is True."""
        batch, length, width = x.shape
        q = self.query(x).view(batch, length, self.heads, -1).transpose(1, 2)  # [B, heads, L, d / heads]
        k, v = keys_values
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
        return self.out(attended.transpose(1, 2).reshape(batch, length, width))

    def weights(self, x: torch.Tensor, keys_values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The weights `[B, heads, L, N]` with which `forward` sums the values; each row sums to 1."""
        q = self.query(x).view(len(x), x.shape[1], self.heads, -1).transpose(1, 2)
        logits = q @ keys_values[0].transpose(2, 3) / q.shape[-1] ** 0.5
        return (logits if mask is None else logits.masked_fill(~mask[:, None, None, :], -torch.inf)).softmax(-1)
