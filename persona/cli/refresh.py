"""`persona refresh`: all users by many actors; Parquet or the event store in, Parquet or the shared cache out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona.cli.common import quiet, say


def refresh(
    encoder: Annotated[str, typer.Argument(help="Folder or hub name of an encoder, or of an adapter.")],
    events: Annotated[
        Path | None, typer.Option(help="Parquet file of events, or folder of such, as for persona embed.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="Database URL of the event store, instead of files.")] = None,
    tenant: Annotated[str, typer.Option(help="Whose users, in the event store.")] = "default",
    out: Annotated[Path | None, typer.Option(help="Folder to write embeddings to, as Parquet.")] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache-url", help="Where to write states that servers read, instead of a folder: store, or a Redis URL."
        ),
    ] = None,
    cache_ttl: Annotated[
        float,
        typer.Option(
            envvar="PERSONA_CACHE_TTL", help="Seconds that Redis keeps a state; those up to date are not renewed."
        ),
    ] = 7 * 86400.0,
    instruction: Annotated[
        list[str] | None,
        typer.Option(help="What the embeddings are for; repeat for several, leave out for general ones."),
    ] = None,
    dim: Annotated[int | None, typer.Option(help="First dimensions to keep; all by default.")] = None,
    tokens: Annotated[int | None, typer.Option(help="User tokens to average; all by default.")] = None,
    actors: Annotated[int, typer.Option(help="Processes that encode, each with a CPU of its own.")] = 1,
    gpus_per_actor: Annotated[float, typer.Option(help="GPUs of each, as 1 or 0.25; none by default.")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Users that an actor takes at a time, and in a part file.")] = 256,
    overwrite: Annotated[
        bool, typer.Option("--overwrite/--resume", help="Make all part files anew, or keep those that are current.")
    ] = False,
) -> None:
    """Encodes all users with Ray Data; a run that was killed goes on, and users who are up to date are passed over.

    Ray is the cluster that RAY_ADDRESS names, or is started on this machine.
    """
    quiet()
    from persona.batch import refresh

    made = refresh(
        encoder,
        events=events,
        store=store,
        tenant=tenant,
        out=out,
        cache=cache,
        cache_ttl=cache_ttl,
        instructions=instruction or [""],
        dim=dim,
        tokens=tokens,
        actors=actors,
        gpus_per_actor=gpus_per_actor,
        batch_size=batch_size,
        overwrite=overwrite,
        say=say,
    )
    say(f"wrote {out or cache}: {made}")
