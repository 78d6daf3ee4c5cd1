"""Sequence backbones by name. A backbone maps event vectors `[B, N, d]` to states; a cache lets it go on later.

All are built from `(width, heads, layers, dropout, inner, positions)`, where `inner` 0 stands for the backbone's own
default and `positions` is the longest sequence, and have

- `forward(x, mask=None, cache=None, times=None) -> (states, cache)`: `x` `[B, N, d]`, `mask` `[B, N]` True at real
  rows, which come first (None: all are), `times` `[B, N]` seconds in float64 (None: all equal). States are zero at
  padding, and the state of a row never depends on later rows. `cache` is what an earlier call returned, if all its
  rows were real, or what `keep` made of it: `x` then continues those rows.
- `keep(cache, row, unused) -> cache`: the part of a returned cache that belongs to one row of the batch, whose last
  `unused` positions were padding, in memory of its own.
"""

from __future__ import annotations

from torch import nn

from persona.encoders.backbones.gru4rec import GRU4Rec
from persona.encoders.backbones.hstu import HSTU
from persona.encoders.backbones.mamba4rec import Mamba4Rec
from persona.encoders.backbones.sasrec import SASRec
from persona.encoders.backbones.set import DeepSet
from persona.encoders.backbones.transformer import CausalTransformer
from persona.encoders.backbones.trm import TRMPlusPlus
from persona.errors import RecipeError

BACKBONES: dict[str, type[nn.Module]] = {
    "transformer": CausalTransformer,
    "set": DeepSet,
    "gru4rec": GRU4Rec,
    "sasrec": SASRec,
    "hstu": HSTU,
    "mamba4rec": Mamba4Rec,
    "trm++": TRMPlusPlus,
}


def build_backbone(
    name: str, width: int, heads: int, layers: int, dropout: float, inner: int = 0, positions: int = 512
) -> nn.Module:
    """The backbone called `name`; raises `RecipeError` for an unknown one."""
    if name not in BACKBONES:
        raise RecipeError(f"encoder.backbone is {name!r}; there are {sorted(BACKBONES)}")
    return BACKBONES[name](width, heads, layers, dropout, inner, positions)
