"""Losses beside the answer loss, which `PersonalizedLM` computes itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from persona.encoders import UserEncoder
from persona.encoders.embedding import pooled
from persona.encoders.features import EventBatch
from persona.training.processes import gathered


def next_item_loss(
    encoder: UserEncoder,
    states: torch.Tensor,
    events: EventBatch,
    texts: torch.Tensor,
    *,
    negatives: int = 0,
    frequency: torch.Tensor | None = None,
    foretold: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of each next item given the state before it (SASRec, Kang & McAuley 2018), full softmax.

    `states` `[B, 1 + N, d]`, `texts` `[items, text_dim]` the catalogue's text vectors. Items outside the vocabulary
    are not predicted, nor those where `foretold` `[B, N]` is False; a batch without any gives zero.

    With `negatives` the softmax is over the batch's own next items and so many others, drawn by `frequency` `[items]`
    (events of each item); each score is lowered by the log probability of being drawn (logQ, Bengio & Senecal 2008;
    Yi et al. 2019), so that in expectation the full softmax is learned.
    """
    target = events.item  # [B, N]; state n, the first being the start state, predicts row n
    known = target > 0 if foretold is None else (target > 0) & foretold
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


def contrastive_loss(
    users: torch.Tensor,
    answers: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 0.07,
    margin: float = 0.1,
) -> torch.Tensor:
    """InfoNCE of users and their answers (InstructUE, arXiv 2510.11016, section 3), over the batches of all processes.

    `users` and `answers` `[Q, d]` are L2-normalised, row by row a pair; `labels` `[Q]` are equal where answers are. To
    the other answers as negatives come the other users, for a user, and the other answers, for an answer. Dropped as
    false are negatives of an equal answer and those more similar, by `margin`, than the pair itself.
    """
    users, answers, labels = (gathered(x) for x in (users, answers, labels))
    if not len(users):
        return users.sum() * 0.0
    cross = users @ answers.T
    pair = cross.diagonal()[:, None]
    same = labels[:, None] == labels
    own = torch.eye(len(users), dtype=torch.bool, device=users.device)
    rivals = torch.cat([cross, users @ users.T, answers @ answers.T], dim=1)  # [Q, 3 Q]
    dropped = (rivals.detach() > pair.detach() + margin) | torch.cat([same, same, same], dim=1)
    dropped[:, : len(users)] &= ~own
    scores = (rivals / temperature).masked_fill(dropped, float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(users), device=users.device))


def matryoshka_contrastive_loss(
    tokens: torch.Tensor, answers: torch.Tensor, labels: torch.Tensor, dims: Sequence[int], **options: float
) -> torch.Tensor:
    """Mean of `contrastive_loss` over embeddings of `dims` dimensions (Kusupati et al. 2022).

    `tokens` `[Q, K, d]` are averaged over the K given; `answers` `[Q, d]` need not be normalised.
    """
    losses = [
        contrastive_loss(pooled(tokens, dim=dim), F.normalize(answers[:, :dim], dim=-1), labels, **options)
        for dim in dims
    ]
    return torch.stack(losses).mean()
