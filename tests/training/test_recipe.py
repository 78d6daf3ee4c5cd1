"""Recipes fail with the field's name; users are split by a seeded shuffle."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from persona.demo.shop import generate_shop
from persona.errors import DataError, RecipeError
from persona.history import Event, History
from persona.training.questions import Catalogue
from persona.training.recipe import (
    Domain,
    SplitConfig,
    load_recipe,
    split_users,
)
from persona.training.trained_on import check_unseen, user_fingerprint, write_trained_on

ADAPTERS = Path(__file__).parents[2] / "adapters"
DEMO = ADAPTERS / "demo" / "recipe.yaml"


@pytest.mark.parametrize("path", sorted(ADAPTERS.glob("*/recipe.yaml")), ids=lambda p: p.parent.name)
def test_the_recipes_that_come_with_the_package_load(path):
    recipe = load_recipe(path)
    assert recipe.name == path.parent.name and recipe.questions and recipe.encoder.max_events >= recipe.window


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("windw",), 5, "windw is not a known key; did you mean 'window'"),
        (("window",), "many", "window .*many"),
        (("encoder", "widht"), 5, "encoder.widht is not a known key; did you mean 'width'"),
        (("encoder", "width"), 30, "encoder .*width 30 must be an even multiple of heads 4"),
        (("training", "steps"), "lots", "training.steps .*lots"),
        (("sources", "visit", "kind"), "audio", "sources.visit.kind .*audio"),
        (("questions", "favourite_category", "kind"), "guess", "questions.favourite_category.kind .*guess"),
        (("questions", "favourite_category", "attribute"), None, "questions.favourite_category .*attribute"),
        (("questions", "favourite_category", "source"), "radio", "questions name the source 'radio'"),
        (("split", "seed"), 1.5, "split.seed .*1.5"),
        (("split", "validation"), 0.3, "split train 0.8 and validation 0.3 are shares .* together below 1"),
        (("split", "validation"), 0.2, "split train 0.8 and validation 0.2 are shares"),
        (("split", "validation"), 0, "split train 0.8 and validation 0 are shares .* above 0"),
        (("split", "train"), -0.1, "split train -0.1 and"),
        (("split", "train"), float("nan"), "split train nan and"),
        (
            ("sources", "visit", "line"),
            "visited {txt}",
            "sources.visit.line names 'txt', which no reader of the source 'visit' makes; did you mean 'text'",
        ),
        (("sources", "profile", "line"), "{text} {ctiy}", "sources.profile.line names 'ctiy', .* did you mean 'city'"),
        (("sources", "search", "line"), "{city}", "sources.search.line names 'city', .* fields are text, value, item"),
        (("sources", "visit", "line"), "visited {text", "sources.visit.line: .*'visited {text' does not parse"),
    ],
)
def test_mistakes_are_named(tmp_path, place, value, message):
    data = yaml.load(DEMO.read_text(encoding="utf-8"), yaml.SafeLoader)
    at = data
    for key in place[:-1]:
        at = at.setdefault(key, {})
    at[place[-1]] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"recipe\.yaml: {message}"):
        load_recipe(path)


def test_a_reader_of_an_unknown_source(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(DEMO.read_text(encoding="utf-8").replace("- source: visit", "- source: visits"), encoding="utf-8")
    with pytest.raises(RecipeError, match="readers name the source 'visits'"):
        load_recipe(path)


def test_a_source_without_readers_may_have_any_attribute(tmp_path):
    text = DEMO.read_text(encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        text.replace("sources:\n", 'sources:\n  radio: {kind: text, line: "{station}"}\n'), encoding="utf-8"
    )
    assert load_recipe(path).sources["radio"].line == "{station}"


@pytest.mark.parametrize("name", ["visit/eu", "/", '""'])
def test_a_source_that_a_vocabulary_could_not_tell_from_others(tmp_path, name):
    text = DEMO.read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(text.replace("sources:\n", f"sources:\n  {name}: {{kind: text}}\n"))
    with pytest.raises(RecipeError, match=r"sources has the name .*; a name is not empty and holds no '/'"):
        load_recipe(tmp_path / "recipe.yaml")


def test_users_are_split_by_seed_and_never_shared():
    users = [f"u{i}" for i in range(100)]
    parts = split_users(users, SplitConfig())
    assert [len(p) for p in parts] == [80, 10, 10]
    assert sorted(u for part in parts for u in part) == sorted(users)
    assert parts == split_users(users, SplitConfig())
    assert parts[2] != split_users(users, SplitConfig(seed=1))[2]


def test_too_few_users():
    with pytest.raises(DataError, match="3 users cannot be split"):
        split_users(["a", "b", "c"], SplitConfig())


def test_the_catalogue_knows_only_training_users(domain):
    bought = {e.item_id for u in domain.train for e in domain.histories[u].events if e.source == "purchase"}
    assert set(domain.catalogue.items["purchase"]) == bought
    counted = sum(i.count for i in domain.catalogue.items["purchase"].values())
    assert counted == sum(e.source == "purchase" for u in domain.train for e in domain.histories[u].events)


def test_training_cuts_come_from_training_users_and_are_cut_strictly(domain):
    rng, users, lengths = np.random.default_rng(0), set(), []
    for _ in range(300):
        cut = domain.training_cut(rng)
        users.add(cut.history.user)
        lengths.append(len(cut.history.timed))
        assert cut.history.timed[-1].timestamp < cut.future[0].timestamp
        whole = domain.histories[cut.history.user].events
        assert all(event in whole for event in cut.history.events)
    assert users <= set(domain.train) and len(users) > 30
    assert min(lengths) <= 3 and max(lengths) > 40


def test_evaluation_cuts_of_test_users(domain):
    cuts = domain.cuts(domain.test)
    assert {user for user, _ in cuts} <= set(domain.test) and len(cuts) == 4 * len(domain.test)
    for user, cut in cuts:
        assert cut.history.user == user and 10 <= len(cut.history.timed) <= domain.recipe.window
        assert cut.history.timed[-1].timestamp < cut.future[0].timestamp


def test_a_domain_without_answers_names_the_question(domain):
    spec = replace(domain.recipe.questions["favourite_category"], attribute="colour")
    recipe = replace(domain.recipe, questions={"colour": spec})
    with pytest.raises(RecipeError, match=r"questions\.colour: no training event of source 'purchase'"):
        Catalogue([History("u", domain.histories[domain.train[0]].events)], recipe.questions)


def test_no_records(domain, tmp_path):
    with pytest.raises(DataError):
        Domain(domain.recipe, tmp_path)


def test_users_somebody_was_trained_on_are_never_taken_for_test_users(domain, tmp_path):
    write_trained_on(domain.fingerprints(domain.train), tmp_path)
    check_unseen(domain.fingerprints(domain.test + domain.validation), tmp_path)
    with pytest.raises(DataError, match=r"trained on 1 of the 2 users"):
        check_unseen(domain.fingerprints([domain.train[0], domain.test[0]]), tmp_path)
    check_unseen(domain.fingerprints(domain.train), tmp_path / "a folder without a note")


def test_a_fingerprint_outlives_new_events_and_tells_namesakes_apart(domain):
    history = domain.histories[domain.train[0]]
    grown = history.of([*history.events, Event("search", 9e9, text="new")])
    assert user_fingerprint(grown) == user_fingerprint(history) == user_fingerprint(history.last(10_000))
    namesake = history.of(domain.histories[domain.train[1]].events)
    assert user_fingerprint(namesake) != user_fingerprint(history)


def test_window_and_max_events_must_agree(tmp_path):
    text = DEMO.read_text(encoding="utf-8")
    for wrong in ("window: 32", "window: 0", "window: many"):
        (tmp_path / "recipe.yaml").write_text(text.replace("window: 64", wrong), encoding="utf-8")
        with pytest.raises(RecipeError, match="window"):
            load_recipe(tmp_path / "recipe.yaml")


def test_records_without_enough_users_say_what_was_read(domain, tmp_path):
    generate_shop(tmp_path, users=2)
    with pytest.raises(DataError, match=r"2 users cannot be split .* rows gave .* events"):
        Domain(domain.recipe, tmp_path)


def test_a_cut_that_no_training_user_reaches_names_min_events(domain, tmp_path):
    generate_shop(tmp_path, users=20)
    asked = {"top": replace(domain.recipe.questions["favourite_category"], choices=2)}
    recipe = replace(domain.recipe, questions=asked, split=SplitConfig(min_events=9999))
    with pytest.raises(
        DataError, match=r"min_events is 9999, .* has \d+ events, of which the window takes 64; lower it"
    ):
        Domain(recipe, tmp_path)


def test_questions_that_nothing_answers_say_what_was_read(domain, tmp_path):
    generate_shop(tmp_path, users=20)
    readers = [replace(r, time_format="%d.%m.%Y") if r.source == "purchase" else r for r in domain.recipe.readers]
    with pytest.raises(RecipeError, match=r"source 'purchase' has .*\. What was read: .* is not a time in the format"):
        Domain(replace(domain.recipe, readers=readers), tmp_path)
