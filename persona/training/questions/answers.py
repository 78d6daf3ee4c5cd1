"""True answers: what a history, or what came after it, says to a question. One function for each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from persona.history import Event, History
from persona.training.questions.cuts import Cut
from persona.training.questions.spec import QuestionSpec

ARROW = " -> "
FARTHEST = 3
"""How many places back an nth_attribute question goes, unless told."""


@dataclass(frozen=True)
class TrueAnswer:
    """A right answer, and what its prompt is filled with."""

    answer: str
    """The answer."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Values of the prompt's places."""
    item_id: str | None = None
    """The item asked about."""


def true_answers(spec: QuestionSpec, cut: Cut, rng: np.random.Generator, *, training: bool) -> Iterator[TrueAnswer]:
    """All right answers that a cut gives; a tie gives none. Not for next_item, whose answer depends on the item."""
    yield from _KINDS[spec.kind](spec, cut, rng, training)


def event_answer(event: Event, spec: QuestionSpec) -> str | None:
    """What one event says to a question of this kind, if anything."""
    if event.source != spec.source:
        return None
    if spec.kind == "next_value":
        return None if event.value is None else f"{event.value:g}"
    value = event.attributes.get(spec.attribute) if spec.attribute else None
    return None if value is None else str(value)


def next_events(spec: QuestionSpec, cut: Cut, rng: np.random.Generator, training: bool) -> list[Event]:
    """The events asked about: the very next ones, or in training some of the next `horizon`."""
    future = [e for e in cut.future if e.source == spec.source]
    if spec.kind == "next_item":
        future = [e for e in future if e.item_id is not None and (e.source, e.item_id) not in cut.met]
    if training:
        return [future[i] for i in rng.permutation(min(len(future), spec.horizon))[: spec.per_cut]]
    return future[: spec.per_cut]


def _values(spec: QuestionSpec, history: History) -> list[str]:
    """Values of the attribute in the events that count, oldest first."""
    chosen = [e for e in history.events if event_answer(e, spec) is not None]
    if spec.min_value is not None:
        chosen = [e for e in chosen if e.value is not None and e.value >= spec.min_value]
    return [event_answer(e, spec) for e in chosen]


def _commonest(values: list[str], top: int) -> list[str]:
    """The `top` commonest values in alphabetical order; none when a tie leaves open which they are."""
    counts = Counter(values).most_common(top + 1)
    if len(counts) < top or (len(counts) > top and counts[top - 1][1] == counts[top][1]):
        return []
    return sorted(value for value, _ in counts[:top])


def _top_attribute(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    values = _values(spec, cut.history)
    if found := _commonest(values[-spec.last :] if spec.last else values, spec.top):
        yield TrueAnswer(", ".join(found))


def _nth_attribute(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    values = _values(spec, cut.history)
    for n in rng.permutation(min(len(values), spec.last or FARTHEST))[: spec.per_cut]:
        yield TrueAnswer(values[-1 - n], {"{n}": str(n + 1)})


def _count_attribute(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    values = _values(spec, cut.history)
    counts = Counter(values[-spec.last :] if spec.last else values)
    if not counts:
        return
    names = sorted(counts)
    weights = np.array([counts[name] for name in names], float)  # else most answers would be 1
    for i in rng.choice(len(names), min(len(names), spec.per_cut), replace=False, p=weights / weights.sum()):
        yield TrueAnswer(str(counts[names[i]]), {"{value}": names[i]})


def _trajectory(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    parts = [_commonest(list(part), 1) for part in np.array_split(_values(spec, cut.history), spec.parts)]
    if all(parts):
        yield TrueAnswer(ARROW.join(part[0] for part in parts))


def _next_attribute(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    for event in next_events(spec, cut, rng, training):
        if (answer := event_answer(event, spec)) is not None:
            yield TrueAnswer(answer)


def _next_value(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    for event in next_events(spec, cut, rng, training):
        if (answer := event_answer(event, spec)) is not None:
            yield TrueAnswer(answer, {"{item}": event.text or event.item_id or ""}, event.item_id)


_KINDS: dict[str, Callable] = {
    "top_attribute": _top_attribute,
    "nth_attribute": _nth_attribute,
    "count_attribute": _count_attribute,
    "trajectory": _trajectory,
    "next_attribute": _next_attribute,
    "next_value": _next_value,
}
