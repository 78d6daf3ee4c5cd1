"""A recipe: one YAML file that says how a domain's raw records become an adapter.

`load_recipe` reads it; `Domain` is a recipe applied to real records: histories, user split, catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import PositiveInt

from persona.encoders.config import EncoderConfig
from persona.errors import DataError, RecipeError
from persona.history import History, ReaderSpec, SourceSpec
from persona.history.config import load_config, read_mapping
from persona.history.readers import ReadReport, read_histories
from persona.history.render import check_sources
from persona.history.source import STRICT
from persona.training.configs import InjectionConfig, LMConfig, PretrainingConfig, SplitConfig, TrainingConfig
from persona.training.questions import (
    Catalogue,
    Cut,
    Question,
    QuestionSpec,
    build_questions,
    evaluation_cuts,
    make_cut,
)
from persona.training.trained_on import user_fingerprint


@dataclass(frozen=True)
class Recipe:
    """Everything persona needs to know about a domain."""

    __pydantic_config__ = STRICT

    name: str
    """Short name, used for folders and result files."""
    sources: dict[str, SourceSpec]
    """The streams a history mixes, by name."""
    readers: list[ReaderSpec]
    """How raw files become events of these sources."""
    questions: dict[str, QuestionSpec]
    """What is asked, in training and in evaluation."""
    description: str = ""
    """One line for the model card."""
    letters: bool = False
    """Offer the answers in the question, by letters; else the LLM gives the answer itself. See `lettered`."""
    window: PositiveInt = 50
    """Newest timed events a method may see at one cut, as text or as vectors alike."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """How users are divided."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The user encoder."""
    injection: InjectionConfig = field(default_factory=InjectionConfig)
    """How user tokens enter the LLM."""
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    """How the user encoder is pre-trained, where it is."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How the adapter is trained."""
    lm: LMConfig = field(default_factory=LMConfig)
    """The reference LM, when one is built."""

    def __post_init__(self):
        if self.letters and self.training.contrastive_weight:
            raise ValueError("letters and contrastive_weight: a letter says nothing without its question; drop one")
        if max(self.training.contrastive_dims, default=0) > self.encoder.width:
            raise ValueError(
                f"contrastive_dims are {self.training.contrastive_dims}, but an embedding has {self.encoder.width}"
            )
        if self.encoder.max_events != self.window:
            raise ValueError(
                f"window is {self.window} and encoder.max_events {self.encoder.max_events}: make them equal, so that "
                "training, tables and serving read the same part of a history"
            )
        for kind, names in (
            ("readers", [r.source for r in self.readers]),
            ("questions", [q.source for q in self.questions.values()]),
        ):
            for name in names:
                if name not in self.sources:
                    raise ValueError(f"{kind} name the source {name!r}, but `sources` has only {sorted(self.sources)}")
        check_sources(self.sources, self.readers)


def load_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; `RecipeError` names the file and the field. `changes` as in `load_config`."""
    if "task" in read_mapping(path):
        raise RecipeError(
            f"{path}: has a task, so it is a recipe in LaMP's form; `persona bench lamp`, `persona lm lamp` and "
            "`persona data check` take it"
        )
    return load_config(Recipe, path, changes)


class Domain:
    """A recipe with its records read: histories, the split of users, and the catalogue of the training users.

    Raises `DataError` when the records hold too few users to split, or no training user with a past and a future, and
    `RecipeError` for a question that nothing answers; both say what was read.
    """

    def __init__(self, recipe: Recipe, data: str | Path, *, strict: bool = False):
        self.recipe = recipe
        self.report: ReadReport
        self.histories: dict[str, History]
        self.histories, self.report = read_histories(recipe.readers, data, strict=strict)
        try:
            self.train, self.validation, self.test = split_users(sorted(self.histories), recipe.split)
            self.catalogue = self._catalogue()
        except (DataError, RecipeError) as error:
            raise type(error)(f"{error}. What was read: {self.report}") from None

    def _catalogue(self) -> Catalogue:
        recipe, histories = self.recipe, [self.histories[user] for user in self.train]
        if not any(len({e.timestamp for e in history.timed}) > 1 for history in histories):
            raise DataError("no training user has events at two different times; there is nothing to learn from")
        cuts, choices = [], any(q.choices for q in recipe.questions.values())
        if choices and not (cuts := [cut for _, cut in self.cuts(self.train)]):
            raise DataError(
                f"split.min_events is {recipe.split.min_events}, but no training user has so many events before a cut: "
                f"the longest of their histories has {max(len(history.timed) for history in histories)} events, of "
                f"which the window takes {recipe.window}; lower it, or bring longer histories"
            )
        return Catalogue(histories, recipe.questions, cuts=cuts)

    def questions(self, cut: Cut, rng: np.random.Generator, *, training: bool) -> list[Question]:
        """All questions of the recipe that this cut can answer."""
        recipe = self.recipe
        return build_questions(cut, recipe.questions, self.catalogue, rng, training=training, letters=recipe.letters)

    def cuts(self, users: list[str]) -> list[tuple[str, Cut]]:
        """The evaluation cuts of `users`, as (user, cut)."""
        split = self.recipe.split
        return [
            (user, cut)
            for user in users
            for cut in evaluation_cuts(self.histories[user], self.recipe.window, split.cuts, split.min_events)
        ]

    def fingerprints(self, users: Sequence[str]) -> list[str]:
        """What `write_trained_on` notes of these users."""
        return [user_fingerprint(self.histories[user]) for user in users]

    def training_cut(self, rng: np.random.Generator) -> Cut:
        """A random training user at a random time, with events dropped and histories shortened as the recipe says."""
        config = self.recipe.training
        while True:
            history = self.histories[self.train[rng.integers(len(self.train))]]
            size = len(history.timed)
            if size < 2:
                continue
            cut = make_cut(history, int(rng.integers(1, size)), self.recipe.window)
            kept = cut.history
            if rng.random() < config.short_share:
                kept = kept.last(int(rng.integers(1, 16)))
            drop = rng.random() * config.drop_events
            kept = kept.of(e for e in kept.events if e.timestamp is None or rng.random() >= drop)
            if config.drop_sources and rng.random() < config.drop_sources:
                present = sorted({e.source for e in kept.events})
                lost = set(rng.permutation(present)[: rng.integers(1, max(2, len(present)))])
                kept = kept.of(e for e in kept.events if e.source not in lost)
            if kept.timed:
                return replace(cut, history=kept)


def split_users(users: list[str], config: SplitConfig) -> tuple[list[str], list[str], list[str]]:
    """Train, validation and test users: a seeded shuffle, cut by share."""
    order = np.random.default_rng(config.seed).permutation(len(users))
    train = round(config.train * len(users))
    validation = round(config.validation * len(users))
    shuffled = [users[i] for i in order]
    parts = shuffled[:train], shuffled[train : train + validation], shuffled[train + validation :]
    if not all(parts):
        raise DataError(f"{len(users)} users cannot be split into train, validation and test; bring at least 10")
    return parts
