"""Rows on their way into vLLM: checked, because it checks little itself, and written as its HTTP routes read them."""

from __future__ import annotations

import base64
import io

import torch

from persona.errors import PersonaError


def check_rows(rows: torch.Tensor, width: int) -> None:
    """Raises `PersonaError` unless `rows` is `[K, width]`, finite, and without an all-zero row."""
    if rows.dim() != 2 or rows.shape[1] != width:
        raise PersonaError(f"soft rows have shape {tuple(rows.shape)}; this LLM needs [K, {width}]")
    if not torch.isfinite(rows).all():
        raise PersonaError("soft rows hold NaN or infinity; the adapter is damaged or its input is")
    if (rows == 0).all(dim=1).any():
        raise PersonaError("a soft row is all zero; vLLM would confuse it with token 0")


def encode_rows(rows: torch.Tensor) -> str:
    """Rows `[T, llm_width]` as vLLM reads them: base64 of a tensor file."""
    file = io.BytesIO()
    torch.save(rows.detach().cpu().contiguous().clone(), file)  # a view would bring its whole storage along
    return base64.b64encode(file.getvalue()).decode("ascii")


def embeddings_part(rows: torch.Tensor) -> dict:
    """Rows `[T, llm_width]` as a part of a chat message."""
    return {"type": "prompt_embeds", "data": encode_rows(rows)}
