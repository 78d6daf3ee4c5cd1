"""The reference LM of a task in LaMP's form: it learns to answer inputs, with and without a profile as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from persona.evaluation.lamp.domain import LampDomain
from persona.evaluation.lamp.prompts import profile_prompt
from persona.injection import load_llm
from persona.training.reference_lm import Draw, Reading, check_free, train_lm, train_tokenizer
from persona.training.trained_on import check_unseen, trained_on, write_trained_on

INPUTS = 1000
"""Inputs that the tokenizer is fitted on, so that the words of the instruction become tokens."""


def build_lamp_lm(
    domain: LampDomain,
    out: str | Path,
    *,
    start: str | Path | None = None,
    steps: int | None = None,
    overwrite: bool = False,
    report_to: str = "none",
) -> Path:
    """Trains tokenizer and model by `recipe.lm` on what training may see, and saves them to `out`.

    `start` is a reference LM to go on from, such as one for other questions on the same records. Raises `DataError` if
    it has seen what is asked in validation or test, and `PersonaError` if an LLM lies in `out`, unless `overwrite`.
    """
    check_free(out, overwrite)
    config, model = domain.recipe.lm, None
    if start:
        check_unseen(domain.fingerprints("validation") | domain.fingerprints("test"), start, "questions")
        model, tokenizer = load_llm(start)
        model.train()
    else:
        tokenizer = train_tokenizer(tokenizer_lines(domain), config)
    train_lm(readings(domain, tokenizer), tokenizer, config, out, steps=steps, start=model, report_to=report_to)
    write_trained_on({*domain.fingerprints("train"), *(trained_on(start) if start else ())}, out)
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
        count = int(rng.choice(recipe.lm_items))
        drawn = domain.draw(rng, recipe.lm_questions, alone=not count)
        count = min(count, len(drawn.profile))
        items = [drawn.profile.events[i] for i in rng.permutation(len(drawn.profile))[:count]]
        first = drawn.questions[0][0]
        text = profile_prompt(task, first, items, tokenizer, recipe.max_length)
        if task.splice_after:  # the items stand inside the input: there is nothing that questions could share
            return Reading([], "", [(text, drawn.questions[0][1])])
        shared = text.removesuffix(first).rstrip()
        return Reading([shared] if shared else [], " ", drawn.questions)

    return draw
