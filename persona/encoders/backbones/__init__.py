"""Sequence backbones by name. A backbone maps event vectors `[B, N, d]` to states; a cache lets it go on later."""

from __future__ import annotations

from torch import nn

from persona.encoders.backbones.transformer import CausalTransformer
from persona.errors import RecipeError

BACKBONES: dict[str, type[nn.Module]] = {"transformer": CausalTransformer}
"""Each is built as `(width, heads, layers, dropout)` and called as `(x, mask, cache) -> (states, cache)`."""


def build_backbone(name: str, width: int, heads: int, layers: int, dropout: float) -> nn.Module:
    """The backbone called `name`; raises `RecipeError` for an unknown one."""
    if name not in BACKBONES:
        raise RecipeError(f"encoder.backbone is {name!r}; there are {sorted(BACKBONES)}")
    return BACKBONES[name](width, heads, layers, dropout)
