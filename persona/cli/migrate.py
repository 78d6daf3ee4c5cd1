"""`persona migrate`: old vectors in a new encoder's space, where making all of them anew is too dear."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona.cli.common import quiet, say
from persona.errors import PersonaError

if TYPE_CHECKING:
    from persona.history import History
    from persona.history.event_files import EventFiles


def migrate(
    old: Annotated[Path, typer.Argument(help="Folder of vectors that persona embed wrote with the old encoder.")],
    encoder: Annotated[str, typer.Option(help="Folder or hub name of the new encoder, or of an adapter.")],
    events: Annotated[Path, typer.Option(help="The events of the users, as for persona embed.")],
    out: Annotated[Path, typer.Option(help="Folder to write mapped vectors to.")],
    sample: Annotated[
        int,
        typer.Option(
            help="Users, drawn at random, that the new encoder encodes; more than twice as many as a vector has "
            "dimensions, or the map is not determined."
        ),
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the sample, and of the half that is held out of it.")] = 0,
    dim: Annotated[int | None, typer.Option(help="First dimensions of the new vectors; all by default.")] = None,
    tokens: Annotated[int | None, typer.Option(help="User tokens to average; all by default.")] = None,
    least_recall: Annotated[
        float, typer.Option(help="Write nothing where the recall that is measured is below this.")
    ] = 0.9,
    write: Annotated[
        bool, typer.Option("--write", help="Write the mapped vectors; without it the loss is only measured.")
    ] = False,
) -> None:
    """Maps vectors of an old encoder into the space of a new one, and says first what that loses.

    Right, and without loss, is to make all vectors anew: persona embed ENCODER --events EVENTS --out OUT, or persona
    refresh. A map is for a time in which that cannot be paid for. It is estimated from a sample of users whom both
    encoders have encoded, and measured on a half of them that it has not seen.
    """
    quiet()
    from persona.encoders import UserEncoder
    from persona.encoders.drift import Drift, write_mapped
    from persona.encoders.embed_files import check_apart, encoder_folder, encoder_revision
    from persona.encoders.stored_vectors import instructions_of, read_manifest, read_vectors
    from persona.evaluation.drift import measure
    from persona.history.event_files import EventFiles
    from persona.injection.llm import default_device

    check_apart(events, out)
    if sample < 1 or not 0 <= least_recall <= 1:
        raise PersonaError("--sample is at least 1 user, and --least-recall from 0 to 1")
    folder = encoder_folder(encoder)
    revision = encoder_revision(folder)
    stored = {text: read_vectors(old, text) for text in instructions_of(old)}
    before = next(iter(stored.values()))
    if before.mapped_from:
        raise PersonaError(f"{old} holds vectors that were mapped before; map those they were made of, or embed anew")
    if before.revision == revision:
        raise PersonaError(f"{old} holds vectors of this very encoder, {revision[:12]}; there is nothing to migrate")
    new = UserEncoder.from_pretrained(folder).to(default_device())
    tokens = new.check_count(tokens)
    files = EventFiles(events)
    if read_manifest(old).get("events") != files.digests:
        say(f"{events} is not what {old} was made of: what users did since then counts as drift, too")
    histories = _sample(files, set(before.users), sample, seed)
    say(f"encoding {len(histories)} of {len(before.users)} users with {revision[:12]}")
    drifts, recalls = {}, []
    for text, vectors in stored.items():
        place = {user: row for row, user in enumerate(vectors.users)}
        mine = vectors.matrix[[place[history.user] for history in histories]]
        made = new.encode(histories, text, dim=dim, tokens=tokens)
        loss = measure(mine, made, seed=seed)
        typer.echo(f"{text!r}: {loss}")
        drifts[text] = Drift.fit(mine, made)  # by all of the sample, twice what was measured
        recalls.append(loss.mapped[0])
    if not write:
        say("nothing was written; --write writes the mapped vectors, persona embed makes all of them anew")
        return
    if min(recalls) < least_recall:
        raise PersonaError(
            f"recall of mapped vectors is {min(recalls):.3f}, below the {least_recall} of --least-recall; nothing was "
            "written. Make all vectors anew with persona embed, or accept less"
        )
    count = write_mapped(old, out, drifts, revision, tokens)
    say(f"wrote {out}: {count} vectors of {before.revision[:12]} mapped to {revision[:12]}")


def _sample(files: EventFiles, users: set[str], size: int, seed: int) -> list[History]:
    """Histories of at most `size` random users of `files` who are among `users`."""
    import numpy as np

    found = []
    for number in np.random.default_rng(seed).permutation(len(files)):
        [history] = files.histories(int(number), int(number) + 1)
        if history.user in users:
            found.append(history)
        if len(found) == size:
            break
    if not found:
        raise PersonaError("none of the users of these events has a vector; bring those that the vectors were made of")
    return found
