"""`Database`: SQLite or PostgreSQL by URL, set up, with errors for people and one tenant's rows at a time."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from persona.errors import EventError, PersonaError
from persona.history.event import check_user
from persona.store import schema

log = logging.getLogger("persona.store")

_INSERT = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_AS_TENANT = sa.text("SELECT set_config('persona.tenant', :tenant, true)")
"""Until the end of the transaction; the row-level security policies compare with it."""


class Database:
    """Connections to one database. Safe to share between threads; several processes may open the same database.

    `timeout`: seconds that an operation waits for others to release SQLite's lock; that connecting to PostgreSQL and
    each of its statements may take.
    `upgrade`: whether a database of an older schema is brought to this version's, in place of being refused.

    Raises `PersonaError` for a URL that is none, a missing driver, a database that cannot be used, and a schema of
    another version.
    """

    def __init__(self, url: str | sa.URL, *, timeout: float = 30.0, upgrade: bool = False):
        self.url, self.timeout, self._inode = _parse(url), timeout, None
        self.name = self.url.database or "in memory"
        """For messages: the file, or the database's name."""
        # A password may stand in the query too (?password=), so messages show neither.
        shown = self.url.set(query={}).render_as_string(hide_password=True)
        if self.url.get_backend_name() not in _INSERT:
            raise PersonaError(f"the event store works with {' and '.join(_INSERT)}, not with {shown!r}")
        try:
            self._engine = sa.create_engine(self.url, hide_parameters=True, **_options(self.url, timeout))
        except sa.exc.ArgumentError as error:
            raise PersonaError(f"{shown!r} is not a database URL such as sqlite:///persona.db: {error}") from None
        except ImportError as error:
            raise PersonaError(f"{shown!r} needs a driver: pip install 'persona[postgres]' ({error})") from error
        self.sqlite = self._engine.dialect.name == "sqlite"
        if self.sqlite:
            sa.event.listen(self._engine, "connect", partial(_set_pragmas, timeout))
        with self._for_people():
            schema.prepare(self._engine, self.name, upgrade)
            if not self.sqlite:
                self._warn_of_bypass()
        self._inode = self._found_inode()

    def insert(self, table: sa.Table) -> Any:
        """An INSERT of this database's dialect."""
        return _INSERT[self._engine.dialect.name](table)

    @contextmanager
    def begin(self, tenant: str | None = None, **options: Any) -> Iterator[sa.Connection]:
        """A connection in a transaction. In PostgreSQL it sees the rows of `tenant` alone, and none without one."""
        if self._inode is not None and self._found_inode() != self._inode:
            # SQLite would go on with the deleted file, and all that is written would be lost.
            raise PersonaError(f"the event store {self.name} was removed or replaced; open the store again")
        with self._for_people(), self._engine.execution_options(**options).begin() as connection:
            if tenant is not None and not self.sqlite:
                connection.execute(_AS_TENANT, {"tenant": tenant})
            yield connection

    def close(self) -> None:
        """Closes all connections; new ones are opened when it is used again."""
        self._engine.dispose()

    def _warn_of_bypass(self) -> None:
        with self._engine.connect() as connection:
            bypass = "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user"
            if connection.scalar(sa.text(bypass)):
                log.warning(
                    "the role %s of the event store %s is exempt from row-level security, which keeps tenants apart; "
                    "connect as a role that is neither SUPERUSER nor BYPASSRLS",
                    self.url.username,
                    self.name,
                )

    @contextmanager
    def _for_people(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise PersonaError(f"the event store {self.name} cannot be used: {error.orig}") from error
        except sa.exc.SQLAlchemyError as error:
            raise PersonaError(f"the event store {self.name} cannot be used: {error}") from error

    def _found_inode(self) -> int | None:
        """What tells SQLite's file from another of the same name; None where there is no file."""
        database = self.url.database
        if not self.sqlite or database in (None, "", ":memory:") or database.startswith("file:"):
            return None
        try:
            return os.stat(database).st_ino
        except OSError:
            return None


def check_tenant(tenant: str) -> None:
    """Raises `EventError` for what cannot be a tenant's name."""
    try:
        check_user(tenant)
    except EventError as error:
        raise EventError(f"the tenant {tenant!r} follows the rules of a user id: {error}") from None


def _parse(url: str | sa.URL) -> sa.URL:
    try:
        url = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        # Nobody knows which part of it is the password, so no more than its scheme is shown.
        scheme = re.match(r"[A-Za-z][\w+.-]*(?=://)", url) if isinstance(url, str) else None
        given = f"the given {scheme[0]}:// URL" if scheme else "the given URL"
        raise PersonaError(f"{given} is not a database URL such as sqlite:///persona.db") from None
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _options(url: sa.URL, timeout: float) -> dict[str, Any]:
    if url.get_backend_name() == "postgresql":
        # A connection that the server has closed is replaced when it is next taken.
        connect: dict[str, Any] = {"connect_timeout": max(2, round(timeout))}  # libpq takes less than 2 for 2
        # Neither a server that has vanished nor one that others hold up keeps a thread for longer.
        limit = round(1000 * timeout)
        connect |= {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": limit}
        connect["options"] = f"-c statement_timeout={limit} -c lock_timeout={limit}"
        pool = {"pool_size": 8, "max_overflow": 8, "pool_timeout": timeout}
        return {"pool_pre_ping": True, "connect_args": connect, **pool}
    if url.database in (None, "", ":memory:"):
        # A database in memory lives in its one connection, which threads then take turns with.
        one = {"poolclass": sa.QueuePool, "pool_size": 1, "max_overflow": 0}
        return {**one, "connect_args": {"check_same_thread": False}}
    return {}


def _set_pragmas(timeout: float, connection, record) -> None:
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={int(timeout * 1000)}", "synchronous=FULL", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    try:
        cursor.execute("PRAGMA journal_mode=WAL")
    except sqlite3.OperationalError as error:
        # SQLite does not wait for others who make this change to a new file; once one has made it, it is in the file.
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
    cursor.close()
