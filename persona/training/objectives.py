"""Losses beside the answer loss, which `PersonalizedLM` computes itself. One function each."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from persona.encoders import UserEncoder
from persona.encoders.features import EventBatch


def next_item_loss(encoder: UserEncoder, states: torch.Tensor, events: EventBatch, texts: torch.Tensor) -> torch.Tensor:
    """Full-softmax cross-entropy of each next item given the state before it (SASRec, Kang & McAuley 2018).

    `states` `[B, 1 + N, d]`, `texts` `[items, text_dim]` the catalogue's text vectors. Items outside the vocabulary
    are not predicted; a batch without any gives zero.
    """
    target = events.item  # [B, N]; state n, the first being the start state, predicts row n
    known = target > 0
    if not known.any():
        return states.sum() * 0.0
    catalogue = encoder.events.catalogue(texts)  # [items, d]
    logits = states[:, :-1][known] @ catalogue.T / catalogue.shape[1] ** 0.5
    return F.cross_entropy(logits.float(), target[known] - 1)
