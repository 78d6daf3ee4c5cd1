"""HSTU (Zhai et al. 2024, "Actions Speak Louder than Words", section 3): gated attention without softmax.

The bias of a (query, key) pair is learned for their distance in rows and for their distance in time, in half octaves of
seconds. Two choices where the paper leaves one: a sum over n keys is divided by n as the query sees it, so that a
state never depends on later rows, and the states pass through a last LayerNorm.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from persona.errors import RecipeError

BUCKETS = 63
"""Of time differences: below 1.5 s, below 2 s, below 3 s, below 4 s, and so on up to 2^31 s."""
CHUNK = 128
"""Queries that are computed at once, so that keys of later chunks cost nothing."""
HIDDEN = -1e30
"""Added to the score of a later row: SiLU and its gradient are 0 there, exactly."""


class HSTU(nn.Module):
    """Layers of pointwise attention; `inner` is the width of U and V (the paper's public code: the width of events).

    The first row, in an encoder the start state, has no time of its own: its distance in time to any row counts as 0.
    Raises `RecipeError` if `inner` is no multiple of `heads`.
    """

    def __init__(self, width: int, heads: int, layers: int, dropout: float, inner: int = 0, positions: int = 512):
        super().__init__()
        if inner % heads:
            raise RecipeError(f"encoder.inner must be a multiple of {heads} heads, not {inner}")
        self.positions = positions
        self.blocks = nn.ModuleList(Block(width, heads, dropout, inner or width, positions) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: list[torch.Tensor] | None = None,
        times: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """States and cache of `x` `[B, N, d]`.

        The cache is the times `[B, M + N]`, then each layer's keys `[heads, B, M + N, d / heads]` and values
        `[heads, B, M + N, inner / heads]`.
        """
        times = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device) if times is None else times.double()
        if cache is None:
            times = torch.cat([torch.zeros_like(times[:, :1]), times[:, 1:]], dim=1)
        else:
            times = torch.cat([cache[0], times], dim=1)
        places = self.places(times, x.shape[1])
        new_cache = [times]
        for i, block in enumerate(self.blocks):
            x, kept = block(x, None if cache is None else cache[1 + 2 * i : 3 + 2 * i], places)
            new_cache += kept
        x = self.norm(x)
        return (x if mask is None else x * mask[..., None]), new_cache

    @staticmethod
    def keep(cache: list[torch.Tensor], row: int, unused: int) -> list[torch.Tensor]:
        """The times, keys and values of one row of the batch."""
        size = cache[0].shape[1] - unused
        return [cache[0][row : row + 1, :size].clone()] + [c[:, row : row + 1, :size].clone() for c in cache[1:]]

    def places(self, times: torch.Tensor, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each chunk of the newest `length` rows, indices of distances `[Q, K]` and of time buckets `[B, Q, K]`."""
        result, size = [], times.shape[1]
        row = torch.arange(size, dtype=torch.int32, device=times.device)
        for start in range(size - length, size, CHUNK):
            stop = min(start + CHUNK, size)
            distance = row[start:stop, None] - row[None, :stop]
            distance = distance.clamp(max=self.positions - 1).masked_fill(distance < 0, self.positions)
            bucket = time_buckets(times[:, start:stop, None] - times[:, None, :stop])
            bucket[..., 0] = 0
            result.append((distance, bucket))
        return result


class Block(nn.Module):
    """One layer: `x + out(norm(attention(q, k, v)) * u)`."""

    def __init__(self, width: int, heads: int, dropout: float, inner: int, positions: int):
        super().__init__()
        self.heads, self.sizes = heads, (inner, inner, width, width)
        self.norm, self.attended_norm = nn.LayerNorm(width), nn.LayerNorm(inner)
        self.uvqk = nn.Linear(width, sum(self.sizes), bias=False)
        self.out = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        self.position_bias = nn.Parameter(torch.randn(heads, positions) * 0.02)
        self.time_bias = nn.Parameter(torch.randn(heads, BUCKETS) * 0.02)
        nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(
        self, x: torch.Tensor, cache: list[torch.Tensor] | None, places: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`[B, N, d]` -> the same, and this layer's keys and values of all rows."""
        batch, length, _ = x.shape
        u, *vqk = F.silu(self.uvqk(self.norm(x))).split(self.sizes, dim=-1)
        v, q, k = (t.unflatten(2, (self.heads, -1)).permute(2, 0, 1, 3) for t in vqk)  # [h, B, N, e]
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        attended = self.attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), places)
        attended = attended.view(self.heads, batch, length, -1).permute(1, 2, 0, 3).flatten(2)  # [B, N, inner]
        return x + self.out(self.dropout(self.attended_norm(attended) * u)), [k, v]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Queries `[hB, N, e]`, keys `[hB, M + N, e]` and values `[hB, M + N, f]` -> `[hB, N, f]`."""
        size = k.shape[1]
        start = size - q.shape[1]
        counts = torch.arange(start + 1, size + 1, device=q.device)[:, None]
        positions = F.pad(self.position_bias, (0, 1), value=HIDDEN)
        attended = []
        for part, (distance, bucket) in zip(q.split(CHUNK, dim=1), places):
            stop = distance.shape[1]
            bias = Bias.apply(positions, self.time_bias, distance, bucket).to(part.dtype)  # [h, B, Q, K]
            scores = bias.flatten(0, 1).baddbmm_(part, k[:, :stop].mT)
            attended.append(F.silu(scores, inplace=not scores.requires_grad) @ v[:, :stop])
        return torch.cat(attended, dim=1) / counts


class Bias(torch.autograd.Function):
    """Sums `[h, B, Q, K]` of `positions` `[h, S]` at `distance` `[Q, K]` and `times` `[h, T]` at `bucket` `[B, Q, K]`.

    PyTorch's own gradient of a lookup is far slower.
    """

    @staticmethod
    def forward(
        ctx, positions: torch.Tensor, times: torch.Tensor, distance: torch.Tensor, bucket: torch.Tensor
    ) -> torch.Tensor:
        """The sum, in memory that the caller may overwrite."""
        ctx.save_for_backward(distance, bucket)
        ctx.sizes = positions.shape[1], times.shape[1]
        bias, flat = times.new_empty(len(times), *bucket.shape), bucket.flatten()
        for head, near, far in zip(bias, positions, times):
            torch.index_select(far, 0, flat, out=head.view(-1))
            head += near.index_select(0, distance.flatten()).view_as(distance)
        return bias

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        """The sum of the gradients of each entry."""
        distance, bucket = (index.flatten() for index in ctx.saved_tensors)
        positions = [torch.bincount(distance, g.flatten(), ctx.sizes[0]) for g in grad.sum(1)]
        times = [torch.bincount(bucket, g.flatten(), ctx.sizes[1]) for g in grad]
        return torch.stack(positions).to(grad.dtype), torch.stack(times).to(grad.dtype), None, None


def time_buckets(seconds: torch.Tensor) -> torch.Tensor:
    """Differences in seconds as indices of half octaves: a float's bits, cut after the first of its fraction."""
    return seconds.float().abs_().clamp_(1, 2**31).view(torch.int32).bitwise_right_shift_(22).sub_(127 << 1)
