"""`LampRecipe`: how a domain's raw records become a task in LaMP's form, and who is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from persona.encoders.config import EncoderConfig
from persona.errors import RecipeError
from persona.evaluation.lamp.tasks import TASKS
from persona.history import ReaderSpec, SourceSpec
from persona.history.config import load_config, read_mapping
from persona.history.render import check_sources, check_template
from persona.history.source import STRICT
from persona.training.configs import InjectionConfig, LMConfig, TrainingConfig


@dataclass(frozen=True)
class LampSplit:
    """Who and what is asked in training, validation and test. Never by row."""

    __pydantic_config__ = STRICT

    by: Literal["user", "time"] = "user"
    """user: the newest events of users who took no part in training. time: events from `test_from` on."""
    train: float = 0.8
    """by user: share of users to learn from."""
    validation: float = 0.1
    """by user: share of users to choose settings by. by time: share of the events before `test_from`, by event id, so
    that an event of several users falls on one side; no training profile holds them."""
    test_from: date | None = None
    """by time: the first day of the test, such as 2019-01-01 (UTC)."""
    per_user: PositiveInt = 10
    """by user: newest events of each validation and test user that are asked."""
    min_profile: PositiveInt = 3
    """A question is asked only of users with at least so many earlier events."""
    most: PositiveInt | None = None
    """At most so many questions in validation, and in test, drawn at random; None asks all."""
    seed: int = 0
    """Seed of the split."""

    def __post_init__(self):
        if (self.by == "time") != (self.test_from is not None):
            raise ValueError("test_from belongs to a split by time, and such a split needs it")
        if not 0 < self.validation < 1 or not 0 < self.train < 1:
            raise ValueError("train and validation are shares between 0 and 1")


@dataclass(frozen=True)
class PPlugConfig:
    """PPlug (Liu et al. 2024, arXiv 2409.11901), and each way to deviate from it."""

    __pydantic_config__ = STRICT

    scaled: bool = True
    """Whether its two rows get the mean norm of the LLM's embeddings; PPlug's constant is that of FlanT5-XXL."""
    temperature: float = 1.0
    """Divides the attention's scores, which are cosines; PPlug has none, which is 1."""
    trained_input: bool = True
    """Whether the encoder of the input is trained."""
    input_learning_rate: float = 1e-4
    """Peak rate of that encoder, PPlug's; all else has `training.learning_rate`."""
    input_tokens: PositiveInt = 128
    """Tokens of the input that its encoder reads."""

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA for the task (rank 8), and OPPU's (Tan et al. 2024, arXiv 2402.04401) for each user on top of it."""

    __pydantic_config__ = STRICT

    rank: PositiveInt = 8
    """Rank of both."""
    learning_rate: float = 1e-3
    """Peak rate of the task's, and rate of the users'."""
    user_epochs: PositiveInt = 2
    """How often a user's own items are learned from."""
    user_items: PositiveInt = 64
    """Newest items of a user that are learned from."""
    user_batch: PositiveInt = 8
    """Items in a step."""


@dataclass(frozen=True)
class LampRecipe:
    """A LaMP-style task on a domain's own records."""

    __pydantic_config__ = STRICT

    name: str
    """Short name, used for folders and result files."""
    task: str
    """The LaMP task whose prompts and metrics are used, such as LaMP_5."""
    official: Literal["user", "time"] | None = None
    """Read the official files of this split; then there are no sources, readers and fields,
    and of `split` only validation, most and seed count."""
    sources: dict[str, SourceSpec] = field(default_factory=dict)
    """The streams of the records, by name."""
    readers: list[ReaderSpec] = field(default_factory=list)
    """How raw files become events."""
    source: str = ""
    """The source whose events are asked about, and make the profile."""
    fields: dict[str, str] = field(default_factory=dict)
    """The task's fields, each a template over an event's text, value, item_id and attributes."""
    description: str = ""
    """One line for cards and tables."""
    split: LampSplit = field(default_factory=LampSplit)
    """Who is asked."""
    max_length: PositiveInt = 512
    """Tokens of a prompt, of which a text profile may take what the input leaves (LaMP, section 4)."""
    new_tokens: PositiveInt = 32
    """Tokens of an answer."""
    lm_items: list[int] = field(default_factory=lambda: [0, 1, 4, 16])
    """Profile items in the text that the reference LM learns to read, drawn from these."""
    lm_questions: PositiveInt = 2
    """Questions after one such text."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Our user encoder."""
    injection: InjectionConfig = field(default_factory=InjectionConfig)
    """How our user tokens enter the LLM."""
    labels: bool = True
    """Whether our encoder and PPlug see the answers of a profile's items."""
    instruction: bool = True
    """Whether our encoder reads the input as its instruction."""
    pplug: PPlugConfig = field(default_factory=PPlugConfig)
    """The baseline PPlug."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The baselines with LoRA."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How every trained method is trained; `histories_per_step` profiles, `questions_per_history` questions each."""
    lm: LMConfig = field(default_factory=LMConfig)
    """The reference LM, when one is built."""

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is none of {', '.join(TASKS)}")
        if self.training.contrastive_weight or not self.training.answer_weight:
            raise ValueError("training: methods on LaMP are trained by the answer loss; leave the weights of others")
        if self.official:
            if self.sources or self.readers or self.source or self.fields:
                raise ValueError("official files need no sources, readers, source and fields; leave them out")
            return
        if self.split.by == "user" and self.split.train + self.split.validation >= 1:
            raise ValueError("split: train and validation are shares that leave something for the test")
        if self.task in ("LaMP_1", "LaMP_7"):
            raise ValueError(f"{self.task} cannot be made from records: its questions are not of the form of its items")
        if self.source not in self.sources:
            raise ValueError(f"source {self.source!r} is not in `sources`, which has {sorted(self.sources)}")
        if missing := [name for name in TASKS[self.task].fields if name not in self.fields]:
            raise ValueError(f"fields: {self.task} needs {', '.join(missing)}")
        check_sources(self.sources, self.readers)
        for name, template in self.fields.items():
            check_template(f"fields.{name}", template, self.source, self.readers)


def load_lamp_recipe(path: str | Path, changes=()) -> LampRecipe:
    """Reads and checks a recipe; `RecipeError` names the file and the field. `changes` as in `load_config`."""
    given = read_mapping(path)
    if "questions" in given and "task" not in given:
        raise RecipeError(f"{path}: has questions and no task, so it is no recipe in LaMP's form (adapters/lamp)")
    return load_config(LampRecipe, path, changes)
