"""Gradient caching (Gao et al. 2021): a large batch is encoded by chunks, and each again for its gradients.

A contrastive loss needs the embeddings of the whole batch at once, but not their activations. This is activation
checkpointing with a chunk as its unit, so torch does the bookkeeping, dropout's random state included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch.utils.checkpoint import checkpoint

from persona.encoders.features import EventBatch
from persona.encoders.user_encoder import UserEncoder


def encode_in_chunks(
    encoder: UserEncoder, batch: EventBatch, instructions: Sequence[str], owner: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `encoder(batch, instructions, owner)` gives, with the activations of `size` histories at a time.

    Gradients are the same; the forward pass is paid for twice.
    """
    tokens = [torch.empty(0)] * len(instructions)
    states = []
    for start in range(0, len(batch.mask), size):
        part = EventBatch(**{f.name: getattr(batch, f.name)[start : start + size] for f in fields(EventBatch)})
        at = torch.nonzero((owner >= start) & (owner < start + size))[:, 0].tolist()
        asked = [instructions[i] for i in at]
        made, own = checkpoint(encoder, part, asked, owner[at] - start, use_reentrant=False)
        states.append(own)
        for i, row in zip(at, made):
            tokens[i] = row
    return torch.stack(tokens), torch.cat(states)


def answers_in_chunks(encoder: UserEncoder, texts: Sequence[str], size: int) -> torch.Tensor:
    """What `encoder.answer_vectors(texts)` gives, with the activations of `size` texts at a time."""
    parts = [list(texts[start : start + size]) for start in range(0, len(texts), size)]
    return torch.cat([checkpoint(encoder.answer_vectors, part, use_reentrant=False) for part in parts])
