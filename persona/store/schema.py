"""The tables of a database, and bringing a database to them.

What stands in a database is made by the Alembic migrations beside this file; the tables here are what queries are built
from, and a test compares the two. An empty database is set up when it is opened for the first time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from persona.errors import PersonaError

if TYPE_CHECKING:
    from alembic.config import Config

VERSION_TABLE = "persona_schema"
"""Table with the number of the newest migration that was run."""
HEAD = "0001"
"""The migration that this version of persona works with."""
_LOCK = 7_239_001
"""Any number that nobody else locks."""
MIGRATIONS = Path(__file__).parent / "migrations"

metadata = sa.MetaData()
events = sa.Table(
    "persona_events",
    metadata,
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
    sqlite_autoincrement=True,  # a number is never used twice, so `EventStore.revision` never repeats
)
embeddings = sa.Table(
    "persona_embeddings",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("space", sa.Text, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("value", sa.LargeBinary, nullable=False),
)


def prepare(engine: sa.Engine, name: str, upgrade: bool = False) -> None:
    """Sets up an empty database, and with `upgrade` one of an older schema. Raises `PersonaError` for another one."""
    with engine.connect() as connection:
        found = current(connection)
    if found is None or (upgrade and found < HEAD):
        _migrate(engine)
    elif found != HEAD:
        older = (
            "run `persona store upgrade` first" if found < HEAD else "a newer persona has set it up; update this one"
        )
        raise PersonaError(f"the event store {name} has schema {found}, this version of persona needs {HEAD}: {older}")


def current(connection: sa.Connection) -> str | None:
    """The number of the newest migration that was run; None for an empty database."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.scalar(sa.text(f"SELECT version_num FROM {VERSION_TABLE}"))


def _migrate(engine: sa.Engine) -> None:
    from alembic import command

    with engine.begin() as connection:
        # Whoever comes second waits here, and then finds nothing to do.
        sqlite = engine.dialect.name == "sqlite"
        if not sqlite:  # may take its time
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if sqlite else f"SELECT pg_advisory_xact_lock({_LOCK})")
        command.upgrade(alembic_config(connection), HEAD)


def alembic_config(connection: sa.Connection) -> Config:
    """What Alembic's commands need to work with an open connection."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", MIGRATIONS.as_posix().replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
