"""Metrics against scikit-learn and rouge-score used directly, on random answers and by hand."""

import math
import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score

from persona.errors import DataError
from persona.evaluation.lamp.metrics import in_profile, per_sample, score
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS
from persona.history import Event, History

CASES = 1_000


def scored(task, predictions, golds):
    """`score`, after a check that `per_sample` averages to it."""
    found = score(task, dict(enumerate(predictions)), dict(enumerate(golds)))
    each = [per_sample(task, p, g) for p, g in zip(predictions, golds)]
    means = {name: np.mean([values[name] for values in each]) for name in each[0]}
    if "mse" in means:
        means["rmse"] = math.sqrt(means.pop("mse"))
    assert means.items() >= {n: pytest.approx(v, abs=1e-12) for n, v in found.items() if n != "macro_f1"}.items()
    return found


@pytest.mark.parametrize("name", ["LaMP_1", "LaMP_2", "LaMP_2N"])
def test_classification_is_that_of_scikit_learn(name):
    task, draw = TASKS[name], random.Random(name)
    golds = draw.choices(task.labels[:9], k=CASES)
    answers = [draw.choice((gold, draw.choice(task.labels), "no idea", gold.upper() + "!")) for gold in golds]
    found = scored(task, [f" {answer}\n" for answer in answers], golds)
    number = {label: n for n, label in enumerate(task.labels)}
    right, given = [number[gold] for gold in golds], [number.get(answer, -1) for answer in answers]
    assert found["accuracy"] == pytest.approx(np.mean(np.array(right) == np.array(given)))
    expected = f1_score(right, given, labels=list(number.values()), average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)


def test_labels_that_nobody_gave_count_zero():
    found = scored(TASKS["LaMP_2"], ["comedy", "Comedy"], ["comedy", "comedy"])
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3) / 15)}


def test_ratings_on_random_answers():
    draw = random.Random(0)
    golds = [draw.choice("12345") for _ in range(CASES)]
    answers = [draw.choice((draw.choice("12345"), f"{draw.uniform(0, 6):.2f}", "five", "")) for _ in range(CASES)]
    found = scored(TASKS["LaMP_3"], answers, golds)
    farthest = {"1": 5, "2": 5, "3": 5, "4": 1, "5": 1}
    stars = [float(a) if a not in ("five", "") else farthest[g] for a, g in zip(answers, golds)]
    errors = np.array(stars) - np.array(golds, float)
    assert found == {"mae": pytest.approx(np.abs(errors).mean()), "rmse": pytest.approx(np.sqrt((errors**2).mean()))}


@pytest.mark.parametrize(
    ("answer", "gold", "error"),
    [
        (" 4 ", "5", 1), ("4.5", "4", 0.5), ("7", "5", 2), ("good", "5", 4), ("good", "1", 4), ("", "2", 3),
        ("five", "3", 2), ("4 stars", "4", 3), ("nan", "5", 4), ("inf", "1", 4), ("-inf", "4", 3), ("9" * 400, "5", 4),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_number_is_as_wrong_as_it_can_be(answer, gold, error):
    found = scored(TASKS["LaMP_3"], [answer], [gold])
    assert found == {"mae": pytest.approx(error), "rmse": pytest.approx(error)}


@pytest.mark.parametrize("name", ["LaMP_4", "LaMP_5", "LaMP_6", "LaMP_7"])
def test_generation_is_that_of_rouge_score(name):
    draw, words = (
        random.Random(name),
        ["running", "runs", "The", "the", "cat", "cats", "über", "don't", "a-b", "☕", "7"],
    )
    golds = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(CASES)]
    answers = [" ".join(draw.choices(words, k=draw.randint(0, 9))) for _ in range(CASES)]
    found = scored(TASKS[name], answers, golds)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    each = [scorer.score(gold, answer) for gold, answer in zip(golds, answers)]
    assert found == {n: pytest.approx(np.mean([e[n].fmeasure for e in each])) for n in ("rouge1", "rougeL")}


def test_rouge_has_no_stemmer():
    assert scored(TASKS["LaMP_4"], ["cats running"], ["cat runs"]) == {"rouge1": 0.0, "rougeL": 0.0}


def test_ids_must_be_the_same():
    golds = {"a": "comedy", "b": "action", "c": "action"}
    with pytest.raises(DataError, match=r"2 of 3 gold .* \['b', 'c'\], 1 predictions have no gold answer \['x'\]"):
        score(TASKS["LaMP_2"], {"a": "comedy", "x": "action"}, golds)
    with pytest.raises(DataError, match="no gold answers"):
        score(TASKS["LaMP_2"], {}, {})


def test_order_of_ids_does_not_matter():
    golds = {"a": "comedy", "b": "action"}
    assert score(TASKS["LaMP_2"], {"b": "action", "a": "comedy"}, golds)["accuracy"] == 1.0


@pytest.mark.parametrize("name", ["LaMP_1", "LaMP_2", "LaMP_3"])
def test_a_gold_answer_of_another_task_is_refused(name):
    with pytest.raises(DataError, match=f"{name}: the gold answer 'A headline' of question 'a' is none of"):
        score(TASKS[name], {"a": "5"}, {"a": "A headline"})


def test_gold_answers_that_the_profile_holds():
    def holds(name, asked, output, **fields):
        items = (Event("lamp", attributes=dict.fromkeys(TASKS[name].fields, "other")), Event("lamp", attributes=fields))
        return in_profile(TASKS[name], Sample("1", asked, History("u", items), output))

    article = "Generate a headline for the following article: Rain."
    assert holds("LaMP_4", article, "Wet ", title=" Wet", text="Old rain.")
    assert not holds("LaMP_4", article, "Wet", title="wet", text="Wet")
    cite = TASKS["LaMP_1"].input.format(title="T", first='Deep "nets"', second="Trees")
    assert holds("LaMP_1", cite, "[1]", title='Deep "nets"', abstract="")
    assert holds("LaMP_1", cite, "[2]", title="Trees", abstract="")
    assert not holds("LaMP_1", cite, "[1]", title="Trees", abstract="")
    assert not holds("LaMP_1", "Trees?", "[1]", title="Trees", abstract="")
    review = TASKS["LaMP_3"].input.format(text="Fine.")
    assert holds("LaMP_3", review, "4", text="Fine.", score="4")
    assert not holds("LaMP_3", review, "4", text="Good.", score="4")
    assert not holds("LaMP_3", review, "4", text="Fine.", score="5")
    assert holds("LaMP_7", "Paraphrase: hi", "hello", text="hello")
    with pytest.raises(DataError, match="sample '1' has no gold answer"):
        holds("LaMP_4", article, None, title="Wet", text="Rain.")
