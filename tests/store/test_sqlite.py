"""What is SQLite's own: files, locks, bytes."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random

import pytest
import sqlalchemy as sa

from persona.errors import PersonaError
from persona.history import Event, History
from persona.store import EventStore


def event(time, event_id=None, **fields):
    return Event("s", timestamp=time, event_id=event_id, **fields)


FULL = Event("s", 1.5, "שלום 👋 مرحبا", "i", -2.25, {"a": None, "b": 2.0, "ключ": "👩‍👩‍👧‍👦\n"}, "e")


def test_an_event_comes_back_whole_after_reopening(path, sqlite_store):
    assert sqlite_store.append("u", [FULL]) == 1
    sqlite_store.close()
    assert EventStore(f"sqlite:///{path}").history("u") == History("u", (FULL,))


def test_the_newest_events_are_found_by_index(path, sqlite_store):
    statements = []
    sa.event.listen(
        sqlite_store.database._engine,
        "before_cursor_execute",
        lambda c, cur, sql, params, *_: statements.append((sql, params)),
    )
    sqlite_store.history("u", until=5, last=3)
    plan = sqlite3.connect(path).execute("EXPLAIN QUERY PLAN " + statements[-1][0], statements[-1][1]).fetchall()
    searches = [step[3] for step in plan if "persona_events" in step[3]]
    assert len(searches) == 2
    assert all("USING INDEX persona_events_by_time (tenant=? AND user_id=? AND timestamp" in step for step in searches)


def test_forget_leaves_no_byte_in_any_file(tmp_path, path, sqlite_store):
    # Users and sizes are mixed, so that pages split and merge, which leaves copies that a DELETE does not blank.
    random = Random(0)
    people = {f"person-{random.getrandbits(64):x}": f"secret-{n:02}-" for n in range(60)}
    for turn in range(300):
        user = random.choice(list(people))
        mark = people[user]
        fields = {"item_id": mark, "text": mark + "y" * random.choice([5, 50, 500, 6000]), "attributes": {mark: mark}}
        count = random.choice([1, 1, 5, 20])
        sqlite_store.append(user, [event(random.random(), f"{mark}{turn}-{n}", **fields) for n in range(count)])
    users = list(people)
    words = {*people, *people.values()}
    assert _holds(tmp_path, *words) == words
    for user in users[:30]:
        assert sqlite_store.forget(user) > 0
    assert (tmp_path / "events.db-wal").stat().st_size == 0
    assert _holds(tmp_path, *words) == {word for user in users[30:] for word in (user, people[user])}
    assert sqlite_store.users() == sorted(users[30:])


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


def test_users_are_forgotten_by_many_threads_while_others_write(tmp_path, sqlite_store):
    users = [f"user-{n:02}" for n in range(24)]
    for user in users:
        sqlite_store.append(user, [event(n, text=f"secret of {user}") for n in range(5)])

    def work(user):
        for turn in range(3):
            sqlite_store.append(f"kept-{user}", [event(turn, text=f"{user} is kept")])
        return sqlite_store.forget(user)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(work, users)) == [5] * 24
    assert _holds(tmp_path, *(f"secret of {user}" for user in users)) == set()
    assert len(sqlite_store.users()) == 24


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
def test_a_file_that_is_removed_or_replaced_is_noticed(tmp_path, path, sqlite_store, replaced):
    sqlite_store.append("u", [event(1)])
    sqlite_store.check()
    for file in tmp_path.glob("events.db*"):
        file.unlink()
    if replaced:
        EventStore(f"sqlite:///{path}").append("u", [event(2)])
    calls = [
        sqlite_store.check,
        sqlite_store.users,
        lambda: sqlite_store.append("u", [event(2)]),
        lambda: list(sqlite_store.export("u")),
    ]
    for call in [*calls, *(partial(getattr(sqlite_store, n), "u") for n in ("history", "count", "revision", "forget"))]:
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


def test_sqlite_is_set_up_to_lose_and_leave_nothing(sqlite_store):
    with sqlite_store.database._engine.connect() as connection:
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


def _holds(folder, *words):
    content = b"".join(file.read_bytes() for file in folder.iterdir())
    return {word for word in words if word.encode() in content}
