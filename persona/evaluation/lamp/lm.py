"""The reference LM of a task in LaMP's form: it learns to answer inputs, with and without a profile as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from persona.evaluation.lamp.domain import LampDomain
from persona.evaluation.lamp.prompts import profile_prompt
from persona.training.reference_lm import Draw, Reading, train_lm, train_tokenizer
from persona.training.trained_on import write_trained_on

INPUTS = 1000
"""Inputs that the tokenizer is fitted on, so that the words of the instruction become tokens."""


def build_lamp_lm(domain: LampDomain, out: str | Path, *, steps: int | None = None, report_to: str = "none") -> Path:
    """Trains tokenizer and model by `recipe.lm` on what training may see, and saves them to `out`."""
    config = domain.recipe.lm
    tokenizer = train_tokenizer(tokenizer_lines(domain), config.vocab_size)
    train_lm(readings(domain, tokenizer), tokenizer, config, out, steps=steps, report_to=report_to)
    write_trained_on(domain.fingerprints("train"), out)
    return Path(out)


def tokenizer_lines(domain: LampDomain) -> list[str]:
    """Every training item as a prompt shows it, each once, and some inputs with their outputs."""
    task = domain.task
    lines = {task.part.format_map(e.attributes): None for h in domain.histories() for e in h.events}
    rng = np.random.default_rng(domain.recipe.lm.seed)
    inputs = [f"{text} {answer}" for _ in range(INPUTS) for text, answer in domain.draw(rng).questions[:1]]
    return [*lines, *inputs]


def readings(domain: LampDomain, tokenizer: PreTrainedTokenizerBase) -> Draw:
    """Draws questions of one profile after a text of some of its items, in random order."""
    recipe, task = domain.recipe, domain.task

    def draw(rng: np.random.Generator) -> Reading:
        drawn = domain.draw(rng, recipe.lm_questions)
        count = min(int(rng.choice(recipe.lm_items)), len(drawn.profile))
        items = [drawn.profile.events[i] for i in rng.permutation(len(drawn.profile))[:count]]
        first = drawn.questions[0][0]
        text = profile_prompt(task, first, items, tokenizer, recipe.max_length)
        shared = text.removesuffix(first).rstrip()
        return Reading([shared] if shared else [], " ", drawn.questions)

    return draw
