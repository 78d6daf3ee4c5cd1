"""Accuracy by hand, intervals, controls, and the whole table on a small domain."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

from persona.errors import DataError
from persona.evaluation.cutting import fitting, size
from persona.evaluation.intervals import interval, mean_over_users
from persona.evaluation.methods import Asked, Methods, Sample, draw_sample, questions_cut
from persona.evaluation.runner import run_table, user_accuracy
from persona.evaluation.uqa.table import retrieved
from persona.history import Event, History, SourceSpec
from persona.history.render import render_history
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
        whole, strict = methods.budget_texts(budget, whole=True), methods.budget_texts(budget)
        for (text, cut), (short, shortened), (full, _) in zip(whole, strict, methods.texts):
            assert full.endswith(text) and text and not cut
            # One event even where not even one fits: all of it, or its beginning.
            assert size(text, model.template.tokenizer) <= budget or "\n" not in text
            assert text.startswith(short) and shortened == (short != text)
            assert size(short, model.template.tokenizer) <= budget or not short


def long_domain(domain, every):
    """The domain with a search of 6,600 characters behind each `every`-th event of its test users."""
    changed = copy.copy(domain)
    changed.histories = dict(domain.histories)
    for user in domain.test:
        history = domain.histories[user]
        long = [Event("search", e.timestamp + 0.5, text="oak violin " * 600) for e in history.timed[::every]]
        changed.histories[user] = history.of([*history.events, *long])
    return changed


@pytest.mark.parametrize("every", [1, 5])
def test_no_text_is_longer_than_the_llm_can_read(domain, model, every):
    positions = model.llm.config.max_position_embeddings
    domain = long_domain(domain, every)
    sample = draw_sample(domain, domain.test, seed=0)
    methods = Methods(domain, model, None, sample)
    rows = {
        "full": methods.text(methods.texts),
        "same": methods.text(methods.budget_texts(4, whole=True)),
        "budget": methods.text(methods.budget_texts(128)),
        "retrieved": list(retrieved(methods, 128)),
    }
    for name, requests in rows.items():
        for request in requests:
            answer = max(len(model.template.answer("?", o)) for o in request.options)
            assert len(model.template.prompt(request.messages).ids) + answer <= positions, name
    assert questions_cut(rows["full"]) > 0
    plain = [len(model.template.prompt(r.messages).ids) for r in methods.plain()]
    for name in ("budget", "retrieved"):
        assert all(len(model.template.prompt(r.messages).ids) <= p + 130 for r, p in zip(rows[name], plain))


def test_a_long_history_loses_its_oldest_events_and_keeps_what_has_no_time(tokenizer):
    sources = {"visit": SourceSpec("text"), "about": SourceSpec("text")}
    facts = [Event("about", text="likes tea")]
    history = History("ana", (*facts, *(Event("visit", float(n), text=f"visit {n} to the shop") for n in range(50))))
    whole = render_history(history, sources)
    assert fitting(history, sources, size(whole, tokenizer), tokenizer) == (whole, False)
    text, cut = fitting(history, sources, 100, tokenizer)
    first, *rest = text.split("\n")
    assert cut and first == "likes tea" and whole.endswith("\n".join(rest)) and size(text, tokenizer) <= 100
    assert size(whole[: len(first) + 1] + whole.split("\n")[-len(rest) - 1] + "\n" + "\n".join(rest), tokenizer) > 100
    huge = history.of([*history.events, Event("about", text="tea " * 500)])
    kept = fitting(huge, sources, 100, tokenizer).text
    assert "tea" not in kept and whole.endswith(kept) and kept
    newest = history.of([*history.events, Event("visit", 99.0, text="a long day " * 500)])
    kept, cut = fitting(newest, sources, 100, tokenizer)
    assert cut and kept.startswith("a long day a long") and 90 < size(kept, tokenizer) <= 100
    assert fitting(History("ana"), sources, 100, tokenizer) == ("", False)
    assert "\n" not in fitting(history.of(huge.events[:2]), sources, 5, tokenizer).text


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
    assert "questions_cut" not in rows["text_full"]["tokens"]


def test_the_table_says_where_a_text_was_too_long(domain, model):
    lines = []
    result = run_table(long_domain(domain, 1), model, None, cost=False, progress=lines.append)
    cut = result["results"]["text_full"]["tokens"]["questions_cut"]
    said = f"text_full: the text about the user was too long before {cut} of "
    assert cut > 0 and any(line.startswith(said) for line in lines)


def test_too_few_users_to_ask_is_an_error(domain, model):
    short = Domain.__new__(Domain)
    short.__dict__ |= domain.__dict__
    short.recipe = replace(domain.recipe, split=replace(domain.recipe.split, min_events=10_000))
    with pytest.raises(DataError, match="10000 events or more"):
        run_table(short, model, None, progress=str)
