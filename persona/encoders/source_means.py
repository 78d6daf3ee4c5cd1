"""`SourceMeans`: the mean event of each source, which an `LLMUserEncoder` reads between events and instruction.

A causal LM has to find the events of one source among all others and count them before it can say what a user does
most; a small one does not learn that. A mean vector for each source says it outright, costs S positions, and is
continued event by event from its sum. (InstructUE, arXiv 2510.11016, groups events by source, but has no such vectors.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Sums(NamedTuple):
    """Event vectors of B histories added up by source."""

    vectors: torch.Tensor
    """`[B, S, d]`."""
    counts: torch.Tensor
    """`[B, S]` events of each source."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.vectors + other.vectors, self.counts + other.counts)

    def __getitem__(self, index) -> Sums:
        """The histories `index`."""
        return Sums(self.vectors[index], self.counts[index])

    @classmethod
    def of(cls, vectors: torch.Tensor, source: torch.Tensor, mask: torch.Tensor, sources: int) -> Sums:
        """Of event vectors `[B, N, d]` with their sources `[B, N]`, from 1 on, and their mask `[B, N]`."""
        numbers = torch.arange(1, sources + 1, device=source.device)
        member = ((source[..., None] == numbers) & mask[..., None]).to(vectors)
        return cls(torch.einsum("bns,bnd->bsd", member, vectors), member.sum(1))


class SourceMeans(nn.Module):
    """Means of event vectors by source, brought to a vector's length, each with a learned tag."""

    def __init__(self, sources: int, width: int):
        super().__init__()
        self.tags = nn.Parameter(0.3 * torch.randn(sources, width))

    def forward(self, sums: Sums) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors `[B, S, d]` with root mean square 1, and the mask `[B, S]` of the sources that have events."""
        means = sums.vectors / sums.counts.clamp(min=1)[..., None]
        return F.rms_norm(F.layer_norm(means, means.shape[-1:]) + self.tags, means.shape[-1:]), sums.counts > 0
