"""`persona embed`: Parquet of events in, Parquet of user embeddings out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona.cli.common import quiet, say


def embed(
    encoder: Annotated[str, typer.Argument(help="Folder or hub name of an encoder, or of an adapter.")],
    events: Annotated[
        Path,
        typer.Option(
            help="Parquet file, or folder of such, with the columns user, source and, as far as there are any, "
            "timestamp (seconds), text, item_id, value, attributes."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    instruction: Annotated[
        list[str] | None,
        typer.Option(help="What the embeddings are for; repeat for several, leave out for general ones."),
    ] = None,
    dim: Annotated[int | None, typer.Option(help="First dimensions to keep; all by default.")] = None,
    tokens: Annotated[int | None, typer.Option(help="User tokens to average; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Users in a part file.")] = 256,
    overwrite: Annotated[
        bool, typer.Option("--overwrite/--resume", help="Make all parts anew, or keep those that are there.")
    ] = False,
) -> None:
    """Embeds all users of a file of events; a run that was killed goes on where it stopped."""
    quiet()
    from persona.encoders import UserEncoder
    from persona.encoders.embed_files import embed_file, encoder_folder, encoder_revision
    from persona.injection.llm import default_device

    folder = encoder_folder(encoder)
    made = embed_file(
        UserEncoder.from_pretrained(folder).to(default_device()),
        encoder_revision(folder),
        events,
        out,
        instructions=instruction or [""],
        dim=dim,
        tokens=tokens,
        batch_size=batch_size,
        overwrite=overwrite,
        say=say,
    )
    say(f"wrote {out}: {made}")
