"""User tokens as the rows that open a request."""

from __future__ import annotations

import torch

from persona.errors import PersonaError


def memory_rows(
    rows: torch.Tensor | None, *, tokens: int, slots: int, width: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """User tokens `[k, width]` as `[slots, width]` in `dtype`, on the CPU: read ones first, then filler.

    Where k is a part of `tokens`, every row is repeated, which gives the same attention. None is an anonymous user:
    zero rows have zero values, so nothing is added to the LLM. Filler is never read; it is not zero, lest vLLM's prefix
    cache take it for token 0 (vLLM issue 56655). Raises `PersonaError` for rows that do not fit or are not finite.
    """
    if rows is None:
        rows = torch.zeros(tokens, width)
    if rows.dim() != 2 or rows.shape[1] != width:
        raise PersonaError(f"user tokens have shape {tuple(rows.shape)}; this LLM needs [k, {width}]")
    if not len(rows) or tokens % len(rows):
        raise PersonaError(
            f"there are {len(rows)} user tokens, but the served checkpoint reads {tokens}; "
            f"give a number that divides {tokens}, or export the checkpoint for {len(rows)}"
        )
    rows = rows.detach().to("cpu", dtype)  # in which a large number may become infinite
    if not torch.isfinite(rows).all():
        raise PersonaError("user tokens hold NaN or infinity; the adapter is damaged or its input is")
    memory = torch.ones(slots, width, dtype=dtype)
    memory[:tokens] = rows.repeat_interleave(tokens // len(rows), dim=0)
    return memory
