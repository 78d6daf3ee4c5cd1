"""Mamba4Rec (Liu et al. 2024) with Mamba-2 layers (Dao & Gu 2024, "Transformers are SSMs"), as in UQABench.

What it keeps of a user has one size for ever: a state for each head and the last inputs of a short convolution. On a
GPU the scan is `mamba_ssm`'s kernel where that package is installed; elsewhere it is matrix products in PyTorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from persona.errors import RecipeError

STATE = 32
"""Size of the state for each channel, Mamba4Rec's."""
KERNEL = 4
"""Rows that the convolution sees."""
CHUNK = 64
"""Rows that the scan takes at once."""


class Mamba4Rec(nn.Module):
    """Mamba-2 layers, each with a pointwise network behind it; `inner` is the width inside both (2 times the width).

    Raises `RecipeError` if `inner` is no multiple of `heads`.
    """

    def __init__(self, width: int, heads: int, layers: int, dropout: float, inner: int = 0, positions: int = 0):
        super().__init__()
        if inner % heads:
            raise RecipeError(f"encoder.inner must be a multiple of {heads} heads, not {inner}")
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, inner or 2 * width) for _ in range(layers))

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: list[torch.Tensor] | None = None,
        times: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """States and cache of `x` `[B, N, d]`.

        The cache holds, for each layer and after the last real row, the convolution's inputs `[B, 3, inner + 2 STATE]`
        and the state `[B, heads, inner / heads, STATE]`.
        """
        x = self.norm(self.dropout(x))
        new_cache = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, mask, None if cache is None else cache[2 * i : 2 * i + 2])
            new_cache += kept
        return (x if mask is None else x * mask[..., None]), new_cache

    @staticmethod
    def keep(cache: list[torch.Tensor], row: int, unused: int) -> list[torch.Tensor]:
        """The states of one row of the batch; padding did not change them."""
        return [tensor[row : row + 1].clone() for tensor in cache]


class Block(nn.Module):
    """A Mamba-2 layer and a pointwise network, each with a residual and a LayerNorm after it."""

    def __init__(self, width: int, heads: int, dropout: float, inner: int):
        super().__init__()
        self.mixer = Mamba2(width, heads, inner)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`[B, N, d]` -> the same, and what the layer keeps."""
        mixed, kept = self.mixer(x, mask, cache)
        x = self.norm1(x + self.dropout(mixed))
        return self.norm2(x + self.dropout(self.down(self.dropout(F.gelu(self.up(x)))))), kept


class Mamba2(nn.Module):
    """A selective state space layer: what enters a head's state and how fast that decays depend on the row."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads, self.inner = heads, inner
        channels = inner + 2 * STATE
        self.into = nn.Linear(width, inner + channels + heads, bias=False)
        self.conv = nn.Conv1d(channels, channels, KERNEL, groups=channels)
        self.log_decay = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out = nn.Linear(inner, width, bias=False)
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`[B, N, d]` -> the same, and the convolution's last inputs and the state after the last real row."""
        batch, length, _ = x.shape
        gate, inputs, step = self.into(x).split([self.inner, self.inner + 2 * STATE, self.heads], dim=-1)
        if cache is None:
            inputs = F.pad(inputs, (0, 0, KERNEL - 1, 0))  # [B, 3 + N, inner + 2 STATE]
            state = torch.zeros(batch, self.heads, self.inner // self.heads, STATE, device=x.device)
        else:
            inputs, state = torch.cat([cache[0].to(inputs.dtype), inputs], dim=1), cache[1]
        step = F.softplus(step.float() + self.step_bias)  # [B, N, h]
        sizes = torch.full((batch, 1), length, device=x.device)
        if mask is not None:  # a step of 0 leaves the state as it is
            step, sizes = step * mask[..., None], mask.sum(1, keepdim=True)
        tail = sizes + torch.arange(KERNEL - 1, device=x.device)  # [B, 3]
        tail = inputs.gather(1, tail[..., None].expand(-1, -1, inputs.shape[2]))
        mixed = F.silu(self.conv(inputs.mT).mT)
        v, k, q = mixed.split([self.inner, STATE, STATE], dim=-1)  # [B, N, inner], [B, N, STATE] twice
        v = v.unflatten(2, (self.heads, -1))  # [B, N, h, p]
        y, state = scan(v, step, -self.log_decay.exp(), k, q, state)
        y = (y + self.skip[:, None] * v).flatten(2)  # [B, N, inner]
        return self.out(self.norm(y * F.silu(gate))), [tail, state]


def scan(
    v: torch.Tensor, step: torch.Tensor, decay: torch.Tensor, k: torch.Tensor, q: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence `h_n = exp(step_n decay) h_(n-1) + step_n v_n k_n^T`, `y_n = h_n q_n` for each head.

    `v` `[B, N, h, p]`, `step` `[B, N, h]`, `decay` `[h]` below 0, `k` and `q` `[B, N, s]`, `state` `[B, h, p, s]` ->
    `y` `[B, N, h, p]` and the last state, in float32.
    """
    fused = fused_scan() if v.is_cuda else None
    with torch.autocast(v.device.type, enabled=False):
        v, k, q = v.float(), k.float(), q.float()
        if fused is None:
            return chunked_scan(v, step, decay, k, q, state)
        return fused(
            v, step, decay, k[:, :, None], q[:, :, None], CHUNK, initial_states=state, return_final_states=True
        )


@functools.cache
def fused_scan() -> Callable | None:
    """The kernel of the optional package `mamba_ssm`, if that can be imported."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    return mamba_chunk_scan_combined


def chunked_scan(
    v: torch.Tensor, step: torch.Tensor, decay: torch.Tensor, k: torch.Tensor, q: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scan` by matrix products (Dao & Gu 2024, section 6): attention within chunks, a recurrence between them."""
    length = v.shape[1]
    chunk = min(CHUNK, length)
    v, step, k, q = (padded_chunks(t, chunk) for t in (v * step[..., None], step, k, q))  # [B, C, L, ...]
    log = (step * decay).cumsum(2).movedim(3, 2)  # [B, C, h, L], of what is left at a row of the chunk's first state
    v = v.movedim(3, 2)  # [B, C, h, L, p]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).triu(1)
    weight = (log[..., :, None] - log[..., None, :]).masked_fill(later, -torch.inf).exp()  # [B, C, h, L, L]
    y = (weight * (q @ k.mT)[:, :, None]) @ v  # [B, C, h, L, p]
    left = (log[..., -1:] - log).exp()  # [B, C, h, L], of a row's input at the end of the chunk
    added = (v * left[..., None]).mT @ k[:, :, None]  # [B, C, h, p, s]
    kept = log[..., -1].exp()[..., None, None]  # [B, C, h, 1, 1]
    before = []
    for c in range(v.shape[1]):
        before.append(state)
        state = state * kept[:, c] + added[:, c]
    y = y + log.exp()[..., None] * (q[:, :, None] @ torch.stack(before, dim=1).mT)
    return y.transpose(2, 3).flatten(1, 2)[:, :length], state  # [B, N, h, p]


def padded_chunks(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """`[B, N, ...]` -> `[B, C, chunk, ...]`, with zeros behind the last row."""
    missing = -x.shape[1] % chunk
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, chunk))
