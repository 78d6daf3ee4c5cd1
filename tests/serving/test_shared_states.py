"""Two processes' states with one store and one cache between them."""

import logging
import time

import pytest
import torch

from persona.errors import PersonaError
from persona.history import Event
from persona.serving.shared_states import PAUSE, SharedStates
from persona.serving.states import UserStates
from persona.store import EventStore, open_embeddings, space_name

EVENTS = [Event("purchase", float(i), text=f"{word} music") for i, word in enumerate(["violin", "drum", "horn"])]
SPACE = space_name("0a1b")


@pytest.fixture
def store(tmp_path):
    with EventStore(f"sqlite:///{tmp_path / 'events.db'}") as store:
        yield store


@pytest.fixture(params=["store", "redis"])
def embeddings(request, store):
    where = "store"
    if request.param == "redis":
        server = request.getfixturevalue("redis_server")
        server.empty()
        where = server.url
    return open_embeddings(where, store)


@pytest.fixture
def two(encoder, store, embeddings):
    """The states of two servers."""
    return [UserStates(encoder, store, shared=SharedStates(embeddings, SPACE)) for _ in range(2)]


@pytest.fixture
def reads(encoder, monkeypatch):
    """How many histories the encoder reads, and by how many events it continues states."""
    counts = {"read": 0, "extended": 0}
    read, extend = encoder.read, encoder.extend

    def counted_read(histories, *more):
        counts["read"] += len(histories)
        return read(histories, *more)

    def counted_extend(state, events):
        counts["extended"] += len(events)
        return extend(state, events)

    monkeypatch.setattr(encoder, "read", counted_read)
    monkeypatch.setattr(encoder, "extend", counted_extend)
    return counts


def same(one, other):
    return torch.equal(one.states, other.states) and torch.equal(one.memory, other.memory)


def test_what_one_has_encoded_the_other_does_not(two, store, reads):
    store.append("ana", EVENTS)
    first, second = (states.get("ana") for states in two)
    assert same(first, second) and reads == {"read": 1, "extended": 0}
    assert [(states.hits, states.misses) for states in two] == [(0, 1), (1, 0)]
    assert two[1].get("ana") is second and two[1].hits == 2


def test_an_event_is_seen_by_all_at_once_and_encoded_once(two, store, encoder, reads):
    store.append("ana", EVENTS[:2])
    for states in two:
        states.get("ana")
    store.append("ana", EVENTS[2:])
    states = [each.get("ana") for each in two]
    assert reads == {"read": 1, "extended": 1} and same(*states)
    torch.testing.assert_close(states[0].states, encoder.read([store.history("ana")])[0].states)


def test_a_state_of_another_process_is_continued(two, store, reads):
    store.append("ana", EVENTS[:2])
    two[0].get("ana")
    store.append("ana", EVENTS[2:])
    assert two[1].get("ana").events == 3  # which has never had the user in memory
    assert reads == {"read": 1, "extended": 1}


def test_a_state_of_other_events_is_not_continued(two, store, reads):
    store.append("ana", EVENTS[:2])
    two[0].get("ana")
    store.append("ana", [Event("purchase", 0.5, text="came late"), *EVENTS[2:]])
    assert two[1].get("ana").events == 4
    assert reads == {"read": 2, "extended": 0}


def test_forgetting_leaves_nothing_anywhere(two, store, embeddings):
    store.append("ana", EVENTS)
    store.append("bob", EVENTS)
    for states in two:
        states.get("ana"), states.get("bob")
    assert two[0].forget("ana") == 3
    assert set(embeddings.get(["ana", "bob"], SPACE)) == {"bob"}
    assert two[1].get("ana") is None and ("default", "ana") not in two[1]


def test_what_comes_into_the_cache_after_a_user_was_forgotten_elsewhere_goes_again(two, store, embeddings):
    store.append("ana", EVENTS)
    shared, put = two[0].shared, two[0].shared.put

    def late(*args, **kwargs):
        two[1].forget("ana")
        put(*args, **kwargs)

    shared.put = late
    two[0].get("ana")
    assert embeddings.get(["ana"], SPACE) == {} and ("default", "ana") not in two[0]
    assert two[0].get("ana") is None


def test_who_is_forgotten_and_comes_back_while_being_encoded_leaves_nothing_old(two, store, embeddings):
    store.append("ana", EVENTS)
    shared, put = two[0].shared, two[0].shared.put

    def late(*args, **kwargs):
        shared.put = put
        two[1].forget("ana")
        store.append("ana", [Event("purchase", 9.0, text="somebody new")])
        put(*args, **kwargs)

    shared.put = late
    two[0].get("ana")
    assert embeddings.get(["ana"], SPACE) == {}
    assert two[0].get("ana").events == two[1].get("ana").events == 1


def test_an_event_that_arrives_while_the_cache_is_away_costs_personalisation_nothing(
    encoder, store, redis_server, caplog
):
    states = UserStates(encoder, store, shared=SharedStates(open_embeddings(redis_server.url, store), SPACE))
    store.append("ana", EVENTS[:2])
    put = states.shared.put

    def late(*args, **kwargs):
        store.append("ana", EVENTS[2:])
        put(*args, **kwargs)

    states.shared.put = late
    redis_server.stop()
    try:
        assert states.get("ana").events == 2
    finally:
        redis_server.start()
    assert "the shared cache is not used" in caplog.text and ("default", "ana") in states


def test_what_is_forgotten_meanwhile_goes_from_a_cache_that_has_just_failed(two, store, embeddings):
    store.append("ana", EVENTS)
    shared, put = two[0].shared, two[0].shared.put

    def late(*args, **kwargs):
        put(*args, **kwargs)
        two[1].forget("ana")
        put(*args, **kwargs)
        shared._failed(PersonaError("another request had to wait for too long"))

    shared.put = late
    two[0].get("ana")
    assert embeddings.get(["ana"], SPACE) == {}


def test_tenants_share_nothing(two, store, reads):
    store.append("ana", EVENTS, tenant="shop")
    store.append("ana", EVENTS[:1], tenant="cinema")
    for states in two:
        assert [states.get("ana", tenant=tenant).events for tenant in ("shop", "cinema")] == [3, 1]
    assert two[1].get("ana") is None and reads["read"] == 2


def test_another_encoder_shares_nothing(encoder, store, embeddings, reads):
    store.append("ana", EVENTS)
    for revision in ("0a1b", "2c3d"):
        UserStates(encoder, store, shared=SharedStates(embeddings, space_name(revision))).get("ana")
    assert reads["read"] == 2 and embeddings.spaces() == {space_name("0a1b"): 1, space_name("2c3d"): 1}


def test_damaged_values_are_encoded_anew(two, store, embeddings, caplog):
    store.append("ana", EVENTS)
    two[0].get("ana")
    found = embeddings.get(["ana"], SPACE)["ana"]
    embeddings.put({"ana": found._replace(value=found.value[:-5])}, SPACE)
    assert two[1].get("ana").events == 3
    assert "a state in the shared cache is made anew" in caplog.text and "not used" not in caplog.text
    assert embeddings.get(["ana"], SPACE) == {"ana": found}


def test_a_cache_that_is_away_costs_personalisation_nothing(encoder, store, redis_server, caplog):
    embeddings = open_embeddings(redis_server.url, store)
    states = UserStates(encoder, store, shared=SharedStates(embeddings, SPACE))
    store.append("ana", EVENTS)
    store.append("bob", EVENTS)
    redis_server.stop()
    try:
        with caplog.at_level(logging.WARNING, "persona.serving"):
            assert states.get("ana").events == states.get("bob").events == 3
        assert caplog.text.count("the shared cache is not used") == 1  # then it is left alone for a while
        with pytest.raises(PersonaError, match="events are erased, but not what the shared cache holds"):
            states.forget("ana")
        assert store.count("ana") == 0 and states.get("ana") is None
    finally:
        redis_server.start()
    assert states.forget("ana") == 0
    time.sleep(PAUSE)
    store.append("bob", [Event("purchase", 9.0)])
    states.get("bob")
    assert set(embeddings.get(["ana", "bob"], SPACE)) == {"bob"}
