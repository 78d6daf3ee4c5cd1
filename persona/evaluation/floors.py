"""What simple statistics reach without any LM: a table whose rows do not beat these shows little."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from persona.evaluation.collaborative import Ease, ItemCosine
from persona.history import History
from persona.training.questions import NO, YES, Cut, Question, build_questions
from persona.training.recipe import Domain


class Floors:
    """Fitted on training users: majority answers, user + item bias for numbers, item cosine for the next item.

    A floor that the training users give nothing to fit with answers None to that question.
    """

    def __init__(self, domain: Domain):
        self.domain = domain
        self.specs = domain.recipe.questions
        histories = [domain.histories[u] for u in domain.train]
        events = [e for h in histories for e in h.events]
        valued = {e.source for e in events if e.value is not None}
        with_ids = {e.source for e in events if e.item_id is not None}
        specs = self.specs.items()
        self._bias = {
            n: ItemBias(histories, s.source) for n, s in specs if s.kind == "next_value" and s.source in valued
        }
        chosen = {s.source for _, s in specs if s.kind == "next_item" and s.source in with_ids}
        self._cosine = {source: ItemCosine(histories, source) for source in chosen}
        self._ease = {source: Ease(histories, source) for source in chosen}
        self._majority = {n: self._commonest(n) for n, s in specs if s.kind != "next_item" and not s.choices}

    def _commonest(self, name: str) -> str | None:
        """The commonest right answer among the evaluation questions of training users; None if there are none."""
        rng, counts = np.random.default_rng(0), Counter()
        for _, cut in self.domain.cuts(self.domain.train):
            spec = {name: self.specs[name]}
            counts.update(q.answer for q in build_questions(cut, spec, self.domain.catalogue, rng, training=False))
        return counts.most_common(1)[0][0] if counts else None

    def majority(self, question: Question) -> dict[str, float] | None:
        """Score 1 for the commonest answer; for questions that choose an item, odds of yes by popularity.

        None where training users answer nothing, or never met the item.
        """
        spec = self.specs[question.task]
        if question.options == (YES, NO):
            item = self.domain.catalogue.items.get(spec.source, {}).get(question.item_id)
            return None if item is None else {YES: float(item.count), NO: 0.0}
        if spec.choices:
            return self.domain.catalogue.frequencies(question.task, question.options)
        answer = self._majority[question.task]
        return None if answer is None else {answer: 1.0}

    def bias(self, question: Question, cut: Cut, item_id: str | None) -> dict[str, float] | None:
        """Scores of the number answers by closeness to user + item bias; None for other questions or without a fit."""
        model = self._bias.get(question.task)
        if model is None:
            return None
        guess = model.predict(cut.history, item_id)
        return {option: -abs(float(option) - guess) for option in question.options}

    def cosine(self, question: Question, cut: Cut, item_id: str | None) -> dict[str, float] | None:
        """Odds of yes by the item's cosine to the history's items; None for other questions or without a fit."""
        return self._odds(self._cosine, question, cut, item_id)

    def ease(self, question: Question, cut: Cut, item_id: str | None) -> dict[str, float] | None:
        """Odds of yes by EASE's score of the item; None for other questions or without a fit."""
        return self._odds(self._ease, question, cut, item_id)

    def _odds(self, models: dict, question: Question, cut: Cut, item_id: str | None) -> dict[str, float] | None:
        spec = self.specs[question.task]
        if spec.kind != "next_item" or spec.source not in models or question.options != (YES, NO):
            return None
        return {YES: models[spec.source].score(cut.history.events, item_id), NO: 0.0}


class ItemBias:
    """Value = mean + item bias + user bias, both shrunk (Koren et al. 2009); the user's from the history alone."""

    def __init__(self, histories: Iterable[History], source: str, shrink: float = 5.0):
        self.source, self.shrink = source, shrink
        events = [e for h in histories for e in h.events if e.source == source and e.value is not None]
        self.mean = float(np.mean([e.value for e in events]))
        residuals = defaultdict(list)
        for event in events:
            residuals[event.item_id].append(event.value - self.mean)
        self.item = {i: sum(r) / (len(r) + shrink) for i, r in residuals.items()}

    def predict(self, history: History, item_id: str | None) -> float:
        """Expected value of `item_id` for this user."""
        own = [
            e.value - self.mean - self.item.get(e.item_id, 0.0)
            for e in history.events
            if e.source == self.source and e.value is not None
        ]
        return self.mean + self.item.get(item_id, 0.0) + sum(own) / max(len(own) + self.shrink, 1)
