"""Answers without an LLM: a method that does not beat these shows little."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace

from persona.evaluation.floors import ItemBias
from persona.evaluation.lamp.domain import LampDomain
from persona.evaluation.lamp.official import OfficialDomain
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import Task
from persona.history import History

WORDS = 10
"""Words of a title."""


def floor_answers(domain: LampDomain | OfficialDomain, samples: list[Sample]) -> dict[str, dict[str, str]]:
    """Answers by sample id, of each floor that the task has.

    majority: the commonest training answer. Rating, in whole stars: the mean of the user's own,
    and user + item bias where questions name items.
    Generation: the user's newest answer, and the first words of the input.
    """
    task = domain.task
    floors = {}
    if task.kind != "generation":
        counts = Counter(answer.strip() for answer in domain.training_answers())
        floors["majority"] = lambda sample: counts.most_common(1)[0][0]
    if task.kind == "rating":
        mean = statistics.fmean(map(float, domain.training_answers()))
        floors["user_mean"] = lambda sample: _stars(
            task.labels,
            statistics.fmean(e.value for e in _scored(task, sample.profile).events) if sample.profile else mean,
        )
    if task.kind == "rating" and all(sample.target and sample.target.item_id for sample in samples):
        bias = ItemBias([_scored(task, history) for history in domain.histories()], domain.recipe.source)
        floors["user_item_bias"] = lambda sample: _stars(
            task.labels, bias.predict(_scored(task, sample.profile), sample.target.item_id)
        )
    if task.kind == "generation":
        floors["newest_own"] = lambda sample: (
            sample.profile.events[-1].attributes[task.label] if sample.profile.events else ""
        )
        floors["first_words"] = lambda sample: " ".join(task.query(sample.input).split()[:WORDS])
    return {name: {sample.id: floor(sample) for sample in samples} for name, floor in floors.items()}


def _scored(task: Task, history: History) -> History:
    """The same events with their answers as values."""
    return history.of(replace(event, value=float(event.attributes[task.label])) for event in history.events)


def _stars(labels: tuple[str, ...], value: float) -> str:
    return min(labels, key=lambda label: abs(float(label) - value))
