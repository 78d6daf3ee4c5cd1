"""`persona store`: databases of events, and embeddings in them or in Redis."""

from __future__ import annotations

from typing import Annotated

import typer

from persona.cli.common import say

store = typer.Typer(help="Databases of events and embeddings.", no_args_is_help=True)

Url = Annotated[str, typer.Option("--store", envvar="PERSONA_STORE", help="URL of the database.")]
Cache = Annotated[
    str, typer.Option("--cache-url", envvar="PERSONA_CACHE_URL", help="Where embeddings are: `store`, or Redis' URL.")
]
Tenant = Annotated[str, typer.Option(help="Whose users.")]


@store.command()
def upgrade(url: Url = "sqlite:///persona.db") -> None:
    """Sets up an empty database, or brings one of an older persona to this version's schema."""
    from persona.store import schema
    from persona.store.database import Database

    database = Database(url, upgrade=True)
    say(f"{database.name} has schema {schema.HEAD}")
    database.close()


@store.command()
def spaces(url: Url = "sqlite:///persona.db", cache: Cache = "store", tenant: Tenant = "default") -> None:
    """Counts the embeddings of each space. A space's name begins with its encoder's revision."""
    from persona.store import EventStore, open_embeddings

    with EventStore(url) as events:
        for space, count in open_embeddings(cache, events).spaces(tenant=tenant).items():
            typer.echo(f"{space}\t{count}")


@store.command()
def drop(
    space: Annotated[str, typer.Argument(help="As `persona store spaces` names it.")],
    url: Url = "sqlite:///persona.db",
    cache: Cache = "store",
    tenant: Tenant = "default",
) -> None:
    """Erases all embeddings of a space, as those of an encoder that is no longer used."""
    from persona.store import EventStore, open_embeddings

    with EventStore(url) as events:
        say(f"erased {open_embeddings(cache, events).drop(space, tenant=tenant)} embeddings of {space}")
