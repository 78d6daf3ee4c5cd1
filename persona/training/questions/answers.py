"""True answers: what a history, or what came after it, says to a question. One function for each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
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
    support: tuple[Event, ...] = ()
    """The events that make the answer right: of the history, or of the future for kinds that ask what comes next."""


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
    return str(value).removesuffix(".0") if isinstance(value, float) else value


def next_events(spec: QuestionSpec, cut: Cut, rng: np.random.Generator, training: bool) -> list[Event]:
    """The events asked about: the very next ones, or in training some of the next `horizon`."""
    future = [e for e in cut.future if e.source == spec.source]
    if spec.kind == "next_item":
        future = [e for e in future if e.item_id is not None and (e.source, e.item_id) not in cut.met]
    if training:
        return [future[i] for i in rng.permutation(min(len(future), spec.horizon))[: spec.per_cut]]
    return future[: spec.per_cut]


def _counted(spec: QuestionSpec, history: History) -> list[tuple[Event, str]]:
    """The events that count, oldest first, each with its value of the attribute."""
    answers = ((event, event_answer(event, spec)) for event in history.events)
    chosen = [(event, value) for event, value in answers if value is not None]
    if spec.min_value is not None:
        chosen = [(e, value) for e, value in chosen if e.value is not None and e.value >= spec.min_value]
    return chosen


def _newest(spec: QuestionSpec, history: History) -> list[tuple[Event, str]]:
    """The newest `last` of the events that count, or all of them."""
    counted = _counted(spec, history)
    return counted[-spec.last :] if spec.last else counted


def _with_value(counted: Sequence[tuple[Event, str]], values: Container[str]) -> tuple[Event, ...]:
    return tuple(event for event, value in counted if value in values)


def _commonest(counted: Sequence[tuple[Event, str]], top: int) -> list[str]:
    """The `top` commonest values in alphabetical order; none when a tie leaves open which they are."""
    counts = Counter(value for _, value in counted).most_common(top + 1)
    if len(counts) < top or (len(counts) > top and counts[top - 1][1] == counts[top][1]):
        return []
    return sorted(value for value, _ in counts[:top])


def _top_attribute(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    counted = _newest(spec, cut.history)
    if found := _commonest(counted, spec.top):
        yield TrueAnswer(", ".join(found), support=_with_value(counted, found))


def _nth_attribute(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    counted = _counted(spec, cut.history)
    for n in rng.permutation(min(len(counted), spec.last or FARTHEST))[: spec.per_cut]:
        event, value = counted[-1 - n]
        yield TrueAnswer(value, {"{n}": str(n + 1)}, support=(event,))


def _count_attribute(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    counted = _newest(spec, cut.history)
    counts = Counter(value for _, value in counted)
    if not counts:
        return
    names = sorted(counts)
    weights = np.array([counts[name] for name in names], float)  # else most answers would be 1
    for i in rng.choice(len(names), min(len(names), spec.per_cut), replace=False, p=weights / weights.sum()):
        support = _with_value(counted, (names[i],))
        yield TrueAnswer(str(counts[names[i]]), {"{value}": names[i]}, support=support)


def _trajectory(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    counted = _counted(spec, cut.history)
    parts = [[counted[i] for i in part] for part in np.array_split(np.arange(len(counted)), spec.parts)]
    found = [_commonest(part, 1) for part in parts]
    if all(found):
        support = (event for part, value in zip(parts, found) for event in _with_value(part, value))
        yield TrueAnswer(ARROW.join(value[0] for value in found), support=tuple(support))


def _next_attribute(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    for event in next_events(spec, cut, rng, training):
        if (answer := event_answer(event, spec)) is not None:
            yield TrueAnswer(answer, support=(event,))


def _next_value(spec, cut, rng, training) -> Iterator[TrueAnswer]:
    for event in next_events(spec, cut, rng, training):
        if (answer := event_answer(event, spec)) is not None:
            yield TrueAnswer(answer, {"{item}": event.text or event.item_id or ""}, event.item_id, (event,))


_KINDS: dict[str, Callable] = {
    "top_attribute": _top_attribute,
    "nth_attribute": _nth_attribute,
    "count_attribute": _count_attribute,
    "trajectory": _trajectory,
    "next_attribute": _next_attribute,
    "next_value": _next_value,
}
