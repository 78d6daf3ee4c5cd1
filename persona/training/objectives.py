"""Losses beside the answer loss, which `PersonalizedLM` computes itself. One function each."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from persona.encoders import UserEncoder
from persona.encoders.features import EventBatch


def next_item_loss(
    encoder: UserEncoder,
    states: torch.Tensor,
    events: EventBatch,
    texts: torch.Tensor,
    *,
    negatives: int = 0,
    frequency: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of each next item given the state before it (SASRec, Kang & McAuley 2018), full softmax.

    `states` `[B, 1 + N, d]`, `texts` `[items, text_dim]` the catalogue's text vectors. Items outside the vocabulary
    are not predicted; a batch without any gives zero.

    With `negatives` the softmax is over the batch's own next items and so many others, drawn by `frequency` `[items]`
    (events of each item); each score is lowered by the log probability of being drawn (logQ, Bengio & Senecal 2008;
    Yi et al. 2019), so that in expectation the full softmax is learned.
    """
    target = events.item  # [B, N]; state n, the first being the start state, predicts row n
    known = target > 0
    if not known.any():
        return states.sum() * 0.0
    states, target = states[:, :-1][known], target[known] - 1  # [P, d], [P]
    if not negatives:
        return F.cross_entropy(encoder.item_scores(states, texts).float(), target)
    drawn = torch.multinomial(frequency, negatives, replacement=True)
    offered, place = torch.unique(torch.cat([target, drawn]), return_inverse=True)
    scores = encoder.item_scores(states, texts, offered).float()  # [P, offered]
    probability = frequency / frequency.sum()
    expected = probability[offered] * (negatives + len(target))  # in how many draws an item is expected
    return F.cross_entropy(scores - expected.log(), place[: len(target)])
