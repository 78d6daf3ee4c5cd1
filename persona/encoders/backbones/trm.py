"""TRM++, the transformer of UQABench (Liu et al. 2025): rotary positions, RMSNorm, SwiGLU, pre-norm."""

from __future__ import annotations

from torch import nn

from persona.encoders.backbones.transformer import CausalTransformer


class TRMPlusPlus(CausalTransformer):
    """`CausalTransformer` with RMSNorm (Zhang & Sennrich 2019) in place of LayerNorm."""

    norm_class = nn.RMSNorm
