"""Metrics of LaMP (Salemi et al. 2023, arXiv 2304.11406): of all answers, and of one, for intervals over users."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache

from persona.errors import DataError, MissingExtraError
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import Task

try:
    from rouge_score.rouge_scorer import RougeScorer
    from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error
except ImportError as error:
    raise MissingExtraError(f"LaMP cannot be scored ({error}): pip install 'persona[eval]'") from error

ROUGE = ("rouge1", "rougeL")
SHOWN = 3
"""Ids that an error message names."""


def score(task: Task, predictions: Mapping[str, str], golds: Mapping[str, str]) -> dict[str, float]:
    """The task's metrics over all answers, by sample id; the only cleaning is `strip()`.

    Classification: `accuracy`, and `macro_f1` over all the task's labels, where a label that nobody gave counts 0. An
    answer that is no label is wrong. Rating, in stars: `mae` and `rmse`, of answers read as `per_sample` says.
    Generation: mean F-measures `rouge1` and `rougeL`, without stemmer. All but `mae` and `rmse` are within [0, 1].

    Raises `DataError` where ids are not the same, there is none, or a gold answer is not one of the task's labels.
    """
    _check_ids(predictions, golds)
    if task.kind == "generation":
        values = [per_sample(task, predictions[id], gold) for id, gold in golds.items()]
        return {name: math.fsum(v[name] for v in values) / len(values) for name in ROUGE}
    right = [_label(task, gold, f" of question {id!r}") for id, gold in golds.items()]
    answers = [predictions[id].strip() for id in golds]
    if task.kind == "rating":
        stars = [float(gold) for gold in right]
        given = [_stars(task, answer, gold) for answer, gold in zip(answers, stars)]
        return {"mae": float(mean_absolute_error(stars, given)), "rmse": float(root_mean_squared_error(stars, given))}
    f1 = f1_score(right, answers, labels=list(task.labels), average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(right, answers)), "macro_f1": float(f1)}


def per_sample(task: Task, prediction: str, gold: str) -> dict[str, float]:
    """What one answer adds: the mean over answers is the metric of the same name, and the root of `mse` is `rmse`.

    Classification: `accuracy`. Rating: `mae` and `mse`; an answer that is not a finite number counts as the end of
    the scale that is farther from the gold, and as the upper end for the middle. Generation: `rouge1` and `rougeL`.

    Raises `DataError` for a gold answer that is not one of the task's labels.
    """
    if task.kind == "generation":
        return {name: found.fmeasure for name, found in _rouge().score(gold.strip(), prediction.strip()).items()}
    right, answer = _label(task, gold), prediction.strip()
    if task.kind == "classification":
        return {"accuracy": float(answer == right)}
    error = abs(_stars(task, answer, float(right)) - float(right))
    return {"mae": error, "mse": error * error}


def in_profile(task: Task, sample: Sample) -> bool:
    """Whether the user's own profile gives the answer away; results are reported with and without such samples.

    LaMP_4 to 7: an item's label field is the gold answer. LaMP_1: an item's title is that of the reference that the
    gold answer points to. LaMP_2, 2N and 3, where the labels of all items are possible answers: an item has the text
    that is asked about, and the gold label.

    Raises `DataError` for a sample without a gold answer.
    """
    if sample.output is None:
        raise DataError(f"{task.name}: sample {sample.id!r} has no gold answer; its split's outputs are not public")
    gold = sample.output.strip()
    if task.splice_after:
        references = re.search(task.payload, sample.input, re.DOTALL)
        wanted = {task.label: references.group(1 + task.labels.index(_label(task, gold)))} if references else None
    else:
        wanted = {task.label: gold} | ({task.long: task.query(sample.input)} if task.labels else {})
    return wanted is not None and any(
        all(item.attributes[name].strip() == text.strip() for name, text in wanted.items())
        for item in sample.profile.events
    )


def _check_ids(predictions: Mapping[str, str], golds: Mapping[str, str]) -> None:
    if not golds:
        raise DataError("there are no gold answers to score against; give at least one")
    missing, extra = sorted(golds.keys() - predictions.keys()), sorted(predictions.keys() - golds.keys())
    if missing or extra:
        raise DataError(
            f"predictions and gold answers must have the same ids: {len(missing)} of {len(golds)} gold answers have no "
            f"prediction {missing[:SHOWN]}, {len(extra)} predictions have no gold answer {extra[:SHOWN]}"
        )


def _label(task: Task, gold: str, of: str = "") -> str:
    if gold.strip() not in task.labels:
        known = ", ".join(task.labels)
        raise DataError(f"{task.name}: the gold answer {gold!r}{of} is none of {known}; check the task")
    return gold.strip()


def _stars(task: Task, answer: str, gold: float) -> float:
    low, *_, high = map(float, task.labels)
    try:
        value = float(answer)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    return low if gold - low > high - gold else high


@cache
def _rouge() -> RougeScorer:
    return RougeScorer(list(ROUGE), use_stemmer=False)
