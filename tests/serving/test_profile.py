"""Text profiles: what is chosen from a history, in which words, and within which length."""

import pytest

from persona.history import Event, History, SourceSpec
from persona.serving.profile import FITTING, HEAD, MAX_EVENTS, NEWEST, TextProfiles, best_matches, write_profile
from persona.store import EventStore


@pytest.fixture
def store(tmp_path):
    with EventStore(f"sqlite:///{tmp_path / 'events.db'}") as store:
        yield store


@pytest.fixture
def profiles(store):
    return TextProfiles(store)


def bought(time, text, **fields):
    return Event("purchase", float(time), text=text, **fields)


def profile(events, ask="What next?", sources=None, **options):
    return write_profile(History("u", tuple(events)), ask, sources or {}, **options)


def lines(text):
    head, *rest = text.split("\n")
    assert head == HEAD and all(line.startswith("- ") for line in rest)
    return [line[2:] for line in rest]


def test_facts_then_the_newest_and_those_that_fit_in_time_order():
    events = [bought(i, f"item{i} thing") for i in range(100)] + [Event("profile", attributes={"city": "Bonn"})]
    events[7] = bought(7, "oak violin")
    shown = lines(profile(events, "Does this user play the violin?"))
    assert shown[:2] == ["profile: city: Bonn", "purchase: oak violin"]
    assert shown[2:] == [f"purchase: item{i} thing" for i in range(100 - NEWEST, 100)]


def test_best_matches_come_first_and_share_words():
    texts = ["oak violin", "drum", "violin violin", "vinyl"]
    assert set(best_matches(texts, "a violin?", 5)) == {0, 2}
    assert len(best_matches(["violin"] * 50, "violin", FITTING)) == FITTING
    assert best_matches(texts, "zither", 5) == []


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["the", "of"], ["a b c"], ["!?"]])
@pytest.mark.parametrize("query", ["", "the", "violin", "…"])
def test_nothing_to_match(texts, query):
    assert best_matches(texts, query, 5) == []


def test_other_scripts_match():
    assert best_matches(["כינור אלון", "скрипка"], "Какая скрипка?", 5) == [1]


def test_one_event_and_none():
    assert lines(profile([bought(1, "oak violin")], "zzz")) == ["purchase: oak violin"]
    assert profile([]) is None


def test_what_happens_again_is_one_line_where_it_happened_last():
    events = [bought(i, text) for i, text in enumerate(["oak violin", "drum", "oak violin", "oak violin", "vinyl"])]
    assert lines(profile(events)) == ["purchase: drum", "purchase: oak violin (3 times)", "purchase: vinyl"]


def test_default_lines_say_all_that_an_event_holds():
    events = [
        Event("profile", attributes={"age": 40.0, "city": "Bonn", "tier": None}),
        Event("app", 1.0, item_id="radio"),
        Event("page", 2.0),
        bought(3, "oak\nviolin", item_id="sku1", value=58.5, attributes={"shop": "north"}),
    ]
    assert lines(profile(events)) == [
        "profile: age: 40, city: Bonn",
        "app: radio",
        "page:",
        "purchase: oak violin (58.5, shop: north)",
    ]


def test_lines_by_the_recipes_templates():
    sources = {"purchase": SourceSpec("item", line="bought {text} for {value:.0f}")}
    events = [bought(1, "oak violin", value=58.0), Event("secret", 2.0, text="not of the recipe")]
    assert lines(profile(events, sources=sources)) == ["bought oak violin for 58"]
    assert profile(events[1:], sources=sources) is None


def test_the_budget_holds_and_long_lines_are_cut():
    events = [bought(i, f"item{i} " + "word " * 100) for i in range(30)]
    text = profile(events, "word", budget=700)
    assert len(text) <= 700 and len(lines(text)) == 3
    assert lines(text)[-1].startswith("purchase: item29")  # the newest are the last to go
    assert profile(events, budget=10) is None


def test_only_this_user_of_this_tenant_is_read(store, profiles):
    store.append("ana", [bought(1, "oak violin")])
    store.append("ben", [bought(1, "drum stick violin")])
    store.append("ana", [bought(1, "vinyl violin")], tenant="two")
    text, outcome = profiles.profile("ana", "violin")
    assert lines(text) == ["purchase: oak violin"] and outcome.personalized and not outcome.truncated
    assert lines(profiles.profile("ana", "violin", tenant="two")[0]) == ["purchase: vinyl violin"]
    assert profiles.profile("cleo", "violin")[1].reason == "unknown-user"


def test_of_a_very_long_history_the_newest_is_searched(store, profiles):
    store.append("ana", [bought(0, "the very first zither")] + [bought(i, "thing") for i in range(1, MAX_EVENTS + 1)])
    text, outcome = profiles.profile("ana", "zither")
    assert outcome.truncated and "zither" not in text


def test_chats_keep_their_shared_system_prompt_in_front(store, profiles):
    store.append("ana", [bought(i, text) for i, text in enumerate(["oak violin", *(f"thing {i}" for i in range(20))])])
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    last = {"role": "user", "content": "Which violin?", "name": "x"}
    body = {"model": "m", "messages": [system, first, last]}
    edited, outcome = profiles.chat(body, "ana")
    assert outcome.personalized and edited["messages"][:2] == [system, first] and edited["model"] == "m"
    content = edited["messages"][2]["content"]
    assert content.startswith(HEAD) and "- purchase: oak violin\n" in content and content.endswith("\n\nWhich violin?")
    assert edited["messages"][2]["name"] == "x" and body["messages"][2] is last
    parts = [{"type": "text", "text": "Which violin?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    edited, _ = profiles.chat({"messages": [system, {"role": "user", "content": parts}]}, "ana")
    assert edited["messages"][1]["content"][1:] == parts
    assert "oak violin" in edited["messages"][1]["content"][0]["text"]
    assert "oak violin" not in profiles.chat(body, "ana", instruction="drums")[0]["messages"][2]["content"]


@pytest.mark.parametrize("messages", [None, [], [{"role": "system", "content": "x"}], [{"role": "user"}], "x", 5])
def test_a_chat_without_a_user_turn_stays_as_it_is(profiles, store, messages):
    store.append("ana", [bought(1, "oak violin")])
    body = {"messages": messages}
    edited, outcome = profiles.chat(body, "ana")
    assert edited is body and outcome.reason == "no-user-turn"


def test_completions(store, profiles):
    store.append("ana", [bought(1, "oak violin")])
    one, outcome = profiles.completion({"prompt": "Which?"}, "ana")
    assert outcome.personalized and one["prompt"] == f"{HEAD}\n- purchase: oak violin\n\nWhich?"
    assert profiles.completion({"prompt": ["a", "b"]}, "ana")[0]["prompt"][1].endswith("\n\nb")
    for body, reason in (
        ({"prompt": [1, 2]}, "no-user-turn"),
        ({"prompt": []}, "no-user-turn"),
        ({}, "no-user-turn"),
        ({"prompt": "x", "echo": True}, "echo"),
    ):
        edited, outcome = profiles.completion(body, "ana")
        assert edited is body and outcome.reason == reason
    body = {"prompt": "x"}
    assert profiles.completion(body, "nobody") == (body, profiles.profile("nobody", "x")[1])
