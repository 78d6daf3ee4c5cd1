"""Heads by name: how backbone states become K user tokens.

A head has three steps, so that what belongs to the user and what belongs to the instruction can be kept: `memory` of
states, `ask` of instructions, and `read`, which brings the two together. See `Resampler`.
"""

from __future__ import annotations

import torch
from torch import nn

from persona.encoders.config import EncoderConfig
from persona.encoders.resampler import Resampler
from persona.errors import RecipeError


class MeanHead(nn.Module):
    """The mean of the states, mapped to K tokens: the same for every instruction (UQABench, arXiv 2502.19178, 3.3)."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.out = nn.Linear(width, tokens * width)

    def forward(self, states, mask, instruction, instruction_mask, topic) -> torch.Tensor:
        """`[B, N, d]`, `[B, N]` -> `[B, K, d]`."""
        return self.read(*self.ask(instruction, instruction_mask, topic), self.memory(states, mask), mask, topic)

    def memory(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The states themselves, `[1, 1, B, 1, N, d]`."""
        return states[None, None, :, None]

    def ask(self, instruction, instruction_mask, topic) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing of the instruction: zeros `[B, 1, d]`, and their mask `[B, 1]`."""
        return torch.zeros_like(topic[:, None]), torch.ones_like(instruction_mask[:, :1])

    def read(self, latents, seen, memory: torch.Tensor, mask: torch.Tensor | None, match) -> torch.Tensor:
        """The mean over the states where `mask` `[B, N]` is True, as `[B, K, d]`."""
        states = memory[0, 0, :, 0]
        weights = torch.ones_like(states[..., :1]) if mask is None else mask[..., None].to(states)
        mean = (states * weights).sum(1) / weights.sum(1)
        return self.out(mean).view(len(mean), self.tokens, -1)


def build_head(config: EncoderConfig, text_dim: int) -> nn.Module:
    """The head that `config` names; raises `RecipeError` for an unknown one."""
    if config.head not in HEADS:
        raise RecipeError(f"encoder.head is {config.head!r}; there are {list(HEADS)}")
    if config.head == "resampler":
        shape = config.width, config.heads, config.resampler_layers, config.tokens, config.dropout
        return Resampler(text_dim, *shape, match=config.mentions)
    return MeanHead(config.width, config.tokens)


HEADS = ("resampler", "linear", "mlp")
"""linear and mlp are both the mean of the states; what differs is the projector behind them."""
