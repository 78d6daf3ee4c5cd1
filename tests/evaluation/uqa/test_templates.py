"""The Chinese recipe asks what the English one does, in words by which UQABench tells its sub-tasks."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from persona.errors import DataError
from persona.evaluation.uqa.tasks import SUB_TASKS, route
from persona.history import Event, History
from persona.training.questions import Catalogue, build_questions, evaluation_cuts
from persona.training.questions.spec import PLACES
from persona.training.recipe import load_recipe

MOVIES = Path(__file__).parents[3] / "adapters" / "movies"
ENGLISH, CHINESE = load_recipe(MOVIES / "uqa.yaml"), load_recipe(MOVIES / "uqa-zh.yaml")
GENRES = ("Action", "Comedy", "Drama", "Horror", "Musical", "Western")


def test_both_recipes_have_the_official_sub_tasks():
    for recipe in (ENGLISH, CHINESE):
        assert list(recipe.questions) == [task.name for task in SUB_TASKS]


def test_the_chinese_recipe_asks_what_the_english_one_does():
    assert CHINESE.letters and not ENGLISH.letters
    for part in ("window", "sources", "readers", "split", "encoder", "pretraining", "training", "lm"):
        assert getattr(CHINESE, part) == getattr(ENGLISH, part)
    for name, spec in CHINESE.questions.items():
        english = ENGLISH.questions[name]
        assert replace(spec, prompt=english.prompt, choice_prompt=english.choice_prompt) == english


@pytest.mark.parametrize("name", CHINESE.questions)
def test_every_prompt_has_the_route_of_its_task(name):
    spec, english = CHINESE.questions[name], ENGLISH.questions[name]
    assert re.findall(r"{\w+}", spec.prompt) == re.findall(r"{\w+}", english.prompt) == list(PLACES[spec.kind])
    prompt = spec.prompt
    for place, value in {"{n}": "2", "{value}": "Comedy", "{item}": "Toy Story 1995 Comedy"}.items():
        prompt = prompt.replace(place, value)
    for asked in filter(None, (prompt, spec.choice_prompt)):
        assert route(asked).name == name
    with pytest.raises(DataError):
        route(english.prompt)


def test_questions_of_real_histories_have_the_route_of_their_task():
    rng = np.random.default_rng(0)
    histories = []
    for user in range(30):
        films = rng.permutation(90)[:40]
        favourite = rng.choice(len(GENRES), 2)
        events = [
            Event("rating", float(t), f"film {f}", str(f), 5.0, {"genre": GENRES[f % 6 if t % 3 else favourite[t % 2]]})
            for t, f in enumerate(films)
        ]
        histories.append(History(f"user {user}", tuple(events)))
    cuts = [cut for history in histories for cut in evaluation_cuts(history, 50, 4, 10)]
    catalogue = Catalogue(histories, CHINESE.questions, bins=3, cuts=cuts)
    asked = [
        question
        for cut in cuts
        for question in build_questions(cut, CHINESE.questions, catalogue, rng, training=False, letters=CHINESE.letters)
    ]
    assert {question.task for question in asked} == set(CHINESE.questions)
    for question in asked:
        assert route(question.prompt).name == question.task
        assert question.options == ("A", "B", "C", "D") and question.answer in question.options
        assert "\nA. " in question.prompt and "{" not in question.prompt
