"""What every event store does, on SQLite and on PostgreSQL."""

import threading
from random import Random

import pytest

from persona.errors import EventError, PersonaError
from persona.history import Event, History


def event(time, event_id=None, **fields):
    return Event("s", timestamp=time, event_id=event_id, **fields)


FULL = Event("s", 1.5, "שלום 👋 مرحبا", "i", -2.25, {"a": None, "b": 2.0, "ключ": "👩‍👩‍👧‍👦\n"}, "e")


def test_unknown_user(store):
    assert store.history("u") == History("u")
    assert (store.count("u"), store.users(), list(store.export("u"))) == (0, [], [])
    assert (store.revision("u"), store.forget("u"), store.append("u", [])) == (0, 0, 0)


@pytest.mark.parametrize("user", ["أحمد", "👩‍👩‍👧‍👦", "' OR '1'='1", "%", "x" * 256])
def test_user_ids_are_any_unicode_and_never_match_another(store, user):
    store.append("u", [event(1)])
    store.append(user, [event(2)])
    assert [e.timestamp for e in store.history(user).events] == [2]
    assert store.users() == sorted(["u", user])
    assert store.forget(user) == 1 and store.users() == ["u"]


@pytest.mark.parametrize("call", ["append", "history", "count", "export", "forget", "revision"])
@pytest.mark.parametrize(
    "bad", [{"user": ""}, {"user": "\ud83d"}, {"user": 3}, {"user": "u\0"}, {"user": "u", "tenant": ""}]
)
def test_bad_user_ids_are_refused(store, call, bad):
    more = {"events": [event(1)]} if call == "append" else {}
    with pytest.raises(EventError, match="user id"):
        getattr(store, call)(**bad, **more)


@pytest.mark.parametrize("until", [None, 0, 2, 2.5, 99])
@pytest.mark.parametrize("last", [None, -1, 0, 1, 3, 99])
def test_history_cuts_as_history_does(store, until, last):
    events = [event(t, text=str(n)) for n, t in enumerate([2, None, 1, 2, 3, 2, None, 5e10, 1])]
    store.append("u", events)
    expected = History("u", tuple(events))
    expected = expected if until is None else expected.until(until)
    expected = expected if last is None else expected.last(last)
    assert store.history("u", until, last) == expected


def test_ten_thousand_events(store):
    events = [event(n, str(n)) for n in range(10_000)]
    assert store.append("u", events) == 10_000
    assert store.count("u") == 10_000
    assert store.history("u") == History("u", tuple(events))
    assert len(list(store.export("u"))) == 10_000


def test_append_is_idempotent_on_event_id(store):
    assert store.append("u", [event(1, "a"), event(2, "a"), event(3)]) == 2
    assert store.append("u", [event(1, "a"), event(4, "b"), event(3)]) == 2
    assert [e.timestamp for e in store.history("u").events] == [1, 3, 3, 4]
    assert store.append("v", [event(1, "a")]) == 1


def test_milliseconds_are_refused(store):
    with pytest.raises(EventError, match="the timestamp 1760000000000 is in milliseconds, it seems; give seconds"):
        store.append("u", [event(1), event(1_760_000_000_000)])
    assert store.append("u", [event(99_999_999_999), event(-1)]) == 2


def test_a_batch_is_stored_whole_or_not_at_all(store):
    with pytest.raises(EventError, match="no field 'txt'"):
        store.append("u", [event(1), {"source": "s", "txt": "x"}])
    with pytest.raises(PersonaError, match="cannot be used"):
        store.append("u", [event(1), _Unstorable("s")])
    assert store.count("u") == 0


class _Unstorable(Event):
    """An event that only the database refuses."""

    def __post_init__(self):
        object.__setattr__(self, "text", object())


def test_tenants_are_isolated(store):
    store.append("u", [event(1, "a")], tenant="one")
    assert store.append("u", [event(2, "a")], tenant="two") == 1
    assert (store.count("u"), store.users(), store.revision("u")) == (0, [], 0)
    assert store.users(tenant="two") == ["u"]
    assert store.forget("u", tenant="one") == 1
    assert [e.timestamp for e in store.history("u", tenant="two").events] == [2]
    assert store.history("u", tenant="one") == History("u")


def test_export_can_be_appended_again(store):
    store.append("u", [event(2), FULL, event(None), event(2, text="later")])
    exported = list(store.export("u"))
    assert exported[0] == {"source": "s", "timestamp": 2.0}
    assert store.append("v", exported) == 4
    assert store.history("v").events == store.history("u").events


def test_revision_changes_with_every_change_and_never_returns(store):
    seen = [store.revision("u")]
    for _ in range(2):
        store.append("u", [event(1, "a")])
        seen.append(store.revision("u"))
        assert store.append("u", [event(1, "a")]) == 0
        assert store.revision("u") == seen[-1]
        store.append("u", [event(1)])
        seen.append(store.revision("u"))
        store.forget("u")
        assert store.revision("u") == 0
    assert len(set(seen)) == len(seen) == 5


def test_revision_ignores_other_users(store):
    store.append("u", [event(1)])
    revision = store.revision("u")
    store.append("other", [event(1)])
    assert store.revision("u") == revision


def test_an_unfinished_export_does_not_hold_up_forget(store):
    store.append("u", [event(n) for n in range(3)])
    export = store.export("u")
    next(export)
    assert store.forget("u") == 3


def test_many_users_are_read_as_each_of_them_is(store):
    times = Random(0)
    for user in ("a", "b", "ü", "Z"):
        store.append(user, [event(times.choice([None, 1, 2, 3]), text=f"{user}{n}") for n in range(7)])
    store.append("a", [event(9)], tenant="other")
    users = ["ü", "a", "nobody", "Z"]
    for last in (None, 0, 2, 99):
        assert store.histories(users, last) == {user: store.history(user, last=last) for user in users}
    assert store.revisions(users) == {user: store.revision(user) for user in users}
    assert store.histories([]) == {} and store.revisions([]) == {}
    many = [f"user {n}" for n in range(70_000)]  # more than a statement may have parameters
    assert store.revisions([*many, "a"]) == {**dict.fromkeys(many, 0), "a": store.revision("a")}


def test_users_come_in_pages_in_the_order_that_python_sorts_them(store):
    users = ["a", "B", "ä", "a b", "Ω", "😀", "a%", "A"]
    for user in users:
        store.append(user, [event(1), event(2)])
    assert [user for page in store.user_pages(3) for user in page] == sorted(users) == store.users()
    assert [len(page) for page in store.user_pages(3)] == [3, 3, 2]
    with pytest.raises(EventError, match="the tenant ''"):
        store.user_pages(3, tenant="")


def test_many_writers_at_once_lose_nothing(store):
    errors = []

    def work(n):
        try:
            for turn in range(10):
                store.append(f"u{n % 2}", [event(turn, f"{n}-{turn}"), event(turn, "shared")])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [store.count(f"u{n}") for n in range(2)] == [41, 41]


@pytest.mark.parametrize("field", ["text", "item_id", "source"])
def test_what_postgresql_cannot_store_is_said(store, field):
    bad = Event(**{"source": "s", "timestamp": 1.0, field: "a\x00b"})
    if store.database.sqlite:
        assert store.append("u", [bad]) == 1 and store.history("u").events == (bad,)
    else:
        with pytest.raises(EventError, match=f"the {field} .* PostgreSQL cannot store"):
            store.append("u", [event(1), bad])
        assert store.count("u") == 0
