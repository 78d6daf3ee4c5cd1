"""A recipe: one YAML file that says how a domain's raw records become an adapter.

`load_recipe` reads it; `Domain` is a recipe applied to real records: histories, user split, catalogue.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import PositiveInt

from persona.encoders.config import EncoderConfig
from persona.errors import DataError
from persona.history import History, ReaderSpec, SourceSpec
from persona.history.config import load_config
from persona.history.readers import ReadReport, read_histories
from persona.history.source import STRICT
from persona.training.questions import (
    Catalogue,
    Cut,
    Question,
    QuestionSpec,
    build_questions,
    evaluation_cuts,
    make_cut,
)


@dataclass(frozen=True)
class SplitConfig:
    """How users are divided. Always by user, never by row."""

    __pydantic_config__ = STRICT

    train: float = 0.8
    """Share of users an adapter and a reference LM learn from."""
    validation: float = 0.1
    """Share used to choose settings; the rest are test users."""
    seed: int = 0
    """Seed of the shuffle."""
    cuts: PositiveInt = 4
    """Points in time at which each validation or test user is asked."""
    min_events: PositiveInt = 10
    """A cut leaves at least so many events before it in evaluation."""


@dataclass(frozen=True)
class TrainingConfig:
    """How an adapter is trained."""

    __pydantic_config__ = STRICT

    steps: PositiveInt = 2000
    """Optimizer steps."""
    histories_per_step: PositiveInt = 16
    """Histories in a batch; each is encoded once and asked all its questions."""
    questions_per_history: PositiveInt = 6
    """At most so many questions about one history, drawn at random."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, linear warm-up and cosine decay."""
    warmup_steps: int = 100
    """Steps of warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    next_item_weight: float = 0.2
    """Weight of the next-item loss on the backbone's states beside the answer loss; 0 turns it off."""
    short_share: float = 0.25
    """Share of training histories cut down to 1-15 events, so that young users work too."""
    drop_events: float = 0.1
    """Highest share of events dropped at random from a training history."""
    lora_rank: int = 0
    """Rank of an optional peft LoRA on the LLM's attention; 0 leaves the LLM as it is."""
    seed: int = 0
    """Seed of everything random in training."""


@dataclass(frozen=True)
class LMConfig:
    """Size and training of the reference LM that stands in for a hub model."""

    __pydantic_config__ = STRICT

    vocab_size: PositiveInt = 3072
    """Byte-level BPE tokens."""
    hidden_size: PositiveInt = 192
    """Width; heads are `head_dim` wide."""
    layers: PositiveInt = 4
    """Decoder layers."""
    head_dim: PositiveInt = 32
    """32 or 64: the vLLM CPU engine takes no less."""
    context: PositiveInt = 1024
    """Tokens of a training row: one history, then as many questions as fit."""
    rows_per_step: PositiveInt = 3
    """Rows in a batch."""
    steps: PositiveInt = 1600
    """Optimizer steps."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW; flat to 30% of the steps, then linear to zero."""
    history_weight: float = 0.2
    """Weight of the next-token loss on a history's own text beside the answer loss."""
    plain_share: float = 0.1
    """Share of rows without a history."""
    seed: int = 0
    """Seed of everything random in building the LM."""


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
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How the adapter is trained."""
    lm: LMConfig = field(default_factory=LMConfig)
    """The reference LM, when one is built."""

    def __post_init__(self):
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


def load_recipe(path: str | Path) -> Recipe:
    """Reads and checks a recipe; `RecipeError` names the file and the field."""
    return load_config(Recipe, path)


class Domain:
    """A recipe with its records read: histories, the split of users, and the catalogue of the training users.

    Raises `DataError` when the records hold too few users to split, or no training user with a past and a future.
    """

    def __init__(self, recipe: Recipe, data: str | Path, *, strict: bool = False):
        self.recipe = recipe
        self.report: ReadReport
        self.histories: dict[str, History]
        self.histories, self.report = read_histories(recipe.readers, data, strict=strict)
        try:
            self.train, self.validation, self.test = split_users(sorted(self.histories), recipe.split)
        except DataError as error:
            raise DataError(f"{error}. What was read: {self.report}") from None
        if not any(len({e.timestamp for e in self.histories[u].timed}) > 1 for u in self.train):
            raise DataError("no training user has events at two different times; there is nothing to learn from")
        cuts = [cut for _, cut in self.cuts(self.train)] if any(q.choices for q in recipe.questions.values()) else []
        self.catalogue = Catalogue((self.histories[u] for u in self.train), recipe.questions, cuts=cuts)

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
            if kept.timed:
                return replace(cut, history=kept)


TRAINED_ON = "trained_on.json"


def fingerprint(history: History) -> str:
    """16 hex digits of a user's id and first timed event: a growing history keeps it, a namesake has another."""
    return hashlib.sha256(repr((history.user, history.timed[:1])).encode()).hexdigest()[:16]


def write_trained_on(domain: Domain, folder: str | Path) -> None:
    """Notes beside a trained LM or adapter whom it has seen, so that they are never taken for test users."""
    seen = sorted(fingerprint(domain.histories[u]) for u in domain.train)
    (Path(folder) / TRAINED_ON).write_text(json.dumps(seen, indent=0) + "\n")


def check_unseen(domain: Domain, users: list[str], folder: str | Path) -> None:
    """Raises `DataError` if what lies in `folder` was trained on any of `users`; without a note nothing is known."""
    file = Path(folder) / TRAINED_ON
    seen = set(json.loads(file.read_text())) if file.exists() else set()
    known = [u for u in users if fingerprint(domain.histories[u]) in seen]
    if known:
        raise DataError(
            f"{folder} was trained on {len(known)} of the {len(users)} users to be asked: the records or the split "
            "have changed since. Train again, or bring the records that it was trained with"
        )


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
