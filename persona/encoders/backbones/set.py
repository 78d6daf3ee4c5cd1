"""Deep Sets (Zaheer et al. 2017): a baseline that does not know the order of the earlier events.

Each event passes alone through an MLP phi; a state is `rho(phi(x_n), mean of phi(x_1) to phi(x_n))`.
"""

from __future__ import annotations

import torch
from torch import nn


class DeepSet(nn.Module):
    """Residual MLPs for each event, one running mean over them, and an MLP of both."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float, inner: int = 0, positions: int = 0):
        super().__init__()
        inner = inner or 4 * width
        self.phi = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), *mlp(width, inner, width, dropout)) for _ in range(layers)
        )
        self.rho = nn.Sequential(nn.LayerNorm(2 * width), *mlp(2 * width, inner, width, dropout))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: list[torch.Tensor] | None = None,
        times: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """States and cache of `x` `[B, N, d]`; the cache is the sum of phi `[B, d]` and the number of rows `[B, 1]`."""
        for block in self.phi:
            x = x + block(x)
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)  # [B, N, 1]
        total, count = (x * real).float().cumsum(1), real.float().cumsum(1)  # [B, N, d], [B, N, 1]
        if cache is not None:
            total, count = total + cache[0][:, None], count + cache[1][:, None]
        mean = (total / count.clamp(min=1)).to(x.dtype)
        x = self.norm(x + self.rho(torch.cat([x, mean], dim=-1)))
        return x * real, [total[:, -1], count[:, -1]]

    @staticmethod
    def keep(cache: list[torch.Tensor], row: int, unused: int) -> list[torch.Tensor]:
        """The sum and the count of one row of the batch; padding added nothing to them."""
        return [tensor[row : row + 1].clone() for tensor in cache]


def mlp(width: int, inner: int, out: int, dropout: float) -> list[nn.Module]:
    """The layers of an MLP with one hidden layer."""
    return [nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, out)]
