"""Answers without an LLM: a method that does not beat these shows little."""

from __future__ import annotations

import statistics
from collections import Counter

from persona.evaluation.floors import ItemBias
from persona.evaluation.lamp.domain import LampDomain
from persona.evaluation.lamp.sample import Sample
from persona.history import History

WORDS = 10
"""Words of a title."""


def floor_answers(domain: LampDomain, samples: list[Sample]) -> dict[str, dict[str, str]]:
    """Answers by sample id, of each floor that the task has.

    majority: the commonest training answer. Rating, in whole stars: the mean of the user's own, and user + item bias.
    Generation: the user's newest answer, and the first words of the input.
    """
    task = domain.task
    floors = {}
    if task.kind != "generation":
        counts = Counter(e.attributes[task.label] for h in domain.histories() for e in h.events)
        floors["majority"] = lambda sample: counts.most_common(1)[0][0]
    if task.kind == "rating":
        bias = ItemBias(domain.histories(), domain.recipe.source)
        floors["user_mean"] = lambda sample: _stars(task.labels, _mean(sample.profile))
        floors["user_item_bias"] = lambda sample: _stars(
            task.labels, bias.predict(sample.profile, sample.target.item_id)
        )
    if task.kind == "generation":
        floors["newest_own"] = lambda sample: sample.profile.events[-1].attributes[task.label]
        floors["first_words"] = lambda sample: " ".join(task.query(sample.input).split()[:WORDS])
    return {name: {sample.id: floor(sample) for sample in samples} for name, floor in floors.items()}


def _mean(profile: History) -> float:
    return statistics.fmean(event.value for event in profile.events if event.value is not None)


def _stars(labels: tuple[str, ...], value: float) -> str:
    return min(labels, key=lambda label: abs(float(label) - value))
