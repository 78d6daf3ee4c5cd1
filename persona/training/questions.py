"""Questions about a user, made by rule from a history and from what came after it.

A recipe declares them (`QuestionSpec`); the same questions train an adapter, train a reference LM and make the
evaluation table. Understanding questions (`top_attribute`) are answered by the history, predictive ones
(`next_item`, `next_value`) by events after the cut, which no method ever sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

from persona.errors import RecipeError
from persona.history import Event, History
from persona.history.source import STRICT

YES, NO = "yes", "no"


@dataclass(frozen=True)
class QuestionSpec:
    """One kind of question, as a recipe declares it."""

    __pydantic_config__ = STRICT

    kind: Literal["top_attribute", "next_item", "next_value"]
    """top_attribute: the commonest attribute value of the history. next_item: whether one item, new to the user, comes
    next, yes or no. next_value: the number the user will give an item."""
    source: str
    """The source whose events the question is about."""
    prompt: str
    """The user's turn. `{item}` stands for the text of the item asked about (next_item, next_value)."""
    attribute: str | None = None
    """top_attribute: which attribute is counted."""
    min_value: float | None = None
    """top_attribute: count only events with at least this value (liked films)."""
    last: int | None = None
    """top_attribute: count only the newest so many of them; None counts the whole history."""
    negatives: int = 3
    """next_item: unseen items of like popularity that compete with the true one in evaluation."""
    horizon: int = 1
    """next_item, next_value: training draws from this many next events; evaluation always takes the very next ones."""
    per_cut: int = 1
    """next_value: events asked about at one cut in evaluation."""

    def __post_init__(self):
        if self.kind == "top_attribute" and not self.attribute:
            raise ValueError("kind top_attribute needs `attribute`")
        if self.kind != "top_attribute" and "{item}" not in self.prompt:
            raise ValueError(f"kind {self.kind} needs `{{item}}` in its prompt")


@dataclass(frozen=True)
class Question:
    """One question with its gold answer and the closed set of answers it is scored against."""

    task: str
    """Name of its `QuestionSpec` in the recipe."""
    prompt: str
    """Text of the user's turn, and the instruction given to the encoder."""
    answer: str
    """Gold answer, one of `options`."""
    options: tuple[str, ...]
    """All answers allowed."""
    item_id: str | None = None
    """The item asked about, for the floors that use no text."""
    group: int = 0
    """Yes/no questions of one group compete: the group is right when its true item has the highest odds of yes."""


@dataclass(frozen=True)
class Item:
    """An item of the catalogue, as training users met it."""

    item_id: str
    """Its id."""
    text: str
    """Its text, as in the events."""
    count: int
    """Number of training events that act on it."""
    attributes: Mapping[str, str | float | None]
    """Its attributes, from the first event that had them."""


class Catalogue:
    """Items of each source and answers of each question, learned from training users alone.

    Items are sorted by popularity and cut into `bins` bins of about equal numbers of events; negatives come from the
    bin of the true item, each drawn in proportion to its events, as true items are. Bins are fixed: a window of ranks
    around the true item would make the true item the median of the options, and "take the middle one" would win.
    """

    def __init__(self, histories: Iterable[History], specs: Mapping[str, QuestionSpec], bins: int = 20):
        items: dict[str, dict[str, Item]] = {}
        answers: dict[str, Counter] = {name: Counter() for name in specs}
        for history in histories:
            for event in history.events:
                if event.item_id is not None:
                    known = items.setdefault(event.source, {})
                    old = known.get(event.item_id)
                    known[event.item_id] = Item(
                        event.item_id,
                        (old and old.text) or event.text or event.item_id,
                        (old.count if old else 0) + 1,
                        (old and old.attributes) or event.attributes,
                    )
                for name, spec in specs.items():
                    answer = _answer_of(event, spec)
                    if answer is not None:
                        answers[name][answer] += 1
        self.items = items
        self.answers: dict[str, tuple[str, ...]] = {}
        for name, spec in specs.items():
            if spec.kind == "next_item" and spec.source not in items:
                raise RecipeError(
                    f"questions.{name}: no training event of source {spec.source!r} has an item id; "
                    "name its column as `item_id` in the reader"
                )
            self.answers[name] = (YES, NO) if spec.kind == "next_item" else tuple(sorted(answers[name]))
            if not self.answers[name]:
                raise RecipeError(
                    f"questions.{name}: no training event of source {spec.source!r} has an answer; "
                    "check the source, the attribute and min_value"
                )
        self._bins: dict[str, list[list[str]]] = {}
        self._bin_of: dict[str, dict[str, int]] = {}
        for source, known in items.items():
            ranked = sorted(known.values(), key=lambda i: (-i.count, i.item_id))
            ends = np.cumsum([i.count for i in ranked]) / sum(i.count for i in ranked)
            which = np.minimum((ends * bins - 1e-9).astype(int), bins - 1)
            self._bins[source] = [[i.item_id for i, b in zip(ranked, which) if b == n] for n in range(bins)]
            self._bin_of[source] = {i.item_id: int(b) for i, b in zip(ranked, which)}

    def negatives(
        self, source: str, item_id: str, seen: Set[tuple[str, str]], count: int, rng: np.random.Generator
    ) -> list[str]:
        """`count` items of the bin of `item_id`, none of them in `seen`; fewer when the bin runs out."""
        bin_number = self._bin_of.get(source, {}).get(item_id)
        if bin_number is None:
            return []
        pool = [i for i in self._bins[source][bin_number] if (source, i) not in seen and i != item_id]
        counts = np.array([self.items[source][i].count for i in pool], float)
        if len(pool) < count:
            return pool
        return [pool[i] for i in rng.choice(len(pool), count, replace=False, p=counts / counts.sum())]


def _answer_of(event: Event, spec: QuestionSpec) -> str | None:
    if event.source != spec.source:
        return None
    if spec.kind == "top_attribute":
        value = event.attributes.get(spec.attribute)
        return None if value is None else str(value)
    if spec.kind == "next_value":
        return None if event.value is None else f"{event.value:g}"
    return None


@dataclass(frozen=True)
class Cut:
    """A user at a point in time: what a method may see, and what came after."""

    history: History
    """Events strictly before the cut, at most the recipe's window."""
    future: tuple[Event, ...]
    """Events at or after the cut, oldest first."""
    met: frozenset[tuple[str, str]]
    """(source, item id) of all items the user touched before the cut, window or not; never asked about as next."""
    seen: frozenset[tuple[str, str]]
    """The same before or after the cut; never used as negatives."""


def make_cut(history: History, at: int, window: int) -> Cut:
    """Cuts before timed event number `at`; events of the same time as that event all fall into the future."""
    timed = history.timed
    before = history.until(timed[at].timestamp)
    return Cut(before.last(window), timed[len(before.timed) :], _items(before), _items(history))


def _items(history: History) -> frozenset[tuple[str, str]]:
    return frozenset((e.source, e.item_id) for e in history.events if e.item_id is not None)


def evaluation_cuts(history: History, window: int, count: int, min_events: int) -> list[Cut]:
    """At most `count` cuts, evenly spread over the events after the first `min_events`; never two alike."""
    size = len(history.timed)
    if size <= min_events:
        return []
    cuts = {}
    for at in np.linspace(min_events, size - 1, count).round().astype(int):
        cut = make_cut(history, int(at), window)
        if len(cut.history.timed) >= min_events:
            cuts[len(cut.future)] = cut
    return list(cuts.values())


def build_questions(
    cut: Cut,
    specs: Mapping[str, QuestionSpec],
    catalogue: Catalogue,
    rng: np.random.Generator,
    *,
    training: bool,
) -> list[Question]:
    """All questions that this cut can answer; a tie for the commonest attribute asks nothing."""
    questions: list[Question] = []
    for name, spec in specs.items():
        future = [e for e in cut.future if e.source == spec.source]
        if spec.kind == "top_attribute":
            questions += _top_attribute(name, spec, cut.history, catalogue)
            continue
        if spec.kind == "next_item":
            future = [e for e in future if e.item_id is not None and (e.source, e.item_id) not in cut.met]
        if training:
            picked = [future[i] for i in rng.permutation(min(len(future), spec.horizon))[: spec.per_cut]]
        else:
            picked = future[: spec.per_cut]
        if spec.kind == "next_item":
            questions += _next_item(name, spec, picked, cut.seen, catalogue, rng, 1 if training else spec.negatives)
        else:
            questions += _next_value(name, spec, picked, catalogue)
    return questions


def _top_attribute(name: str, spec: QuestionSpec, history: History, catalogue: Catalogue) -> list[Question]:
    chosen = [e for e in history.events if _answer_of(e, spec) is not None]
    if spec.min_value is not None:
        chosen = [e for e in chosen if e.value is not None and e.value >= spec.min_value]
    counts = Counter(_answer_of(e, spec) for e in chosen[-spec.last if spec.last else None :]).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]) or counts[0][0] not in catalogue.answers[name]:
        return []
    return [Question(name, spec.prompt, counts[0][0], catalogue.answers[name])]


def _next_item(name, spec, picked: Sequence[Event], seen, catalogue: Catalogue, rng, count: int) -> list[Question]:
    questions = []
    for group, event in enumerate(picked):
        others = catalogue.negatives(spec.source, event.item_id, seen, count, rng)
        if len(others) < count:
            continue
        items = catalogue.items[spec.source]
        for item_id in [event.item_id, *others]:
            prompt = spec.prompt.replace("{item}", items[item_id].text)
            answer = YES if item_id == event.item_id else NO
            questions.append(Question(name, prompt, answer, (YES, NO), item_id, group))
    return questions


def _next_value(name, spec, picked: Sequence[Event], catalogue: Catalogue) -> list[Question]:
    questions = []
    for event in picked:
        answer = _answer_of(event, spec)
        if answer in catalogue.answers[name]:
            prompt = spec.prompt.replace("{item}", event.text or event.item_id or "")
            questions.append(Question(name, prompt, answer, catalogue.answers[name], event.item_id))
    return questions
