"""Backbones of one size: the `inner` that gives a backbone a number of parameters, so that comparisons are fair."""

from __future__ import annotations

import bisect
import math
from functools import partial

import torch

from persona.encoders.backbones import build_backbone
from persona.errors import RecipeError


def parameter_count(name: str, width: int, heads: int, layers: int, positions: int, inner: int = 0) -> int:
    """Parameters of a backbone, without building it in memory."""
    with torch.device("meta"):
        backbone = build_backbone(name, width, heads, layers, 0.0, inner, positions)
    return sum(p.numel() for p in backbone.parameters())


def matched_inner(name: str, width: int, heads: int, layers: int, positions: int, target: int) -> int:
    """The `inner` that brings a backbone's parameters close to `target`, a multiple of `heads`.

    A multiple of 8, which computes faster, where that is within 2%, else the closest. Raises `RecipeError` if that
    misses `target` by more than 5%.
    """
    count = partial(parameter_count, name, width, heads, layers, positions)
    for step, tolerance in ((math.lcm(8, heads), 0.02), (heads, 0.05)):
        sizes = range(step, target + 2 * step, step)  # no backbone has fewer than one parameter for each unit
        above = bisect.bisect_left(sizes, target, key=count)
        errors = {inner: abs(count(inner) / target - 1) for inner in sizes[max(0, above - 1) : above + 1]}
        best = min(errors, key=errors.get)
        if errors[best] <= tolerance:
            return best
    raise RecipeError(f"no inner width gives {name} {target} parameters; {best} misses it by {errors[best]:.0%}")
