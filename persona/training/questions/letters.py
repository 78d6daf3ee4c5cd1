"""Lettered choices (UQABench's protocol): the answers stand in the question, and the answer is one letter.

For LLMs large enough to point; small ones are better at giving the answer itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase

import numpy as np

from persona.errors import RecipeError
from persona.training.questions.catalogue import Catalogue
from persona.training.questions.spec import NO, YES, Question, QuestionSpec


def lettered(
    questions: Sequence[Question], specs: Mapping[str, QuestionSpec], catalogue: Catalogue, rng: np.random.Generator
) -> list[Question]:
    """The same questions with lettered choices; yes/no questions of one group become one that offers their items.

    Every letter is right equally often: its place is drawn anew for each question. Raises `RecipeError` for a
    question with more answers than letters and for next_item without a `choice_prompt`.
    """
    result, groups = [], {}
    for question in questions:
        if question.options == (YES, NO):
            groups.setdefault((question.task, question.group), []).append(question)
            continue
        result.append(_lettered(question, question.prompt, question.answer, list(question.options), rng))
    for (task, _), group in groups.items():
        spec = specs[task]
        if spec.choice_prompt is None:
            raise RecipeError(f"questions.{task}: lettered choices need `choice_prompt`, a turn without an item")
        texts = {q.item_id: catalogue.items[spec.source][q.item_id].text for q in group}
        true = next(q for q in group if q.answer == YES)
        result.append(_lettered(true, spec.choice_prompt, texts[true.item_id], list(texts.values()), rng))
    return result


def _lettered(question: Question, prompt: str, answer: str, options: list[str], rng) -> Question:
    if len(options) > len(ascii_uppercase):
        raise RecipeError(f"questions.{question.task}: {len(options)} answers are more than letters; set `choices`")
    order = [options[i] for i in rng.permutation(len(options))]
    letters = ascii_uppercase[: len(order)]
    lines = [prompt, *(f"{letter}. {option}" for letter, option in zip(letters, order))]
    gold = letters[order.index(answer)]
    return Question(question.task, "\n".join(lines), gold, tuple(letters), question.item_id, support=question.support)
