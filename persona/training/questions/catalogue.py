"""`Catalogue`: what training users met and how often, from which negatives and offered answers are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

import numpy as np

from persona.errors import RecipeError
from persona.history import History
from persona.training.questions.answers import event_answer, true_answers
from persona.training.questions.cuts import Cut
from persona.training.questions.spec import NO, YES, QuestionSpec


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

    `cuts` of the training users say how often each answer is right; questions with `choices` need them. Wrong answers
    are offered as often as they are right, so that being common speaks neither for an answer nor against it.
    """

    def __init__(
        self,
        histories: Iterable[History],
        specs: Mapping[str, QuestionSpec],
        bins: int = 20,
        cuts: Iterable[Cut] = (),
    ):
        self._specs = specs
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
                    answer = event_answer(event, spec)
                    if answer is not None:
                        answers[name][answer] += 1
        self.items = items
        self._right = self._count(cuts)
        self.answers: dict[str, tuple[str, ...]] = {n: self._answers(n, s, answers[n]) for n, s in specs.items()}
        """All answers of each question; of those made of several values, the ones that are right for somebody."""
        self._bins: dict[str, list[list[str]]] = {}
        self._bin_of: dict[str, dict[str, int]] = {}
        for source, known in items.items():
            ranked = sorted(known.values(), key=lambda i: (-i.count, i.item_id))
            ends = np.cumsum([i.count for i in ranked]) / sum(i.count for i in ranked)
            which = np.minimum((ends * bins - 1e-9).astype(int), bins - 1)
            self._bins[source] = [[i.item_id for i, b in zip(ranked, which) if b == n] for n in range(bins)]
            self._bin_of[source] = {i.item_id: int(b) for i, b in zip(ranked, which)}

    def _count(self, cuts: Iterable[Cut]) -> dict[str, Counter]:
        """How often each answer is right, for the questions with `choices`."""
        rng = np.random.default_rng(0)
        right = {name: Counter() for name, spec in self._specs.items() if spec.choices}
        for cut in cuts if right else ():
            for name, counts in right.items():
                counts.update(t.answer for t in true_answers(self._specs[name], cut, rng, training=False))
        return right

    def _answers(self, name: str, spec: QuestionSpec, found: Counter) -> tuple[str, ...]:
        if spec.kind == "next_item":
            if spec.source not in self.items:
                raise RecipeError(
                    f"questions.{name}: no training event of source {spec.source!r} has an item id; "
                    "name its column as `item_id` in the reader"
                )
            return YES, NO
        if not found:
            raise RecipeError(
                f"questions.{name}: no training event of source {spec.source!r} has an answer; "
                "check the source, the attribute and min_value"
            )
        if not spec.choices:
            return tuple(sorted(found))
        if len(self._right[name]) < spec.choices:
            raise RecipeError(
                f"questions.{name}: choices is {spec.choices}, but the training users' cuts have only "
                f"{len(self._right[name])} different answers; lower it, or bring more users"
            )
        return tuple(sorted(self._right[name]))

    def options(self, name: str, answer: str, rng: np.random.Generator) -> tuple[str, ...]:
        """Answers to offer, `answer` among them in a random place; none for an answer that is never right."""
        spec, known = self._specs[name], self.answers[name]
        if answer not in known or not spec.choices:
            return known if answer in known else ()
        others = [a for a in known if a != answer]
        counts = np.array([self._right[name][a] for a in others], float)
        offered = [others[i] for i in rng.choice(len(others), spec.choices - 1, replace=False, p=counts / counts.sum())]
        offered.insert(int(rng.integers(spec.choices)), answer)
        return tuple(offered)

    def frequencies(self, name: str, options: Iterable[str]) -> dict[str, float]:
        """How often each of `options` is right among training users, for a question with `choices`."""
        return {option: float(self._right[name][option]) for option in options}

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
