"""The rows of the table: each method turns a question at a cut into what the LLM reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from persona.encoders import UserState
from persona.evaluation.cutting import UserText, beginning, fitting, room, size
from persona.evaluation.likelihood import Request
from persona.history import History
from persona.history.render import render_history
from persona.injection import PersonalizedLM
from persona.training.questions import Cut, Question
from persona.training.recipe import Domain


@dataclass(frozen=True)
class Asked:
    """One question, at one cut of one user."""

    user: int
    """Index of the user among those asked."""
    cut: int
    """Index of the cut."""
    question: Question
    """What is asked."""


@dataclass
class Sample:
    """The evaluation: cuts of users who took no part in training, and every question asked at them."""

    users: list[str]
    """Users with at least one question."""
    cuts: list[Cut]
    """What each method may see, and what came after."""
    asked: list[Asked]
    """All questions."""
    stranger: list[int]
    """For each cut, the cut of another user whose tokens the shuffled-user control puts in."""


def draw_sample(domain: Domain, users: Sequence[str], seed: int) -> Sample:
    """The same for the same seed; raises nothing and asks nothing about users with too short a history."""
    pairs = domain.cuts(list(users))
    kept: list[str] = []
    cuts, asked, owner = [], [], []
    for number, (user, cut) in enumerate(pairs):
        rng = np.random.default_rng([seed, 2, number])
        questions = domain.questions(cut, rng, training=False)
        if not questions:
            continue
        if not kept or kept[-1] != user:
            kept.append(user)
        owner.append(len(kept) - 1)
        asked += [Asked(len(kept) - 1, len(cuts), q) for q in questions]
        cuts.append(cut)
    order = np.random.default_rng([seed, 3]).permutation(len(kept))
    follower = {int(a): int(b) for a, b in zip(order, np.roll(order, 1))}  # a derangement of users
    of_user: dict[int, list[int]] = {}
    for cut, user in enumerate(owner):
        of_user.setdefault(user, []).append(cut)
    stranger = []
    for cut, user in enumerate(owner):
        others = of_user[follower[user]]
        stranger.append(others[of_user[user].index(cut) % len(others)])
    return Sample(kept, cuts, asked, stranger)


class Methods:
    """Requests for each method by name, in the order of `sample.asked`."""

    def __init__(self, domain: Domain, model: PersonalizedLM, control: PersonalizedLM | None, sample: Sample):
        self.domain, self.model, self.control, self.sample = domain, model, control, sample
        self.states = model.encoder.read([c.history for c in sample.cuts])

    @cached_property
    def rooms(self) -> list[int]:
        """For each cut, the tokens that the LLM can read of a text before every question asked there."""
        questions = [[] for _ in self.sample.cuts]
        for asked in self.sample.asked:
            questions[asked.cut].append(asked.question)
        return [room(self.model, own) for own in questions]

    @cached_property
    def texts(self) -> list[UserText]:
        """The history of each cut, without its oldest events where it is longer than the LLM can read."""
        sources, tokenizer = self.domain.recipe.sources, self.model.template.tokenizer
        return [fitting(c.history, sources, most, tokenizer) for c, most in zip(self.sample.cuts, self.rooms)]

    @property
    def counts(self) -> list[int]:
        """Prefix lengths of the K tokens that get a row: powers of two up to K, and K."""
        most = self.model.encoder.config.tokens
        return [k for k in (1, 2, 4, 8, 16, 32) if k < most] + [most]

    def all(self) -> Iterator[tuple[str, list[Request]]]:
        """(name, requests) of every method that asks the LLM."""
        most = self.model.encoder.config.tokens
        yield "no_history", self.plain()
        if self.control is not None:
            empty = self.control.encoder.read([History("nobody")])[0]
            yield "learned_prompt", self.soft(self.control, [empty] * len(self.sample.cuts), most)
        yield "shuffled_user", self.soft(self.model, [self.states[i] for i in self.sample.stranger], most)
        yield "text_same_budget", self.text(self.budget_texts(most, whole=True))
        for count in self.counts:
            yield f"ours_k{count}", self.soft(self.model, self.states, count)
        yield "text_full", self.text(self.texts)

    def plain(self) -> list[Request]:
        """The question alone."""
        return [Request(a.question.prompt, a.question.options) for a in self.sample.asked]

    def text(self, texts: Sequence[UserText]) -> list[Request]:
        """A text about the user, then the question, in one user turn."""
        return [
            Request(f"{texts[a.cut].text}\n{a.question.prompt}", a.question.options, cut=texts[a.cut].cut)
            for a in self.sample.asked
        ]

    def soft(self, model: PersonalizedLM, states: Sequence[UserState], count: int, batch: int = 256) -> list[Request]:
        """User tokens of `states[cut]`, the first `count` of them, then the question."""
        requests = []
        for start in range(0, len(self.sample.asked), batch):
            part = self.sample.asked[start : start + batch]
            rows = model.soft_rows([states[a.cut] for a in part], [a.question.prompt for a in part], count)
            requests += [Request(a.question.prompt, a.question.options, r) for a, r in zip(part, rows)]
        return requests

    def budget_texts(self, budget: int, *, whole: bool = False) -> list[UserText]:
        """As many of the newest events as fit in `budget` tokens of text.

        Where not even one fits, the beginning of the newest; with `whole` all of it, as far as the LLM can read it.
        """
        tokenizer, result = self.model.template.tokenizer, []
        for cut, readable in zip(self.sample.cuts, self.rooms):
            chosen, most = "", min(budget, readable)
            for count in range(1, len(cut.history.timed) + 1):
                newest = cut.history.of(cut.history.timed[-count:])
                text = render_history(newest, self.domain.recipe.sources)
                if chosen and size(text, tokenizer) > most:
                    break
                chosen = text
            kept = beginning(chosen, readable if whole else most, tokenizer)
            result.append(UserText(kept, kept != chosen))
        return result


def questions_cut(requests: Sequence[Request]) -> int:
    """Before how many questions the text about the user was too long and is cut."""
    return sum(r.cut for r in requests)


def tokens_of(model: PersonalizedLM, requests: Sequence[Request]) -> float:
    """Mean tokens of a prompt, soft rows and what cross-attention reads counted as one each."""
    prompts = [model.template.prompt(r.messages, 0 if r.rows is None else len(r.rows)) for r in requests]
    return float(np.mean([len(p.ids) + p.memory for p in prompts]))


def token_counts(prompt: float, plain: float, cut: int) -> dict:
    """Tokens in a result: of a prompt, what the user adds to the `plain` one, and the questions whose text is cut."""
    found = {"prompt": round(prompt, 1), "user": round(prompt - plain, 1)}
    return found | {"questions_cut": cut} if cut else found


def cut_note(name: str, cut: int, questions: int) -> str:
    """What is said of a method whose texts were too long."""
    return f"{name}: the text about the user was too long before {cut} of {questions} questions, and is cut there"
