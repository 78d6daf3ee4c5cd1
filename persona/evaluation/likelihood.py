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
    """Soft prompt rows `[K, llm_width]`, or None for a plain prompt."""


@torch.inference_mode()
def option_scores(model: PersonalizedLM, requests: Sequence[Request], tokens_per_batch: int = 8192) -> list[np.ndarray]:
    """Log-likelihood of each option of each request.

    An option of several tokens is scored to its end only while it can still win; a loser keeps the score of the part
    that was scored, an upper bound on its own that is below the winner's.
    """
    template = model.template
    prompts = [template.prompt(r.messages, 0 if r.rows is None else len(r.rows)) for r in requests]
    ids: dict[str, list[int]] = {}
    for request in requests:
        for option in request.options:
            if option not in ids:
                ids[option] = template.option("?", option)
    scores: list[np.ndarray] = [np.empty(0)] * len(requests)
    again: list[tuple[int, int]] = []
    for part in _batches([len(p.ids) for p in prompts], tokens_per_batch):
        batch = model.collate([prompts[i] for i in part])
        first = torch.log_softmax(model.logits(_flat(requests, part), batch)[:, -1].float(), -1).cpu().numpy()
        for row, i in zip(first, part):
            options = requests[i].options
            scores[i] = row[[ids[o][0] for o in options]].astype(float)
            done = [scores[i][j] for j, o in enumerate(options) if len(ids[o]) == 1]
            best = max(done, default=-np.inf)
            again += [(i, j) for j, o in enumerate(options) if len(ids[o]) > 1 and scores[i][j] > best]
    _score_long(model, requests, prompts, ids, again, scores, tokens_per_batch)
    return scores


def _score_long(model, requests, prompts, ids, again, scores, tokens_per_batch) -> None:
    """Replaces the scores of (request, option) pairs by those of the whole option."""
    whole = [(prompts[i], ids[requests[i].options[j]]) for i, j in again]
    for part in _batches([len(p.ids) + len(o) for p, o in whole], tokens_per_batch):
        batch = model.collate([whole[n][0] for n in part], [whole[n][1] for n in part])
        rows = _flat(requests, [again[n][0] for n in part])
        logits = model.logits(rows, batch, keep=batch.answer_length + 1)[:, :-1].float()
        labels = batch.labels[:, -batch.answer_length :]
        logp = torch.log_softmax(logits, -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        totals = (logp * (labels >= 0)).sum(1).cpu().numpy()
        for n, total in zip(part, totals):
            i, j = again[n]
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
