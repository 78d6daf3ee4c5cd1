"""`EventStore` keeps the events of all users in SQLite, or in PostgreSQL by URL. Writing never runs a model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import sqlalchemy as sa

from persona.errors import EventError, PersonaError
from persona.history.event import Event, History, check_user, event_from_dict, event_to_dict
from persona.store.database import Database, check_tenant
from persona.store.schema import embeddings as _embeddings
from persona.store.schema import events as _events

MILLISECONDS = 1e11
"""Timestamps from here on are taken for milliseconds; as seconds this is the year 5138, as milliseconds 1973."""
_PAGE = 1000

_FIELDS = [_events.c[name] for name in Event.__slots__]
_REVISION = sa.select(sa.func.max(_events.c.seq), sa.func.count()).where(  # asked at every call, so built once
    _events.c.tenant == sa.bindparam("tenant"), _events.c.user_id == sa.bindparam("user")
)


class EventStore:
    """Events by (tenant, user), appended and forgotten, never changed.

    Safe to share between threads; several processes may open the same database. Every method raises `EventError`
    for a bad user id and `PersonaError` when the database cannot be used.

    `url`: SQLite's or PostgreSQL's, as `postgresql://role:password@host/database`. An empty database is set up.
    `timeout`: see `Database`.
    """

    def __init__(self, url: str = "sqlite:///persona.db", *, timeout: float = 30.0):
        self.database = Database(url, timeout=timeout)

    def check(self) -> None:
        """Raises `PersonaError` unless the database answers."""
        with self.database.begin() as connection:
            connection.execute(sa.select(_events.c.seq).limit(1))

    def append(self, user: str, events: Iterable[Event | Mapping[str, Any]], *, tenant: str = "default") -> int:
        """Stores all events or none, and returns how many were new.

        An event whose `event_id` this user already has is passed over. Takes events, or dicts as from `export`.
        When it returns, the events are on disk. Raises `EventError` for what is no event, and for a timestamp that is
        thousands of years away, as one in milliseconds is.
        """
        check_user(user)
        check_tenant(tenant)
        rows = [_row(user, tenant, event) for event in events]
        if not rows:
            return 0
        if not self.database.sqlite:
            _check_nul(rows)
        insert = self.database.insert(_events)
        insert = insert.on_conflict_do_nothing(index_elements=["tenant", "user_id", "event_id"])
        with self.database.begin(tenant) as connection:
            return len(connection.execute(insert.returning(_events.c.seq), rows).all())

    def history(
        self, user: str, until: float | None = None, last: int | None = None, *, tenant: str = "default"
    ) -> History:
        """The user's history; as `History.until` and `History.last`, but reading no more rows than that.

        `until`: only timed events strictly before it, in seconds. `last`: only the newest so many timed events.
        Events without a time are always there. The history of an unknown user is empty.
        """
        mine = self._of(user, tenant)
        timed = sa.select(*_FIELDS, _events.c.seq).where(mine, _events.c.timestamp.is_not(None))
        if until is not None:
            timed = timed.where(_events.c.timestamp < until)
        if last is not None:
            timed = timed.order_by(_events.c.timestamp.desc(), _events.c.seq.desc()).limit(max(0, last))
        untimed = sa.select(*_FIELDS, _events.c.seq).where(mine, _events.c.timestamp.is_(None))
        both = sa.union_all(untimed, timed.subquery().select()).subquery()
        with self.database.begin(tenant) as connection:
            rows = connection.execute(both.select().order_by(both.c.seq)).all()
        return History(user, tuple(_event(row) for row in rows))

    def histories(
        self, users: Sequence[str], last: int | None = None, *, tenant: str = "default"
    ) -> dict[str, History]:
        """What `history` gives for each of many users, a thousand in a query."""
        found: dict[str, tuple[Event, ...]] = dict.fromkeys(users, ())
        newest = sa.over(
            sa.func.row_number(),
            partition_by=[_events.c.user_id, _events.c.timestamp.is_(None)],
            order_by=[_events.c.timestamp.desc(), _events.c.seq.desc()],
        )
        columns = [*_FIELDS, _events.c.seq, _events.c.user_id, newest.label("age")]
        for mine in self._of_all(users, tenant):
            rows = sa.select(*columns).where(mine).subquery()
            query = rows.select().order_by(rows.c.user_id, rows.c.seq)
            if last is not None:
                query = query.where(rows.c.timestamp.is_(None) | (rows.c.age <= last))
            with self.database.begin(tenant) as connection:
                for user, own in groupby(connection.execute(query), key=lambda row: row.user_id):
                    found[user] = tuple(_event(row) for row in own)
        return {user: History(user, events) for user, events in found.items()}

    def count(self, user: str, *, tenant: str = "default") -> int:
        """How many events the user has."""
        with self.database.begin(tenant) as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(_events).where(self._of(user, tenant)))

    def users(self, *, tenant: str = "default") -> list[str]:
        """All users with an event, sorted."""
        return [user for page in self.user_pages(_PAGE, tenant=tenant) for user in page]

    def user_pages(self, size: int, *, tenant: str = "default") -> Iterator[list[str]]:
        """All users with an event, sorted, `size` at a time. Those who come meanwhile may be there or not."""
        check_tenant(tenant)
        query = sa.select(_events.c.user_id).where(_events.c.tenant == tenant).distinct()
        query = query.order_by(_events.c.user_id).limit(size)

        def pages() -> Iterator[list[str]]:
            page: list[str] = []
            while True:
                with self.database.begin(tenant) as connection:
                    page = list(connection.scalars(query.where(_events.c.user_id > page[-1]) if page else query))
                if not page:
                    return
                yield page

        return pages()

    def revision(self, user: str, *, tenant: str = "default") -> int:
        """A number that changes with every change to the user's events and never comes back; 0 for no events."""
        check_user(user)
        check_tenant(tenant)
        with self.database.begin(tenant) as connection:
            newest, count = connection.execute(_REVISION, {"tenant": tenant, "user": user}).one()
        return _revision(newest, count)

    def revisions(self, users: Sequence[str], *, tenant: str = "default") -> dict[str, int]:
        """What `revision` gives for each of many users, a thousand in a query."""
        found = dict.fromkeys(users, 0)
        query = sa.select(_events.c.user_id, sa.func.max(_events.c.seq), sa.func.count())
        for mine in self._of_all(users, tenant):
            with self.database.begin(tenant) as connection:
                for user, newest, count in connection.execute(query.where(mine).group_by(_events.c.user_id)):
                    found[user] = _revision(newest, count)
        return found

    def export(self, user: str, *, tenant: str = "default") -> Iterator[dict[str, Any]]:
        """All that is stored of the user, in order of arrival, as dicts that `append` takes back."""
        query = sa.select(*_FIELDS, _events.c.seq).where(self._of(user, tenant)).order_by(_events.c.seq).limit(_PAGE)

        def pages() -> Iterator[dict[str, Any]]:
            # Page by page, so that no read stays open: it would hold up `forget`.
            seq = 0
            while True:
                with self.database.begin(tenant) as connection:
                    rows = connection.execute(query.where(_events.c.seq > seq)).all()
                if not rows:
                    return
                yield from (event_to_dict(_event(row)) for row in rows)
                seq = rows[-1].seq

        return pages()

    def forget(self, user: str, *, tenant: str = "default") -> int:
        """Erases the user and returns how many events there were; no byte of them stays in SQLite's files.

        What `SqlEmbeddings` keeps of the user goes in the same transaction. For the bytes the file is written anew,
        which takes time in proportion to its size, and who writes meanwhile waits. (PostgreSQL's own vacuum does it
        later.) Raises `PersonaError` if another connection reads or writes for so long that this cannot be done; the
        events are deleted all the same, and calling again finishes the work.
        """
        mine = self._of(user, tenant)
        with self.database.begin(tenant) as connection:
            deleted = connection.execute(_events.delete().where(mine)).rowcount
            made = _embeddings.delete().where(_embeddings.c.tenant == tenant, _embeddings.c.user_id == user)
            connection.execute(made)
        if self.database.sqlite:
            self._erase_leftovers()
        return deleted

    def close(self) -> None:
        """Closes all connections; the store opens new ones when used again."""
        self.database.close()

    def __enter__(self) -> EventStore:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _erase_leftovers(self) -> None:
        # secure_delete blanks the deleted cell, but not the copies that SQLite left in the free space of a page
        # when it moved cells to another page. VACUUM builds all pages anew; the log still holds the old ones.
        with self.database.begin(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM")
            end = time.monotonic() + self.database.timeout
            # SQLite itself waits for readers here, but not for another connection's checkpoint.
            while connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]:
                if time.monotonic() > end:
                    raise PersonaError(
                        f"{self.database.name}: deleted, but a reader keeps its log from being erased; call again"
                    )
                time.sleep(0.01)

    def _of(self, user: str, tenant: str) -> sa.ColumnElement[bool]:
        check_user(user)
        check_tenant(tenant)
        return sa.and_(_events.c.tenant == tenant, _events.c.user_id == user)

    def _of_all(self, users: Sequence[str], tenant: str) -> list[sa.ColumnElement[bool]]:
        """Conditions of so few users each that no database has too many parameters."""
        for user in users:
            check_user(user)
        check_tenant(tenant)
        parts = [users[start : start + _PAGE] for start in range(0, len(users), _PAGE)]
        return [sa.and_(_events.c.tenant == tenant, _events.c.user_id.in_(part)) for part in parts]


def _revision(newest: int | None, count: int) -> int:
    # The count too: of two concurrent PostgreSQL writers, the one with the smaller number may commit last.
    return (newest << 24) + count if newest else 0


def _row(user: str, tenant: str, event: Event | Mapping[str, Any]) -> dict[str, Any]:
    event = event if isinstance(event, Event) else event_from_dict(event)
    if event.timestamp is not None and abs(event.timestamp) >= MILLISECONDS:
        raise EventError(f"the timestamp {event.timestamp:.0f} is in milliseconds, it seems; give seconds since 1970")
    row = {name: getattr(event, name) for name in Event.__slots__}
    return {**row, "tenant": tenant, "user_id": user, "attributes": json.dumps(row["attributes"], ensure_ascii=False)}


def _check_nul(rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str) and "\0" in value:
                raise EventError(f"the {name} {value!r} holds the character U+0000, which PostgreSQL cannot store")


def _event(row: sa.Row) -> Event:
    fields = {name: getattr(row, name) for name in Event.__slots__}
    return Event(**{**fields, "attributes": json.loads(row.attributes)})
