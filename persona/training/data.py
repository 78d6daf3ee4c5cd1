"""Training examples for an adapter: a history at a random cut, with questions about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import Dataset

from persona.encoders.features import EventBatch
from persona.errors import DataError
from persona.history import History
from persona.injection.model import PersonalizedLM
from persona.training.configs import TrainingConfig
from persona.training.noise import MOST, fitting, foreign_sources, with_noise
from persona.training.processes import of_first
from persona.training.questions import NO, YES, Question
from persona.training.questions.cuts import Cut
from persona.training.recipe import Domain

STRANGERS = 8
"""Training users whose events are mixed into one history, at the most."""
PATIENCE = 1000
"""Histories drawn in a row without a question before a recipe is called wrong."""


@dataclass(frozen=True)
class Example:
    """One history and the questions asked about it."""

    history: History
    """What the encoder may see."""
    questions: tuple[Question, ...]
    """At least one."""
    index: int = 0
    """Its number in `Examples`."""
    foreign: frozenset[str] = frozenset()
    """Sources of which the history holds other users' events; these are not foretold."""


class Examples(Dataset):
    """Example `i` is drawn from its own seed, so a run can be repeated and resumed; there are `size` of them.

    `without_history` empties every history: what is trained then is a learned prompt that knows the questions and the
    catalogue but no user, the control that tells personalisation from task tuning.
    """

    def __init__(self, domain: Domain, size: int, *, without_history: bool = False):
        self.domain, self.size, self.without_history = domain, size, without_history

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        recipe = self.domain.recipe
        rng = np.random.default_rng([recipe.training.seed, 1, index])
        share = recipe.training.foreign_share if len(recipe.sources) > 1 else 0.0
        foreign: frozenset[str] = frozenset()
        for _ in range(PATIENCE):
            cut = self.domain.training_cut(rng)
            if share and rng.random() < share:
                cut, questions, foreign = self._disturbed(cut, rng)
            else:
                questions, foreign = self.domain.questions(cut, rng, training=True), frozenset()
            if questions:
                break
        else:
            raise DataError(f"none of {PATIENCE} training histories answers a question; check the recipe's questions")
        most = recipe.training.questions_per_history
        picked = tuple(questions[i] for i in rng.permutation(len(questions))[:most])
        return Example(History(cut.history.user) if self.without_history else cut.history, picked, index, foreign)

    def _disturbed(self, cut: Cut, rng: np.random.Generator) -> tuple[Cut, list[Question], frozenset[str]]:
        """The cut with other users' events among its newest, what can still be asked, and the sources of these events.

        They all fit the window. What is asked is answered by the history as it was.
        """
        recipe, users, histories = self.domain.recipe, self.domain.train, self.domain.histories
        share = rng.random() * MOST
        clean = replace(cut, history=cut.history.last(fitting(recipe.window, share)))
        questions = self.domain.questions(clean, rng, training=True)
        strangers = {users[i] for i in rng.integers(len(users), size=STRANGERS)} - {cut.history.user}
        events = [event for user in sorted(strangers) for event in histories[user].timed]
        about = [recipe.questions[q.task].source for q in questions]
        own = about[rng.integers(len(about))] if about else ""
        foreign = foreign_sources({event.source for event in events}, own, rng)
        if not questions or not foreign:
            return clean, questions, frozenset()
        pool = [event for event in events if event.source in foreign]
        kept = [q for q, source in zip(questions, about) if source not in foreign]
        return replace(clean, history=with_noise(clean.history, pool, share, rng)), kept, foreign


@dataclass(frozen=True)
class Pairs:
    """(user and instruction, answer) pairs of a batch for the contrastive loss."""

    index: torch.Tensor
    """`[P]` which of the batch's questions."""
    answers: list[str]
    """Their P answers."""
    labels: torch.Tensor
    """`[P]` equal where the answers are, in every process alike."""
    count: int
    """User tokens that the embedding is the mean of."""


class Collator:
    """Examples to `PersonalizedLM.forward` arguments, and the pairs of the contrastive loss.

    Half the batches use all K tokens, half a random prefix. Answers that say nothing without their question, yes and
    no, make no pair.

    Which, the index of the first example decides, that of process 0 where there are several: batches are made ahead of
    the step that uses them, so with torch's generator a resumed run would draw other prefixes, and other dropout, than
    one that was never stopped.
    """

    def __init__(self, model: PersonalizedLM, config: TrainingConfig | None = None):
        self.model, self.config = model, config or TrainingConfig()

    def __call__(self, examples: Sequence[Example]) -> dict:
        model, most = self.model, self.model.encoder.config.tokens
        own = examples[0].index
        first = of_first(own, model.encoder.device)
        rng = np.random.default_rng([self.config.seed, 2, first])
        count = most if rng.random() < 0.5 else int(rng.integers(1, most + 1))
        if first != own:
            rng = np.random.default_rng([self.config.seed, 2, own])  # which instructions are withheld, each draws alone
        questions = [q for e in examples for q in e.questions]
        owner = [i for i, e in enumerate(examples) for _ in e.questions]
        template, device, config = model.template, model.encoder.device, self.config
        asked = None
        if config.answer_weight:
            asked = model.collate(
                [template.prompt(q.prompt, count) for q in questions],
                [template.answer(q.prompt, q.answer) for q in questions],
            )
        share = config.empty_share
        events = model.encoder.batch([e.history for e in examples])
        given = {
            "events": events,
            "instructions": ["" if share and rng.random() < share else q.prompt for q in questions],
            "owner": torch.tensor(owner, device=device),
            "batch": asked,
        }
        if any(example.foreign for example in examples):
            given["foretold"] = self._foretold(examples, events)
        return given | {"pairs": _pairs(questions, count, device)} if config.contrastive_weight else given

    def _foretold(self, examples: Sequence[Example], events: EventBatch) -> torch.Tensor:
        """`[B, N]` True at the items that the next-item loss is taken of: those of the user."""
        foretold = events.item > 0
        for row, example in enumerate(examples):
            for number, source in enumerate(self.model.encoder.vocabulary.sources, 1):
                if source in example.foreign:
                    foretold[row] &= events.source[row] != number
        return foretold


def _pairs(questions: Sequence[Question], count: int, device: torch.device) -> Pairs:
    index = [i for i, q in enumerate(questions) if q.options != (YES, NO)]
    answers = [questions[i].answer for i in index]
    return Pairs(
        torch.tensor(index, dtype=torch.long, device=device),
        answers,
        torch.tensor([crc32(answer.encode()) for answer in answers], dtype=torch.long, device=device),
        count,
    )
