import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from persona.errors import EventError, PersonaError
from persona.history import Event, History
from persona.store import EventStore
from persona.store.events import _events


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.db"


@pytest.fixture
def store(path):
    with EventStore(f"sqlite:///{path}") as store:
        yield store


def event(time, event_id=None, **fields):
    return Event("s", timestamp=time, event_id=event_id, **fields)


FULL = Event("s", 1.5, "שלום 👋 مرحبا", "i", -2.25, {"a": None, "b": 2.0, "ключ": "👩‍👩‍👧‍👦\n"}, "e")


def test_unknown_user(store):
    assert store.history("u") == History("u")
    assert (store.count("u"), store.users(), list(store.export("u"))) == (0, [], [])
    assert (store.revision("u"), store.forget("u"), store.append("u", [])) == (0, 0, 0)


def test_an_event_comes_back_whole_after_reopening(path, store):
    assert store.append("u", [FULL]) == 1
    store.close()
    assert EventStore(f"sqlite:///{path}").history("u") == History("u", (FULL,))


@pytest.mark.parametrize("user", ["أحمد", "👩‍👩‍👧‍👦", "' OR '1'='1", "%", "u\x00v", "x" * 256])
def test_user_ids_are_any_unicode_and_never_match_another(store, user):
    store.append("u", [event(1)])
    store.append(user, [event(2)])
    assert [e.timestamp for e in store.history(user).events] == [2]
    assert store.users() == sorted(["u", user])
    assert store.forget(user) == 1 and store.users() == ["u"]


@pytest.mark.parametrize("call", ["append", "history", "count", "export", "forget", "revision"])
@pytest.mark.parametrize("bad", [{"user": ""}, {"user": "\ud83d"}, {"user": 3}, {"user": "u", "tenant": ""}])
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


def test_the_newest_events_are_found_by_index(path, store):
    statements = []
    sa.event.listen(
        store._engine, "before_cursor_execute", lambda c, cur, sql, params, *_: statements.append((sql, params))
    )
    store.history("u", until=5, last=3)
    plan = sqlite3.connect(path).execute("EXPLAIN QUERY PLAN " + statements[-1][0], statements[-1][1]).fetchall()
    searches = [step[3] for step in plan if "persona_events" in step[3]]
    assert len(searches) == 2
    assert all("USING INDEX persona_events_by_time (tenant=? AND user_id=? AND timestamp" in step for step in searches)


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


def test_forget_leaves_no_byte_in_any_file(tmp_path, path, store):
    # Users and sizes are mixed, so that pages split and merge, which leaves copies that a DELETE does not blank.
    random = Random(0)
    people = {f"person-{random.getrandbits(64):x}": f"secret-{n:02}-" for n in range(60)}
    for turn in range(300):
        user = random.choice(list(people))
        mark = people[user]
        fields = {"item_id": mark, "text": mark + "y" * random.choice([5, 50, 500, 6000]), "attributes": {mark: mark}}
        count = random.choice([1, 1, 5, 20])
        store.append(user, [event(random.random(), f"{mark}{turn}-{n}", **fields) for n in range(count)])
    users = list(people)
    words = {*people, *people.values()}
    assert _holds(tmp_path, *words) == words
    for user in users[:30]:
        assert store.forget(user) > 0
    assert (tmp_path / "events.db-wal").stat().st_size == 0
    assert _holds(tmp_path, *words) == {word for user in users[30:] for word in (user, people[user])}
    assert store.users() == sorted(users[30:])


def _holds(folder, *words):
    content = b"".join(file.read_bytes() for file in folder.iterdir())
    return {word for word in words if word.encode() in content}


def test_forget_does_not_claim_what_a_reader_prevents(path, tmp_path):
    store = EventStore(f"sqlite:///{path}", timeout=0.05)
    store.append("u", [event(1, text="secret")])
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM persona_events").fetchall()
    with pytest.raises(PersonaError, match="call again"):
        store.forget("u")
    assert store.count("u") == 0
    reader.close()
    assert store.forget("u") == 0
    assert _holds(tmp_path, "secret") == set()


def test_users_are_forgotten_by_many_threads_while_others_write(tmp_path, store):
    users = [f"user-{n:02}" for n in range(24)]
    for user in users:
        store.append(user, [event(n, text=f"secret of {user}") for n in range(5)])

    def work(user):
        for turn in range(3):
            store.append(f"kept-{user}", [event(turn, text=f"{user} is kept")])
        return store.forget(user)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(work, users)) == [5] * 24
    assert _holds(tmp_path, *(f"secret of {user}" for user in users)) == set()
    assert len(store.users()) == 24


def test_an_unfinished_export_does_not_hold_up_forget(store):
    store.append("u", [event(n) for n in range(3)])
    export = store.export("u")
    next(export)
    assert store.forget("u") == 3


@pytest.mark.parametrize("url", ["file", "sqlite://"])
def test_threads_share_a_store(path, url):
    store = EventStore(f"sqlite:///{path}" if url == "file" else url)
    errors = []

    def work(n):
        try:
            for turn in range(10):
                store.append(f"u{n % 4}", [event(turn, f"{n}-{turn}"), event(turn, "shared")])
                store.history(f"u{n % 4}", last=2)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [store.count(f"u{n}") for n in range(4)] == [41] * 4


WRITER = """
import sys
from persona.history import Event
from persona.store import EventStore

store = EventStore(sys.argv[1])
for n in range(1_000_000):
    store.append("u", [Event("s", n, "x" * 2000, event_id=f"{n}-{part}") for part in range(3)])
    print(n, flush=True)
"""


def test_a_killed_writer_loses_nothing_it_acknowledged(path):
    url = f"sqlite:///{path}"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True)
    acknowledged = [int(writer.stdout.readline()) for _ in range(40)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    assert writer.wait() == -signal.SIGKILL
    store = EventStore(url)
    stored = [int(e.timestamp) for e in store.history("u").events]
    assert len(stored) % 3 == 0, "a batch was cut"
    assert set(stored[::3]) >= set(acknowledged) and len(stored) // 3 <= len(acknowledged) + 1
    assert store.append("u", [event(1, "after")]) == 1
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_locked_database_is_waited_for_no_longer_than_said(path):
    with EventStore(f"sqlite:///{path}", timeout=0.2) as store:
        store.append("u", [event(1)])
        store.close()
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        for call in (store.check, lambda: store.history("u"), lambda: store.append("u", [event(2)])):
            with pytest.raises(PersonaError, match="database is locked"):
                call()
        assert 0.5 < time.monotonic() - started < 5
        other.close()
        store.check()
        assert store.append("u", [event(2)]) == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_removed_or_replaced_is_noticed(tmp_path, path, store, replaced):
    store.append("u", [event(1)])
    store.check()
    for file in tmp_path.glob("events.db*"):
        file.unlink()
    if replaced:
        EventStore(f"sqlite:///{path}").append("u", [event(2)])
    calls = [store.check, store.users, lambda: store.append("u", [event(2)]), lambda: list(store.export("u"))]
    for call in [*calls, *(partial(getattr(store, n), "u") for n in ("history", "count", "revision", "forget"))]:
        with pytest.raises(PersonaError, match="was removed or replaced"):
            call()


def test_a_folder_that_becomes_a_file_is_noticed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    store = EventStore(f"sqlite:///{folder / 'events.db'}")
    folder.rename(tmp_path / "away")
    folder.write_text("")
    with pytest.raises(PersonaError, match="was removed or replaced"):
        store.check()


def test_a_database_in_memory_is_always_there():
    with EventStore("sqlite://") as store:
        store.append("u", [event(1)])
        store.check()
        assert store.count("u") == 1


def test_sqlite_is_set_up_to_lose_and_leave_nothing(store):
    with store._engine.connect() as connection:
        values = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "secure_delete", "busy_timeout")
        ]
    assert values == ["wal", 2, 1, 30000]


def test_a_file_that_is_no_database(path):
    path.write_bytes(b"this is not a database, but it is long enough to be looked at" * 100)
    with pytest.raises(PersonaError, match=f"{path} cannot be used: file is not a database"):
        EventStore(f"sqlite:///{path}")


def test_a_damaged_database(path):
    with EventStore(f"sqlite:///{path}") as store:
        store.append("u", [event(n, text="x" * 3000) for n in range(50)])
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(PersonaError, match=str(path)):
        EventStore(f"sqlite:///{path}").history("u")


def test_a_folder_that_is_not_there_or_cannot_hold_files(tmp_path):
    with pytest.raises(PersonaError, match=r"none/events\.db cannot be used: unable to open"):
        EventStore(f"sqlite:///{tmp_path}/none/events.db")
    with pytest.raises(PersonaError, match=r"/proc/events\.db cannot be used"):
        EventStore("sqlite:////proc/events.db")


@pytest.mark.parametrize("url, message", [("nonsense", "not a database URL"), ("mssql://x/y", "works with sqlite")])
def test_urls_that_cannot_work(url, message):
    with pytest.raises(PersonaError, match=message):
        EventStore(url)


@pytest.mark.parametrize(
    "url",
    [
        "mssql://bob:hunter2@host/db",
        "mysql://bob@host/db?password=hunter2",
        "postgresql+nodriver://bob:hunter2@host/db",
        "postgresql://bob:x@host:hunter2/db",
        "postgresql//bob:hunter2@host/db",
        "hunter2",
        "postgresql+psycopg://bob:hunter2@127.0.0.1:1/db",
    ],
)
def test_no_message_shows_a_password(url):
    with pytest.raises(PersonaError) as error:
        EventStore(url)
    report = "".join(traceback.format_exception(error.value, chain=True))
    assert "hunter2" not in str(error.value) and "hunter2" not in report


def test_a_message_shows_the_rest_of_the_url():
    with pytest.raises(PersonaError, match=r"mssql://bob:\*\*\*@host/db"):
        EventStore("mssql://bob:hunter2@host/db")
    with pytest.raises(PersonaError, match="the given postgresql:// URL is not a database URL"):
        EventStore("postgresql://bob:x@host:port/db")


def test_the_schema_compiles_for_postgresql():
    statements = [CreateTable(_events, if_not_exists=True), *(CreateIndex(index) for index in _events.indexes)]
    text = "\n".join(str(statement.compile(dialect=postgresql.dialect())) for statement in statements)
    assert "seq BIGSERIAL" in text and "UNIQUE (tenant, user_id, event_id)" in text
