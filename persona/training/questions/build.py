"""`build_questions`: all questions that a cut can answer, with the answers they offer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from persona.training.questions.answers import next_events, true_answers
from persona.training.questions.catalogue import Catalogue
from persona.training.questions.cuts import Cut
from persona.training.questions.letters import lettered
from persona.training.questions.spec import NO, YES, Question, QuestionSpec


def build_questions(
    cut: Cut,
    specs: Mapping[str, QuestionSpec],
    catalogue: Catalogue,
    rng: np.random.Generator,
    *,
    training: bool,
    letters: bool = False,
) -> list[Question]:
    """All questions that this cut can answer; a tie, or an answer that no training user gave, asks nothing.

    With `letters` the answers stand in the question and the answer is a letter; see `lettered`.
    """
    questions: list[Question] = []
    for name, spec in specs.items():
        if spec.kind == "next_item":
            rivals = 1 if training and not letters else spec.negatives
            questions += _next_item(name, spec, cut, catalogue, rng, training, rivals)
            continue
        for true in true_answers(spec, cut, rng, training=training):
            if options := catalogue.options(name, true.answer, rng):
                prompt = spec.prompt
                for place, text in true.fields.items():
                    prompt = prompt.replace(place, text)
                questions.append(Question(name, prompt, true.answer, options, true.item_id, support=true.support))
    return lettered(questions, specs, catalogue, rng) if letters else questions


def _next_item(name: str, spec: QuestionSpec, cut: Cut, catalogue: Catalogue, rng, training, count) -> list[Question]:
    questions = []
    for group, event in enumerate(next_events(spec, cut, rng, training)):
        others = catalogue.negatives(spec.source, event.item_id, cut.seen, count, rng)
        if len(others) < count:
            continue
        items = catalogue.items[spec.source]
        for item_id in [event.item_id, *others]:
            prompt = spec.prompt.replace("{item}", items[item_id].text)
            answer, support = (YES, (event,)) if item_id == event.item_id else (NO, ())
            questions.append(Question(name, prompt, answer, (YES, NO), item_id, group, support))
    return questions
