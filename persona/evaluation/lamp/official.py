"""`OfficialDomain`: LaMP's own files in the place of a `LampDomain`, and `open_domain`, which knows which is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from persona.errors import DataError
from persona.evaluation.lamp.domain import Draw, LampDomain, shortened
from persona.evaluation.lamp.files import SOURCE, official_paths, read_samples
from persona.evaluation.lamp.recipe import LampRecipe
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS, Task
from persona.history import History, SourceSpec
from persona.training.trained_on import fingerprint


class OfficialDomain:
    """The files of a task. What is asked is the test part where its outputs lie there, else dev; `asked` says which.

    A part of train validates. All questions are held in memory with their profiles: some 2 GB for the largest tasks.
    """

    def __init__(self, recipe: LampRecipe, data: str | Path):
        self.recipe, self.sources = recipe, {SOURCE: SourceSpec("text")}
        outputs = official_paths(Path(data), self.task, recipe.official, "test")[1]
        self.asked = "test" if outputs and outputs.exists() else "dev"
        """The official part that is asked. The test outputs of the user split are not public."""
        train, asked = self._read(Path(data), "train"), self._read(Path(data), self.asked)
        order = np.random.default_rng([recipe.split.seed, 0]).permutation(len(train))
        held = round(recipe.split.validation * len(train))
        self.validation = [train[i] for i in order[:held][: recipe.split.most]]
        self.train = [train[i] for i in order[held:]]
        chosen = np.random.default_rng([recipe.split.seed, 2]).permutation(len(asked))[: recipe.split.most]
        self.test = [asked[i] for i in sorted(chosen)]
        self.report = f"{recipe.task}: {len(train)} train and {len(asked)} {self.asked} questions"
        if not (self.train and self.validation and self.test):
            raise DataError(f"{self.report}: too few to train, validate and test")

    def _read(self, data: Path, part: str) -> list[Sample]:
        questions, outputs = official_paths(data, self.task, self.recipe.official, part)
        return list(read_samples(questions, outputs, self.task))

    def __str__(self) -> str:
        return self.report

    @property
    def task(self) -> Task:
        """The LaMP task."""
        return TASKS[self.recipe.task]

    def samples(self, part: str) -> list[Sample]:
        """The questions of "validation" or "test"."""
        return {"validation": self.validation, "test": self.test}[part]

    def fingerprints(self, part: str) -> set[str]:
        """Of questions."""
        file = self.asked if part == "test" else "train"
        samples = self.train if part == "train" else self.samples(part)
        return {fingerprint(self.task.name, self.recipe.official, file, sample.id) for sample in samples}

    def draw(self, rng: np.random.Generator, most: int | None = None, *, alone: bool = False) -> Draw:
        """A random training question, with some of its profile dropped as the recipe says, or without one."""
        sample = self.train[rng.integers(len(self.train))]
        events = [] if alone else shortened(sample.profile.events, rng, self.recipe.training)
        return Draw(sample.profile.of(events), ((sample.input, sample.output),))

    def histories(self) -> Iterator[History]:
        """Profiles of training questions."""
        for sample in self.train:
            yield sample.profile

    def training_answers(self) -> Iterator[str]:
        """The answer of every training question."""
        for sample in self.train:
            yield sample.output


def open_domain(recipe: LampRecipe, data: str | Path, *, strict: bool = False) -> LampDomain | OfficialDomain:
    """The records of a recipe, `strict` as in `read_histories`, or its official files, where no bad line is passed."""
    return OfficialDomain(recipe, data) if recipe.official else LampDomain(recipe, data, strict=strict)
