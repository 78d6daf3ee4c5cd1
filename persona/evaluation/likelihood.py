"""Scores closed answers by their likelihood under the LLM, in one pass where every answer is one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from persona.injection import PersonalizedLM
from persona.injection.soft_prompt import Messages


@dataclass(frozen=True)
class Request:
    """One prompt and the answers to choose from."""

    messages: Messages
    """What the LLM reads as text."""
    options: tuple[str, ...]
    """Answers to score."""
    rows: torch.Tensor | None = None
    """User tokens `[K, llm_width]` as the LLM reads them, or None for a plain prompt."""
    cut: bool = False
    """Whether the text about the user in `messages` was too long and is not all there."""


@torch.inference_mode()
def option_scores(model: PersonalizedLM, requests: Sequence[Request], tokens_per_batch: int = 8192) -> list[np.ndarray]:
    """Log-likelihood of each option of each request.

    Where all options of a request are single tokens, each score is that token's. Else options are compared as whole
    answers with their end-of-turn tokens, so that "4" competes fairly with "4.5". The best option has its exact score
    then; a loser may keep the log-likelihood of its first token, an upper bound on its own score that is below the
    best one.
    """
    template = model.template
    prompts = [template.prompt(r.messages, 0 if r.rows is None else len(r.rows)) for r in requests]
    short: dict[str, list[int]] = {}
    for option in dict.fromkeys(option for request in requests for option in request.options):
        short[option] = template.option("?", option)
    long = [i for i, request in enumerate(requests) if any(len(short[o]) > 1 for o in request.options)]
    whole: dict[str, list[int]] = {}
    for option in dict.fromkeys(option for i in long for option in requests[i].options):
        whole[option] = template.answer("?", option)
    ids = [short] * len(requests)
    for i in long:
        ids[i] = whole
    scores: list[np.ndarray] = [np.empty(0)] * len(requests)
    for part in _batches([len(p.ids) for p in prompts], tokens_per_batch):
        batch = model.collate([prompts[i] for i in part])
        first = torch.log_softmax(model.logits(_flat(requests, part), batch)[:, -1].float(), -1).cpu().numpy()
        for row, i in zip(first, part):
            scores[i] = row[[ids[i][o][0] for o in requests[i].options]].astype(float)
    best = {i: int(scores[i].argmax()) for i in long}
    _score_whole(model, requests, prompts, whole, list(best.items()), scores, tokens_per_batch)
    # Of the others, only those whose bound reaches the score of the one just scored can still win.
    rest = [(i, int(j)) for i in long for j in np.flatnonzero(scores[i] >= scores[i][best[i]]) if j != best[i]]
    _score_whole(model, requests, prompts, whole, rest, scores, tokens_per_batch)
    return scores


def _score_whole(model, requests, prompts, answers, pairs, scores, tokens_per_batch) -> None:
    """Replaces the scores of (request, option) pairs by those of the whole answer."""
    whole = [(prompts[i], answers[requests[i].options[j]]) for i, j in pairs]
    for part in _batches([len(p.ids) + len(a) for p, a in whole], tokens_per_batch):
        batch = model.collate([whole[n][0] for n in part], [whole[n][1] for n in part])
        rows = _flat(requests, [pairs[n][0] for n in part])
        logits = model.logits(rows, batch, keep=batch.answer_length + 1)[:, :-1].float()
        labels = batch.labels[:, -batch.answer_length :]
        logp = torch.log_softmax(logits, -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        totals = (logp * (labels >= 0)).sum(1).cpu().numpy()
        for n, total in zip(part, totals):
            i, j = pairs[n]
            scores[i][j] = total


def _flat(requests: Sequence[Request], part: Sequence[int]) -> torch.Tensor | None:
    rows = [requests[i].rows for i in part if requests[i].rows is not None]
    return torch.cat(rows) if rows else None


def _batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of like length, at most `tokens` padded tokens each."""
    batches: list[list[int]] = []
    for i in np.argsort(lengths, kind="stable"):
        if batches and lengths[i] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(int(i))
        else:
            batches.append([int(i)])
    return batches
