"""UserQA triples: a user at a point in time, an instruction, and an answer that the user's own events support."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from persona.encoders import TextEncoder
from persona.errors import PersonaError
from persona.history import History
from persona.training.questions import Cut, Question, build_questions, make_cut
from persona.training.recipe import Domain

SPLITS = ("train", "validation", "test")
"""The parts of a domain, all of them split by user."""


@dataclass(frozen=True)
class UserQAConfig:
    """How many triples are made, and which. Raises `PersonaError` for a number that makes no sense."""

    per_user: int = 4
    """Points in time at which each training user is asked; fewer for a short history."""
    easy_share: float = 0.3
    """Share of the training split's easy triples that is kept; see `Triple.rank`. Hard ones all are."""
    seed: int = 0
    """Seed of points in time, questions, easy triples kept and wordings."""

    def __post_init__(self):
        if self.per_user < 1:
            raise PersonaError(f"--per-user must be at least 1, not {self.per_user}")
        if not 0 <= self.easy_share <= 1:
            raise PersonaError(f"--easy-share must be a share between 0 and 1, not {self.easy_share}")
        if self.seed < 0:
            raise PersonaError(f"--seed must not be negative, not {self.seed}")


@dataclass(frozen=True)
class Triple:
    """One history, instruction and answer."""

    user: str
    """Id of the user."""
    cut: Cut
    """What the user did before, which is the history, and after."""
    question: Question
    """Instruction, answer, the answers offered, and the events that support the right one."""
    rank: int | None
    """Place of the right answer among the offered ones by likeness to the history, as `answer_rank` finds it; 1 makes
    the triple easy. None for next_item, which asks yes or no."""


def triples(
    domain: Domain,
    split: str,
    config: UserQAConfig,
    encoder: TextEncoder,
    wordings: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Triple]:
    """All triples of a split, user by user, easy ones included; the same for the same seed.

    Training users are asked at random times, as in training. Validation and test users are asked what `persona bench
    table` asks them with this seed. Answers are always texts, never letters, whatever the recipe says. `wordings`
    names for each question the prompts to draw from, the recipe's own by default.
    """
    specs = domain.recipe.questions
    wordings = wordings or {name: (spec.prompt,) for name, spec in specs.items()}
    most = max((len(w) for w in wordings.values()), default=1)
    worded = [{n: replace(s, prompt=wordings[n][i % len(wordings[n])]) for n, s in specs.items()} for i in range(most)]
    draw = np.random.default_rng([config.seed, 7, SPLITS.index(split)])
    for user, cut, seed in _cuts(domain, split, config):
        rounds = [  # the same random draws each time, so that only the wording differs
            build_questions(cut, specs, domain.catalogue, np.random.default_rng(seed), training=split == "train")
            for specs in worded
        ]
        centre = history_vector(encoder, cut.history)
        for same in zip(*rounds):
            question = same[draw.integers(len(wordings[same[0].task]))]
            ranked = specs[question.task].kind != "next_item"
            yield Triple(user, cut, question, answer_rank(encoder, centre, question) if ranked else None)


def history_vector(encoder: TextEncoder, history: History) -> torch.Tensor:
    """Mean text vector `[dim]` of the events that have a text; zeros when there are none."""
    texts = [e.text for e in history.events if e.text]
    return encoder.vectors(texts).mean(0) if texts else torch.zeros(encoder.dim)


def answer_rank(encoder: TextEncoder, centre: torch.Tensor, question: Question) -> int:
    """Rank of the right answer among the options by the cosine of its text vector to `centre` `[dim]`.

    1 is best. Options that are as near count against it: what is told apart by nothing is not easy.
    """
    scores = encoder.vectors(question.options) @ centre  # [options]; the length of `centre` changes no rank
    return int((scores >= scores[question.options.index(question.answer)]).sum())


def _cuts(domain: Domain, split: str, config: UserQAConfig) -> Iterator[tuple[str, Cut, list[int]]]:
    """(user, cut, seed of its questions) of a split."""
    if split != "train":
        for number, (user, cut) in enumerate(domain.cuts(getattr(domain, split))):
            yield user, cut, [config.seed, 2, number]
        return
    for index, user in enumerate(domain.train):
        history = domain.histories[user]
        times = [e.timestamp for e in history.timed]
        starts = [i for i in range(1, len(times)) if times[i] > times[i - 1]]  # no two of them give the same cut
        chosen = np.random.default_rng([config.seed, 5, index]).permutation(starts)[: config.per_user]
        for number, at in enumerate(sorted(chosen), 1):
            yield user, make_cut(history, int(at), domain.recipe.window), [config.seed, 5, index, number]
