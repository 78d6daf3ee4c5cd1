"""Training draws as samples, and the collator that serves every model that stands before the LLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch.utils.data import Dataset

from persona.evaluation.lamp.domain import LampDomain
from persona.evaluation.lamp.sample import Sample

Write = Callable[[Sample], str]
"""What the LLM reads of a sample as text."""


class Draws(Dataset):
    """Draw `i` comes from its own seed, so a run can be repeated and resumed; each is a list of samples."""

    def __init__(self, domain: LampDomain, size: int, seed: int):
        self.domain, self.size, self.seed = domain, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> list[Sample]:
        """The samples of one profile."""
        drawn = self.domain.draw(np.random.default_rng([self.seed, 1, index]))
        return [Sample(f"{index}/{n}", text, drawn.profile, out) for n, (text, out) in enumerate(drawn.questions)]


class Collate:
    """Draws as arguments of a model's `forward`. Half the batches use all soft rows, half a random prefix of ours.

    Which, the first draw's index decides: see `persona.training.data.Collator`.
    """

    def __init__(self, model, write: Write, seed: int = 0, *, prefixes: bool = False):
        self.model, self.write, self.seed, self.prefixes = model, write, seed, prefixes

    def __call__(self, draws: Sequence[list[Sample]]) -> dict:
        model, samples = self.model, [sample for draw in draws for sample in draw]
        count = model.soft
        if self.prefixes:
            rng = np.random.default_rng([self.seed, 2, int(samples[0].id.partition("/")[0])])
            count = count if rng.random() < 0.5 else int(rng.integers(1, count + 1))
        prompts = [model.template.prompt(self.write(sample), count) for sample in samples]
        answers = [model.template.answer("?", sample.output) for sample in samples]
        return {**model.condition(samples), "batch": model.collate(prompts, answers)}
