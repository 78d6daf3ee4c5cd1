"""GRU4Rec (Hidasi et al. 2016): a stack of gated recurrent units. What it keeps of a user has one size for ever."""

from __future__ import annotations

import torch
from torch import nn


class GRU4Rec(nn.Module):
    """GRU layers of `inner` units (1.5 times the width unless given) over event vectors."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float, inner: int = 0, positions: int = 0):
        super().__init__()
        inner = inner or 3 * width // 2
        self.layers = nn.ModuleList(nn.GRU(inner if i else width, inner, batch_first=True) for i in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Identity() if inner == width else nn.Linear(inner, width)
        for layer in self.layers:
            for name, parameter in layer.named_parameters():
                if name.startswith("bias"):
                    nn.init.zeros_(parameter)
                    continue
                for gate in parameter.data.chunk(3):
                    nn.init.xavier_uniform_(gate)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: list[torch.Tensor] | None = None,
        times: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """States and cache of `x` `[B, N, d]`; the cache is `[1, B, inner]` for each layer, after the last real row."""
        new_cache = []
        for i, layer in enumerate(self.layers):
            before = x.new_zeros(1, len(x), layer.hidden_size) if cache is None else cache[i].to(x.dtype)
            x, after = layer(self.dropout(x), before)  # [B, N, inner], [1, B, inner]
            if mask is not None:
                steps = torch.cat([before[0, :, None].to(x.dtype), x], dim=1)  # [B, 1 + N, inner]
                after = steps[torch.arange(len(x), device=x.device), mask.sum(1)][None]
            new_cache.append(after)
        x = self.out(x)
        return (x if mask is None else x * mask[..., None]), new_cache

    @staticmethod
    def keep(cache: list[torch.Tensor], row: int, unused: int) -> list[torch.Tensor]:
        """The hidden states of one row of the batch; padding did not change them."""
        return [layer[:, row : row + 1].clone() for layer in cache]
