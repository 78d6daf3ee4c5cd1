"""Point reads and appends at many users: events and embeddings in SQLite and PostgreSQL, embeddings in Redis.

    python benchmarks/fleet/points.py --users 100000 1000000 --out benchmarks/results/fleet-points.json

Every commit waits for the disk. The servers are private ones on loopback, filled in bulk; then one caller asks for one
random user at a time through the same classes that serving uses, after up to 1,000 calls of each kind to warm up. Times
are of the caller, so they hold Python's share. Without --users the small sizes of a trial.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from local_servers import Postgres, Redis

from persona.encoders.hub import resolve
from persona.encoders.state_bytes import state_to_bytes
from persona.evaluation.runner import git_hash
from persona.history import Event, History
from persona.store import EmbeddingStore, EventStore, Stored, open_embeddings, schema, space_name

SPACE = space_name("benchmark", "vector")
STATES = space_name("benchmark")
WORDS = ("oak", "violin", "music", "garden", "spade", "drum", "novel", "tent", "kettle", "rope")
BULK = 20_000
"""Rows written in one transaction while filling."""
REAL_STATES = 2000
"""Users with a state as the demo's encoder makes it, which is larger than an embedding."""


def events_of(number: int, count: int) -> list[Event]:
    """The events of user `number`: the same at every call."""
    rng = np.random.default_rng(number)
    words = rng.integers(len(WORDS), size=(count, 3))
    return [
        Event("purchase", 1.7e9 + 3600.0 * i, text=" ".join(WORDS[w] for w in row), event_id=f"{number}-{i}")
        for i, row in enumerate(words)
    ]


def fill_events(store: EventStore, users: int, count: int) -> None:
    """Writes everybody's events, many users in a transaction."""
    rows: list[dict] = []
    for number in range(users):
        rows += [
            {
                "tenant": "default",
                "user_id": f"u{number:08d}",
                "event_id": event.event_id,
                "source": event.source,
                "timestamp": event.timestamp,
                "text": event.text,
                "item_id": None,
                "value": None,
                "attributes": "{}",
            }
            for event in events_of(number, count)
        ]
        if len(rows) >= BULK or number == users - 1:
            with store.database.begin("default") as connection:
                if store.database.sqlite:
                    connection.execute(schema.events.insert(), rows)
                else:
                    _copy(connection, rows)
            rows = []


def _copy(connection, rows: list[dict]) -> None:
    """PostgreSQL's bulk path; policies forbid COPY into a table, so it goes by way of a temporary one."""
    columns = ", ".join(rows[0])
    connection.exec_driver_sql(
        f"CREATE TEMP TABLE IF NOT EXISTS filling AS SELECT {columns} FROM persona_events LIMIT 0"
    )
    cursor = connection.connection.cursor()
    with cursor.copy(f"COPY filling ({columns}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(tuple(row.values()))
    connection.exec_driver_sql(f"INSERT INTO persona_events ({columns}) SELECT {columns} FROM filling")
    connection.exec_driver_sql("TRUNCATE filling")


def fill_embeddings(store: EmbeddingStore, users: int, size: int) -> None:
    """An embedding of `size` random bytes for everybody."""
    rng = np.random.default_rng(0)
    for start in range(0, users, 1000):
        numbers = range(start, min(start + 1000, users))
        store.put({f"u{n:08d}": Stored(1, rng.bytes(size)) for n in numbers}, SPACE)


def fill_states(store: EmbeddingStore, adapter: str) -> int:
    """States of some users, as the demo's encoder makes them of 50 events; returns the bytes of one."""
    from persona.encoders import UserEncoder
    from persona.encoders.embed_files import encoder_folder

    encoder = UserEncoder.from_pretrained(encoder_folder(resolve(adapter)))
    events = events_of(0, 50)
    value = state_to_bytes(encoder.read([History("u", tuple(events))])[0], events)
    for start in range(0, REAL_STATES, 100):
        store.put({f"u{n:08d}": Stored(1, value) for n in range(start, start + 100)}, STATES)
    return len(value)


def measure(call: Callable[[int], object], users: int, count: int, seed: int) -> dict:
    """Milliseconds of `count` calls, each for a random user."""
    rng = np.random.default_rng(seed)
    warm, numbers = rng.integers(users, size=min(count, 1000)), rng.integers(users, size=count)
    for number in warm:
        call(int(number))
    times = []
    for number in numbers:
        start = time.perf_counter()
        call(int(number))
        times.append(1000 * (time.perf_counter() - start))
    p50, p99, p999 = np.percentile(times, (50, 99, 99.9))
    return {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3), "p999_ms": round(p999, 3), "calls": count}


def measure_events(store: EventStore, users: int, calls: int) -> dict:
    """Appends and reads."""
    rng = iter(range(10**9))

    def append(number: int) -> None:
        event = Event("purchase", 1.8e9, text="oak violin music", event_id=f"new-{next(rng)}")
        assert store.append(f"u{number:08d}", [event]) == 1

    def history(number: int) -> None:
        assert store.history(f"u{number:08d}", last=64).events

    return {
        "append": measure(append, users, calls // 4, 1),
        "revision": measure(lambda n: store.revision(f"u{n:08d}"), users, calls, 2),
        "history": measure(history, users, calls, 3),
    }


def measure_embeddings(store: EmbeddingStore, users: int, calls: int) -> dict:
    """Reads of one embedding, of 100 at once, and of a state."""

    def one(number: int) -> None:
        assert store.get([f"u{number:08d}"], SPACE)

    def hundred(number: int) -> None:
        assert store.get([f"u{(number + i) % users:08d}" for i in range(100)], SPACE)

    def state(number: int) -> None:
        assert store.get([f"u{number:08d}"], STATES)

    return {
        "embedding": measure(one, users, calls, 4),
        "embedding, 100 users at once": measure(hundred, users, calls // 20, 5),
        "state": measure(state, REAL_STATES, calls // 4, 6),
    }


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[tuple[EventStore, str, Callable[[], int]]]:
    """An empty event store, where its embeddings are kept, and what tells the bytes of it all."""
    if kind == "postgresql":
        with Postgres(durable=True) as server, EventStore(server.database("points")) as store:

            def size() -> int:
                with server.connect("points") as connection:
                    return connection.execute("SELECT pg_database_size('points')").fetchone()[0]

            yield store, "store", size
    elif kind == "sqlite":
        with EventStore(f"sqlite:///{folder / 'points.db'}") as store:
            yield store, "store", lambda: sum(file.stat().st_size for file in folder.glob("points.db*"))
    else:
        with Redis() as server, EventStore("sqlite://") as store:
            import redis

            client = redis.Redis(port=server.port)
            yield store, server.url, lambda: client.info("memory")["used_memory"]


def run(kind: str, users: int, args: argparse.Namespace) -> dict:
    """One store at one size."""
    with tempfile.TemporaryDirectory() as folder, opened(kind, Path(folder)) as (store, where, size):
        result, start, empty = {}, time.perf_counter(), size()
        if kind != "redis":
            fill_events(store, users, args.events)
            result["bytes_per_user_of_events"] = round((size() - empty) / users)
        embeddings, before = open_embeddings(where, store), size()
        fill_embeddings(embeddings, users, args.size)
        result["bytes_per_user_of_embedding"] = round((size() - before) / users)
        result["state_bytes"] = fill_states(embeddings, args.adapter)
        result["fill_s"] = round(time.perf_counter() - start)
        if kind == "postgresql":  # as its autovacuum does after a while
            with store.database.begin(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("SET statement_timeout = 0")
                connection.exec_driver_sql("VACUUM ANALYZE")
        if kind != "redis":
            result |= measure_events(store, users, args.calls)
        return result | measure_embeddings(embeddings, users, args.calls)


def main(args: argparse.Namespace) -> None:
    """Measures each store at each size; the file is written anew after each."""
    results: dict[str, dict] = {}
    for users in args.users:
        for kind in args.stores:
            results.setdefault(kind, {})[str(users)] = run(kind, users, args)
            print(kind, users, json.dumps(results[kind][str(users)]), flush=True)
            write(args, results)


def write(args: argparse.Namespace, results: dict) -> None:
    """The result with what is needed to get it again."""
    record = {
        "name": args.out.stem,
        "kind": "points",
        "results": results,
        "config": {"events_per_user": args.events, "embedding_bytes": args.size, "callers": 1},
        "command": " ".join(["python", "benchmarks/fleet/points.py", *sys.argv[1:]]),
        "git_hash": git_hash(),
        "versions": {name: version(name) for name in ("sqlalchemy", "psycopg", "redis", "persona")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--stores", nargs="+", default=["sqlite", "postgresql", "redis"])
    parser.add_argument("--events", type=int, default=5, help="events of each user")
    parser.add_argument("--size", type=int, default=2048, help="bytes of an embedding: 8 tokens, 64 wide, by default")
    parser.add_argument("--calls", type=int, default=20_000, help="point reads of each kind; a quarter of it appends")
    parser.add_argument("--adapter", default="adapters/demo/weights", help="whose states are kept")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
