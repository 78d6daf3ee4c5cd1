"""The projector: user tokens, d wide, become rows of the size and scale of the LLM's own input embeddings."""

from __future__ import annotations

import torch
from torch import nn


class Projector(nn.Module):
    """Two-layer GELU MLP, or a linear map; each row is then given the mean norm of the LLM's rows times a learned gain.

    The scale is measured on the LLM, never a constant: PPlug's published 539.97 is FlanT5-XXL's (arXiv 2409.11901).
    """

    def __init__(self, width: int, llm_width: int, row_norm: float, *, linear: bool = False, residual: bool = False):
        """`residual` adds the tokens themselves to what the MLP makes of them: for tokens that are an LLM's states."""
        super().__init__()
        self.residual = residual
        layers = (
            [nn.Linear(width, llm_width)]
            if linear
            else [nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)]
        )
        self.mlp = nn.Sequential(*layers)
        self.register_buffer("row_norm", torch.tensor(float(row_norm)))
        self.log_gain = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """User tokens `[..., d]` -> soft prompt rows `[..., llm_width]`; no row is ever zero."""
        made = self.mlp(tokens) + tokens if self.residual else self.mlp(tokens)
        rows = nn.functional.normalize(made.float(), dim=-1)
        return rows * self.row_norm * self.log_gain.exp()


@torch.no_grad()
def mean_row_norm(llm: nn.Module, chunk: int = 8192) -> float:
    """Mean L2 norm of what the LLM's embedding layer puts out, over its vocabulary, scaling (Gemma) included."""
    embed = llm.get_input_embeddings()
    ids = torch.arange(embed.weight.shape[0], device=embed.weight.device)
    norms = [embed(part).float().norm(dim=-1) for part in ids.split(chunk)]
    return torch.cat(norms).mean().item()
