"""The official metric: what is right, how it is pooled, and its intervals."""

import numpy as np
import pytest

from persona.errors import DataError
from persona.evaluation.uqa.metric import bootstrap, official_accuracy


@pytest.mark.parametrize(
    "prediction, gold, right",
    [
        ("A", "A", True),
        ("A.", "A", True),
        ("AB", "A", True),
        ("A", "A.", False),
        ("", "A", False),
        (" A", "A", False),
        ("A", " A", False),
        ("A ", "A", True),
        ("a", "A", False),
        ("Ａ", "A", False),
        ("1", "10", False),
        ("3", "3", True),
    ],
)
def test_an_answer_is_right_when_it_starts_with_the_gold_one(questions, prediction, gold, right):
    result = official_accuracy(questions[:1], [prediction], [gold])
    assert result["overall"]["accuracy"] == (100.0 if right else 0.0)


def test_questions_are_pooled_and_tasks_are_not_averaged(questions):
    df, mf, ip = questions[:3]
    result = official_accuracy([df, df, df, mf, ip], ["A", "A", "B", "B", "C"], ["A", "A", "A", "A", "C"])
    accuracy = {name: (cell["accuracy"], cell["n"]) for name, cell in result["sub_tasks"].items()}
    assert accuracy == {"direct_feature": (66.67, 3), "match_feature": (0.0, 1), "next_item": (100.0, 1)}
    dimensions = {name: (cell["accuracy"], cell["n"]) for name, cell in result["dimensions"].items()}
    assert dimensions == {"sequence understanding": (50.0, 4), "action prediction": (100.0, 1)}
    assert (result["overall"]["accuracy"], result["overall"]["n"]) == (60.0, 5)


def test_intervals_are_those_of_a_mean_of_questions(questions):
    hits = np.arange(400) % 4 == 0
    cell = official_accuracy([questions[0]] * 400, ["A" if hit else "B" for hit in hits], ["A"] * 400)["overall"]
    margin = 196 * np.sqrt(0.25 * 0.75 / 400)
    assert cell["low"] == pytest.approx(25 - margin, abs=0.7) and cell["high"] == pytest.approx(25 + margin, abs=0.7)
    assert (cell["low"], cell["high"]) == bootstrap(hits) != bootstrap(hits, seed=1)


def test_intervals_of_few_or_equal_answers(questions):
    assert bootstrap(np.array([True, True, True])) == (100.0, 100.0)
    assert bootstrap(np.array([True])) == (None, None)
    assert official_accuracy(questions[:1], ["A"], ["A"])["overall"] == {
        "accuracy": 100.0,
        "low": None,
        "high": None,
        "n": 1,
    }


@pytest.mark.parametrize(
    "asked, predictions, golds, message",
    [
        (1, ["A"], [""], "gold answer of question 0, counted from 0, is empty"),
        (2, ["A", "A"], ["A", ""], "gold answer of question 1"),
        (2, ["A"], ["A", "B"], "2 questions, 1 predictions, 2 golds"),
        (1, ["A"], ["A", "B"], "1 questions, 1 predictions, 2 golds"),
        (0, [], [], "no questions"),
    ],
)
def test_what_cannot_be_scored(questions, asked, predictions, golds, message):
    with pytest.raises(DataError, match=message):
        official_accuracy(questions[:asked], predictions, golds)


def test_a_question_of_no_sub_task_is_refused():
    with pytest.raises(DataError, match="no sub-task"):
        official_accuracy(["What next?"], ["A"], ["A"])
