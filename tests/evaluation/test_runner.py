"""Accuracy by hand, intervals, controls, and the whole table on a small domain."""

import json
from dataclasses import replace

import numpy as np
import pytest

from persona.errors import DataError
from persona.evaluation.intervals import interval, mean_over_users
from persona.evaluation.methods import Asked, Methods, Sample, draw_sample
from persona.evaluation.runner import run_table, user_accuracy
from persona.training.questions import NO, YES, Question
from persona.training.recipe import Domain

GENRES = ("comedy", "drama")


def sample_of(*asked):
    return Sample(["ana", "bob"], [], list(asked), [])


def genre(user, answer):
    return Asked(user, 0, Question("genre", "?", answer, GENRES))


def item(user, answer, group=0):
    return Asked(user, 0, Question("next", "?", answer, (YES, NO), "i", group))


def test_accuracy_is_averaged_within_users_first():
    sample = sample_of(genre(0, "drama"), genre(0, "drama"), genre(0, "comedy"), genre(1, "comedy"))
    scores = [{"comedy": 1.0, "drama": 0.0}] * 4
    assert user_accuracy(sample, scores, ["genre"])[:, 0] == pytest.approx([1 / 3, 1.0])


def test_a_user_who_was_not_asked_is_nan_and_does_not_count():
    values = user_accuracy(sample_of(genre(0, "drama")), [{"comedy": 0.0, "drama": 1.0}], ["genre", "next"])
    assert values[0, 0] == 1.0
    assert np.isnan(values[1, 0]) and np.isnan(values[:, 1]).all()


def test_yes_no_questions_of_a_group_compete_by_their_odds():
    sample = sample_of(item(0, YES), item(0, NO), item(0, NO), item(0, NO))
    right = [{YES: 0.0, NO: 1.0}] + [{YES: 0.0, NO: 2.0}] * 3  # none above even odds, yet the true item is best
    wrong = [{YES: 0.0, NO: 1.0}, {YES: 3.0, NO: 0.0}] + [{YES: 0.0, NO: 2.0}] * 2
    assert user_accuracy(sample, right, ["next"])[0, 0] == 1.0
    assert user_accuracy(sample, wrong, ["next"])[0, 0] == 0.0


def test_equal_scores_are_worth_chance_whatever_the_order():
    sample = sample_of(item(0, YES), item(0, NO), item(0, NO), item(0, NO), genre(0, "comedy"))
    values = user_accuracy(sample, [{YES: 0.0, NO: 0.0}] * 4 + [dict.fromkeys(GENRES, 0.0)], ["next", "genre"])
    assert values[0] == pytest.approx([0.25, 0.5])


def test_groups_of_different_numbers_are_different_answers():
    sample = sample_of(item(0, YES, 0), item(0, NO, 0), item(0, YES, 1), item(0, NO, 1))
    scores = [{YES: 1.0, NO: 0.0}, {YES: 0.0, NO: 0.0}, {YES: 0.0, NO: 0.0}, {YES: 1.0, NO: 0.0}]
    assert user_accuracy(sample, scores, ["next"])[0, 0] == 0.5


def test_interval_covers_the_mean_and_shrinks_with_users():
    few, many = np.random.default_rng(0).random((20, 2)), np.random.default_rng(0).random((500, 2))
    widths = []
    for values in (few, many):
        low, high = interval(values, n=300)
        assert (low < mean_over_users(values)).all() and (mean_over_users(values) < high).all()
        widths.append((high - low).mean())
    assert widths[1] < widths[0] / 2
    assert np.array_equal(interval(few, n=100, seed=3)[0], interval(few, n=100, seed=3)[0])


def test_the_shuffled_user_is_always_somebody_else(domain):
    users = domain.train[:20]
    sample = draw_sample(domain, users, seed=0)
    owner = {a.cut: a.user for a in sample.asked}
    histories = [c.history.user for c in sample.cuts]
    assert len(sample.users) > 10
    for cut, other in enumerate(sample.stranger):
        assert histories[other] != histories[cut]
        assert sample.users[owner[cut]] == histories[cut]


def test_the_sample_is_the_same_for_the_same_seed(domain):
    first, again, other = (draw_sample(domain, domain.test, seed) for seed in (0, 0, 1))
    assert [a.question for a in first.asked] == [a.question for a in again.asked]
    assert [a.question for a in first.asked] != [a.question for a in other.asked]


def test_budget_text_is_the_newest_events_within_the_budget(domain, model):
    sample = draw_sample(domain, domain.test, seed=0)
    methods = Methods(domain, model, None, sample)
    for budget in (1, 12, 40):
        for text, full in zip(methods.budget_texts(budget), methods.texts):
            size = len(model.template.tokenizer.encode(f"{text}\n", add_special_tokens=False))
            assert full.endswith(text) and text
            assert size <= budget or "\n" not in text  # one whole event even where not even one fits


def test_the_table_has_every_row_with_controls_and_can_be_written(domain, model):
    lines = []
    result = json.loads(json.dumps(run_table(domain, model, model, progress=lines.append)))
    rows = result["results"]
    assert set(rows) >= {
        "chance", "majority", "item_cosine", "no_history", "learned_prompt", "shuffled_user",
        "text_same_budget", "ours_k1", "ours_k2", "ours_k4", "text_full",
    }  # fmt: skip
    categories = len(domain.catalogue.answers["favourite_category"])
    assert rows["chance"]["favourite_category"]["acc"] == pytest.approx(1 / categories, abs=1e-3)
    assert rows["chance"]["next_purchase"]["acc"] == pytest.approx(0.25)
    assert "mean" not in rows["item_cosine"] and list(rows["item_cosine"]) == ["next_purchase"]
    assert rows["ours_k4"]["tokens"]["user"] < rows["text_full"]["tokens"]["user"] / 10
    assert set(result["paired"]) == {
        f"ours_k4 - {n}"
        for n in ("no_history", "learned_prompt", "shuffled_user", "text_same_budget", "text_full")
    }  # fmt: skip
    for row in rows.values():
        assert all(v["low"] <= v["acc"] <= v["high"] for k, v in row.items() if k != "tokens")
    assert result["cost"]["users_per_second"] > 0 and result["cost"]["add_event_ms_known_text"] > 0
    assert len(result["data_sha256"]) == 64 and lines


def test_too_few_users_to_ask_is_an_error(domain, model):
    short = Domain.__new__(Domain)
    short.__dict__ |= domain.__dict__
    short.recipe = replace(domain.recipe, split=replace(domain.recipe.split, min_events=10_000))
    with pytest.raises(DataError, match="10000 events or more"):
        run_table(short, model, None, progress=str)
