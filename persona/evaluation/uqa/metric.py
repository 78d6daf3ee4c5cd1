"""The official metric of UQABench: the share of answers that start with the gold one, with intervals added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from persona.errors import DataError
from persona.evaluation.intervals import interval
from persona.evaluation.uqa.tasks import DIMENSIONS, SUB_TASKS, route


def official_accuracy(
    questions: Sequence[str], predictions: Sequence[str], golds: Sequence[str], *, seed: int = 0
) -> dict:
    """Accuracy x 100 of each sub-task, each dimension and overall, every question counting the same.

    A prediction is one greedy token and is right when `prediction.startswith(gold)` (UQABench, arXiv 2502.19178).
    Nothing is stripped or normalised: " A", "a" and the full-width "Ａ" are all wrong answers to "A", and a gold
    answer of several tokens, such as "10" where digits are single tokens, cannot be met.

    Returns `{"sub_tasks": {name: cell}, "dimensions": {name: cell}, "overall": cell}`, where a cell is
    `{"accuracy", "low", "high", "n"}`; `low` and `high` are `bootstrap`'s. What was not asked has no cell.
    Raises `DataError` for no questions, for lists of different lengths, for an empty gold answer and for a question
    that no sub-task takes.
    """
    if not len(questions) == len(predictions) == len(golds):
        raise DataError(f"{len(questions)} questions, {len(predictions)} predictions, {len(golds)} golds: not as many")
    if not questions:
        raise DataError("there are no questions to score")
    check_golds(golds)
    names = np.array([route(question).name for question in questions])
    hits = np.array([prediction.startswith(gold) for prediction, gold in zip(predictions, golds)])
    groups = {
        "sub_tasks": {task.name: hits[names == task.name] for task in SUB_TASKS},
        "dimensions": {dimension: hits[np.isin(names, those)] for dimension, those in DIMENSIONS.items()},
    }
    cells = {
        level: {name: _cell(part, seed) for name, part in parts.items() if len(part)} for level, parts in groups.items()
    }
    return {**cells, "overall": _cell(hits, seed)}


def check_golds(golds: Sequence[str]) -> None:
    """Raises `DataError` for an empty gold answer, which every prediction would start with."""
    for number, gold in enumerate(golds):
        if not gold:
            raise DataError(f"the gold answer of question {number}, counted from 0, is empty: any answer has it")


def bootstrap(hits: np.ndarray, *, seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """Ends of the bootstrap 95% interval of the accuracy x 100 of `hits` `[n]`; Nones for fewer than two questions.

    Questions are resampled, not users: a row of the official files is one question and does not name its user.
    """
    if len(hits) < 2:
        return None, None
    low, high = interval(hits, lambda sample: 100 * sample.mean(), seed=seed)
    return round(float(low), 2), round(float(high), 2)


def _cell(hits: np.ndarray, seed: int) -> dict:
    low, high = bootstrap(hits, seed=seed)
    return {"accuracy": round(100 * float(hits.mean()), 2), "low": low, "high": high, "n": len(hits)}
