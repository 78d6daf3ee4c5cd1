"""`persona store`: databases of events and embeddings."""

from __future__ import annotations

from typing import Annotated

import typer

from persona.cli.common import say

store = typer.Typer(help="Databases of events and embeddings.", no_args_is_help=True)


@store.callback()
def commands() -> None:
    """Databases of events and embeddings."""


@store.command()
def upgrade(
    url: Annotated[
        str, typer.Option("--store", envvar="PERSONA_STORE", help="URL of the database.")
    ] = "sqlite:///persona.db",
) -> None:
    """Sets up an empty database, or brings one of an older persona to this version's schema."""
    from persona.store import schema
    from persona.store.database import Database

    database = Database(url, upgrade=True)
    say(f"{database.name} has schema {schema.HEAD}")
    database.close()
