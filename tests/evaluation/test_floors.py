"""Floors on records small enough to compute by hand."""

import json
import math

import pytest

from persona.evaluation.collaborative import ItemCosine
from persona.evaluation.floors import Floors, ItemBias
from persona.history import Event, History, ReaderSpec, SourceSpec
from persona.training.configs import SplitConfig
from persona.training.questions import Cut, Question, QuestionSpec
from persona.training.recipe import Domain, Recipe


@pytest.fixture
def domain(tmp_path):
    return make_domain(tmp_path)


def make_domain(tmp_path, min_events=1):
    """Ten users; odd ones rate a and b, even ones c and d; a gets 5, all else 3."""
    rows = []
    for user in range(10):
        for n, item in enumerate("ab" if user % 2 else "cd"):
            rows.append({"u": user, "t": n, "i": item, "v": 5 if item == "a" else 3})
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe(
        name="hand",
        sources={"r": SourceSpec("item")},
        readers=[ReaderSpec("r", "r.jsonl", user="u", timestamp="t", item_id="i", value="v", text="{i}")],
        questions={
            "next": QuestionSpec("next_item", "r", "{item}?"),
            "stars": QuestionSpec("next_value", "r", "{item}?"),
        },
        split=SplitConfig(min_events=min_events),
    )
    return Domain(recipe, tmp_path)


def cut(*items):
    events = [Event("r", float(n), item_id=i, value=v) for n, (i, v) in enumerate(items)]
    return Cut(History("u", tuple(events)), (), frozenset(), frozenset())


def test_item_cosine_prefers_what_the_same_users_took(domain):
    floor = ItemCosine([domain.histories[u] for u in domain.train], "r")
    assert floor.score(cut(("a", 5.0)).history.events, "b") == pytest.approx(1.0)
    assert floor.score(cut(("a", 5.0)).history.events, "c") == 0.0
    assert floor.score(cut(("a", 5.0)).history.events, "never seen") == 0.0
    assert floor.score(cut().history.events, "a") == 0.0


def test_bias_adds_shrunk_item_and_user_means(domain):
    histories = [domain.histories[user] for user in domain.train]
    floor = ItemBias(histories, "r", shrink=0.0)
    assert floor.predict(cut().history, "a") == pytest.approx(5.0)
    assert floor.predict(cut(("b", 4.0)).history, "a") == pytest.approx(6.0)  # this user gives one more than others
    assert floor.predict(cut().history, "never seen") == pytest.approx(floor.mean)
    assert abs(ItemBias(histories, "r", shrink=5.0).predict(cut().history, "a") - floor.mean) < abs(5.0 - floor.mean)


def test_floors_answer_only_what_they_can(domain):
    floors = Floors(domain)
    stars = Question("stars", "?", "5", ("3", "5"), "a")
    following = Question("next", "?", "yes", ("yes", "no"), "a")
    assert floors.cosine(stars, cut(), "a") is None and floors.bias(following, cut(), "a") is None
    assert max(floors.bias(stars, cut(), "a"), key=floors.bias(stars, cut(), "a").get) in ("3", "5")
    assert floors.majority(stars) == {"3": 1.0}
    assert floors.majority(following)["yes"] == domain.catalogue.items["r"]["a"].count


STARS = Question("stars", "?", "5", ("3", "5"), "a")
NEXT = Question("next", "?", "yes", ("yes", "no"), "a")


def test_no_majority_when_no_training_user_has_enough_events(tmp_path):
    floors = Floors(make_domain(tmp_path, min_events=5))
    assert floors.majority(STARS) is None
    assert floors.majority(NEXT) is not None and floors.bias(STARS, cut(), "a") is not None


@pytest.mark.parametrize("item_id, value", [(None, 3.0), ("a", None), (None, None)])
def test_a_floor_without_ids_or_values_to_fit_is_left_out(domain, item_id, value):
    domain.histories = {
        user: History(user, tuple(Event("r", e.timestamp, item_id=item_id, value=value) for e in h.events))
        for user, h in domain.histories.items()
    }
    floors = Floors(domain)
    assert (floors.cosine(NEXT, cut(), "a") is None) == (item_id is None)
    bias = floors.bias(STARS, cut(("b", 4.0)), "a")
    assert bias is None if value is None else all(math.isfinite(score) for score in bias.values())
