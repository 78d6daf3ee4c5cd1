"""`EventStore` keeps the events of all users in SQLite, or in PostgreSQL by URL. Writing never runs a model."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from persona.errors import EventError, PersonaError
from persona.history.event import Event, History, check_user, event_from_dict, event_to_dict

_INSERT = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_PAGE = 1000

_metadata = sa.MetaData()
_events = sa.Table(
    "persona_events",
    _metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("event_id", sa.Text),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("timestamp", sa.Double),
    sa.Column("text", sa.Text),
    sa.Column("item_id", sa.Text),
    sa.Column("value", sa.Double),
    sa.Column("attributes", sa.Text, nullable=False),
    sa.UniqueConstraint("tenant", "user_id", "event_id"),
    sa.Index("persona_events_by_time", "tenant", "user_id", "timestamp", "seq"),
    sqlite_autoincrement=True,  # a number is never used twice, so `revision` never repeats
)
_FIELDS = [_events.c[name] for name in Event.__slots__]
_REVISION = sa.select(sa.func.max(_events.c.seq), sa.func.count()).where(  # asked at every call, so built once
    _events.c.tenant == sa.bindparam("tenant"), _events.c.user_id == sa.bindparam("user")
)


class EventStore:
    """Events by (tenant, user), appended and forgotten, never changed.

    Safe to share between threads; several processes may open the same database. Every method raises `EventError`
    for a bad user id and `PersonaError` when the database cannot be used.

    `timeout`: seconds that an operation waits for others to release SQLite's lock.
    """

    def __init__(self, url: str = "sqlite:///persona.db", *, timeout: float = 30.0):
        self.url = _parse(url)
        self._name = self.url.database or "in memory"
        # A password may stand in the query too (?password=), so messages show neither.
        shown = self.url.set(query={}).render_as_string(hide_password=True)
        if self.url.get_backend_name() not in _INSERT:
            raise PersonaError(f"the event store works with {' and '.join(_INSERT)}, not with {shown!r}")
        try:
            self._engine = sa.create_engine(self.url, hide_parameters=True, **_pool(self.url))
        except sa.exc.ArgumentError as error:
            raise PersonaError(f"{shown!r} is not a database URL such as sqlite:///persona.db: {error}") from None
        except ImportError as error:
            raise PersonaError(f"{shown!r} needs a driver: pip install 'persona[postgres]' ({error})") from error
        self._sqlite = self._engine.dialect.name == "sqlite"
        if self._sqlite:
            sa.event.listen(self._engine, "connect", partial(_set_pragmas, timeout))
        self._timeout, self._inode = timeout, None
        with self._begin() as connection:
            connection.execute(CreateTable(_events, if_not_exists=True))
            for index in _events.indexes:
                connection.execute(CreateIndex(index, if_not_exists=True))
        self._inode = self._found_inode()

    def check(self) -> None:
        """Raises `PersonaError` unless the database answers."""
        with self._begin() as connection:
            connection.execute(sa.select(_events.c.seq).limit(1))

    def append(self, user: str, events: Iterable[Event | Mapping[str, Any]], *, tenant: str = "default") -> int:
        """Stores all events or none, and returns how many were new.

        An event whose `event_id` this user already has is passed over. Takes events, or dicts as from `export`.
        When it returns, the events are on disk.
        """
        check_user(user)
        _check_tenant(tenant)
        rows = [_row(user, tenant, event) for event in events]
        if not rows:
            return 0
        insert = _INSERT[self._engine.dialect.name](_events)
        insert = insert.on_conflict_do_nothing(index_elements=["tenant", "user_id", "event_id"])
        with self._begin() as connection:
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
        with self._begin() as connection:
            rows = connection.execute(both.select().order_by(both.c.seq)).all()
        return History(user, tuple(_event(row) for row in rows))

    def count(self, user: str, *, tenant: str = "default") -> int:
        """How many events the user has."""
        with self._begin() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(_events).where(self._of(user, tenant)))

    def users(self, *, tenant: str = "default") -> list[str]:
        """All users with an event, sorted."""
        _check_tenant(tenant)
        with self._begin() as connection:
            users = connection.scalars(sa.select(_events.c.user_id).where(_events.c.tenant == tenant).distinct())
            return sorted(users)

    def revision(self, user: str, *, tenant: str = "default") -> int:
        """A number that changes with every change to the user's events and never comes back; 0 for no events."""
        check_user(user)
        _check_tenant(tenant)
        with self._begin() as connection:
            newest, count = connection.execute(_REVISION, {"tenant": tenant, "user": user}).one()
        # The count too: of two concurrent PostgreSQL writers, the one with the smaller number may commit last.
        return (newest << 24) + count if count else 0

    def export(self, user: str, *, tenant: str = "default") -> Iterator[dict[str, Any]]:
        """All that is stored of the user, in order of arrival, as dicts that `append` takes back."""
        query = sa.select(*_FIELDS, _events.c.seq).where(self._of(user, tenant)).order_by(_events.c.seq).limit(_PAGE)

        def pages() -> Iterator[dict[str, Any]]:
            # Page by page, so that no read stays open: it would hold up `forget`.
            seq = 0
            while True:
                with self._begin() as connection:
                    rows = connection.execute(query.where(_events.c.seq > seq)).all()
                if not rows:
                    return
                yield from (event_to_dict(_event(row)) for row in rows)
                seq = rows[-1].seq

        return pages()

    def forget(self, user: str, *, tenant: str = "default") -> int:
        """Erases the user and returns how many events there were; no byte of them stays in SQLite's files.

        For that the file is written anew, which takes time in proportion to its size. (PostgreSQL's own vacuum
        does it later.) Raises `PersonaError` if another connection reads or writes for so long that this cannot
        be done; the events are deleted all the same, and calling again finishes the work.
        """
        with self._begin() as connection:
            deleted = connection.execute(_events.delete().where(self._of(user, tenant))).rowcount
        if self._sqlite:
            self._erase_leftovers()
        return deleted

    def close(self) -> None:
        """Closes all connections; the store opens new ones when used again."""
        self._engine.dispose()

    def __enter__(self) -> EventStore:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _erase_leftovers(self) -> None:
        # secure_delete blanks the deleted cell, but not the copies that SQLite left in the free space of a page
        # when it moved cells to another page. VACUUM builds all pages anew; the log still holds the old ones.
        with self._begin(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM")
            end = time.monotonic() + self._timeout
            # SQLite itself waits for readers here, but not for another connection's checkpoint.
            while connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]:
                if time.monotonic() > end:
                    raise PersonaError(
                        f"{self._name}: deleted, but a reader keeps its log from being erased; call again"
                    )
                time.sleep(0.01)

    def _of(self, user: str, tenant: str) -> sa.ColumnElement[bool]:
        check_user(user)
        _check_tenant(tenant)
        return sa.and_(_events.c.tenant == tenant, _events.c.user_id == user)

    def _found_inode(self) -> int | None:
        """What tells SQLite's file from another of the same name; None where there is no file."""
        database = self.url.database
        if not self._sqlite or database in (None, "", ":memory:") or database.startswith("file:"):
            return None
        try:
            return os.stat(database).st_ino
        except OSError:
            return None

    @contextmanager
    def _begin(self, **options: Any) -> Iterator[sa.Connection]:
        if self._inode is not None and self._found_inode() != self._inode:
            # SQLite would go on with the deleted file, and all that is written would be lost.
            raise PersonaError(f"the event store {self._name} was removed or replaced; open the store again")
        try:
            with self._engine.execution_options(**options).begin() as connection:
                yield connection
        except sa.exc.DBAPIError as error:
            raise PersonaError(f"the event store {self._name} cannot be used: {error.orig}") from error
        except sa.exc.SQLAlchemyError as error:
            raise PersonaError(f"the event store {self._name} cannot be used: {error}") from error


def _parse(url: str | sa.URL) -> sa.URL:
    try:
        return sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        # Nobody knows which part of it is the password, so no more than its scheme is shown.
        scheme = re.match(r"[A-Za-z][\w+.-]*(?=://)", url) if isinstance(url, str) else None
        given = f"the given {scheme[0]}:// URL" if scheme else "the given URL"
        raise PersonaError(f"{given} is not a database URL such as sqlite:///persona.db") from None


def _pool(url: sa.URL) -> dict[str, Any]:
    """A database in memory lives in its one connection, which threads then take turns with."""
    if url.get_backend_name() != "sqlite" or url.database not in (None, "", ":memory:"):
        return {}
    one = {"poolclass": sa.QueuePool, "pool_size": 1, "max_overflow": 0}
    return {**one, "connect_args": {"check_same_thread": False}}


def _set_pragmas(timeout: float, connection, record) -> None:
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={int(timeout * 1000)}", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _check_tenant(tenant: str) -> None:
    try:
        check_user(tenant)
    except EventError as error:
        raise EventError(f"the tenant {tenant!r} follows the rules of a user id: {error}") from None


def _row(user: str, tenant: str, event: Event | Mapping[str, Any]) -> dict[str, Any]:
    event = event if isinstance(event, Event) else event_from_dict(event)
    row = {name: getattr(event, name) for name in Event.__slots__}
    return {**row, "tenant": tenant, "user_id": user, "attributes": json.dumps(row["attributes"], ensure_ascii=False)}


def _event(row: sa.Row) -> Event:
    fields = {name: getattr(row, name) for name in Event.__slots__}
    return Event(**{**fields, "attributes": json.loads(row.attributes)})
