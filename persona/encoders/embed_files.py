"""Embeddings of all users of Parquet files of events, as Parquet: part by part, so that a killed run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from persona.encoders.embedding import pooled
from persona.encoders.features import newest
from persona.encoders.hub import resolve
from persona.encoders.part_files import PartFiles
from persona.encoders.user_encoder import UserEncoder
from persona.errors import CheckpointError, PersonaError
from persona.history import History
from persona.history.event_files import EventFiles

if TYPE_CHECKING:
    import pyarrow

ENCODER_FILES = ("config.json", "vocabulary.json", "model.safetensors")
READ = 64
"""Users that are encoded at a time."""


@dataclass(frozen=True)
class Embedded:
    """What a run of `embed_file` came to."""

    users: int
    """Users in the files of events."""
    parts: int
    """Parts that there are now: all."""
    kept: int
    """Those of them that were there before."""
    unknown: Mapping[str, int]
    """Source that the encoder does not know, so that its events were not read, to the number of these events."""

    def __str__(self) -> str:
        return f"{self.users} users in {self.parts} parts, {self.kept} of which were there already"


def encoder_folder(name_or_path: str | Path) -> Path:
    """The folder of an encoder, given its name or folder or an adapter's. Raises `CheckpointError` without one."""
    folder = resolve(name_or_path)
    return folder / "encoder" if (folder / "adapter_config.json").is_file() else folder


def encoder_revision(folder: str | Path) -> str:
    """SHA-256 of a saved encoder: `cat config.json vocabulary.json model.safetensors | sha256sum`.

    It does not cover a text encoder or an LLM that config.json names. Raises `CheckpointError` for a missing file.
    """
    digest = hashlib.sha256()
    for name in ENCODER_FILES:
        try:
            with (Path(folder) / name).open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{Path(folder) / name} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def embed_file(
    encoder: UserEncoder,
    revision: str,
    events: str | Path,
    out: str | Path,
    *,
    instructions: Sequence[str] = ("",),
    dim: int | None = None,
    tokens: int | None = None,
    batch_size: int = 256,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Embedded:
    """Embeds every user of `events`, Parquet as `EventFiles` reads it, for every instruction, into the folder `out`.

    Parts part-00000.parquet... hold `batch_size` users each, in the order of their ids, one row for each instruction:
    user, instruction, embedding (`[dim]` float32, what `encoder.encode` gives), events (how many the encoder read; 0
    makes it the embedding of an empty history), truncated (whether older events were left out) and `revision`, which
    names the encoder (`encoder_revision`). A part is there whole or not at all. Called again, parts that are there are
    kept, if the settings and the content of `events` are those of _manifest.json; with `overwrite` all are made anew.
    Evaluation mode is the caller's to set.

    Raises `DataError` as `EventFiles` does, before anything is encoded; `EventError` for `dim` or `tokens` that the
    encoder does not have; `PersonaError` for a folder that holds anything else, or parts made with other settings, and
    where it cannot write; `MissingExtraError` without pyarrow.
    """
    instructions = list(instructions)
    check_asked(instructions, batch_size)
    check_apart(events, out)
    width = encoder.encode([], dim=dim, tokens=tokens).shape[1]
    tokens = encoder.check_count(tokens)
    users = EventFiles(events)
    say(f"read {users}")
    if unknown := unknown_sources(users.sources, encoder.vocabulary.sources):
        say(unknown_listing(unknown))
    made = PartFiles(out, file_manifest(users, revision, instructions, width, tokens, batch_size))
    made.prepare(overwrite)
    parts, kept = made.manifest["parts"], 0
    for number in range(parts):
        first, last = number * batch_size, min((number + 1) * batch_size, len(users))
        if is_whole(made, number, (last - first) * len(instructions), say):
            kept += 1
            continue
        histories = users.histories(first, last)
        made.write(number, embedding_rows(encoder, histories, instructions, width, tokens, revision))
        if (number + 1) % max(1, parts // 20) == 0:
            say(f"wrote {made.path(number).name}, {last} of {len(users)} users")
    return Embedded(len(users), parts, kept, unknown)


def file_manifest(
    users: EventFiles, revision: str, instructions: Sequence[str], dim: int, tokens: int, batch_size: int
) -> dict:
    """The manifest of a run over files: all that must be the same for it to go on."""
    return {
        "revision": revision,
        "instructions": list(instructions),
        "dim": dim,
        "tokens": tokens,
        "batch_size": batch_size,
        "events": users.digests,
        "users": len(users),
        "parts": -(-len(users) // batch_size),
    }


def is_whole(made: PartFiles, number: int, rows: int, say: Callable[[str], None]) -> bool:
    """Whether a part is there with all its rows; says so where one is damaged."""
    found = made.metadata(number)
    if found and found.num_rows == rows:
        return True
    if made.path(number).exists():
        say(f"{made.path(number).name} is damaged and is made again")
    return False


def unknown_sources(sources: Mapping[str, int], known: Sequence[str]) -> dict[str, int]:
    """Those sources, with their numbers of events, that an encoder does not know."""
    return {name: count for name, count in sources.items() if name not in known}


def unknown_listing(unknown: Mapping[str, int]) -> str:
    """Sources that an encoder does not know, in words."""
    listing = ", ".join(f"{name} ({count})" for name, count in list(unknown.items())[:20])
    return f"{sum(unknown.values())} events are of sources that the encoder does not know, and not read: {listing}"


def check_apart(events: str | Path, out: str | Path) -> None:
    """Raises `PersonaError` for a folder to write to among the files to read."""
    if Path(out).resolve().is_relative_to(Path(events).resolve()):
        raise PersonaError(f"{out} lies in {events}, whose files are read as events; name a folder elsewhere")


def check_asked(instructions: Sequence[str], batch_size: int = 1) -> None:
    """Raises `PersonaError` for instructions, or users in a part, that make no sense."""
    if batch_size < 1:
        raise PersonaError(f"a part has at least 1 user, not {batch_size}")
    if not instructions:
        raise PersonaError("there is no instruction; give the empty one for general embeddings")
    for text in instructions:
        if instructions.count(text) > 1:
            raise PersonaError(f"the instruction {text!r} is given twice")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PersonaError(f"the instruction {text!r} is not valid Unicode: {error.reason}") from None


def embedding_rows(
    encoder: UserEncoder,
    histories: Sequence[History],
    instructions: Sequence[str],
    dim: int,
    tokens: int,
    revision: str,
) -> pyarrow.Table:
    """The rows of a part, of one user or more. Users are read once, whatever the number of instructions."""
    import pyarrow

    vectors, truncated, counts = [], [], []
    for start in range(0, len(histories), READ):
        part = histories[start : start + READ]
        states = encoder.read(part, READ)
        asked = [encoder.tokens(states, [text] * len(part), tokens) for text in instructions]
        made = [pooled(torch.stack([t.tokens for t in found]).float(), None, dim).cpu() for found in asked]
        vectors.append(torch.stack(made, dim=1))  # [users, instructions, dim]
        truncated += [state.truncated for state in states]
        seen = (newest(history, encoder.config.max_events)[0].events for history in part)
        counts += [sum(event.source in encoder.vocabulary.sources for event in events) for events in seen]
    each = len(instructions)
    flat = pyarrow.array(torch.cat(vectors).flatten().numpy(), pyarrow.float32())
    columns = {
        "user": pyarrow.array([history.user for history in histories for _ in instructions], pyarrow.string()),
        "instruction": pyarrow.array(list(instructions) * len(histories), pyarrow.string()),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, dim),
        "events": pyarrow.array(np.repeat(counts, each), pyarrow.int32()),
        "truncated": pyarrow.array(np.repeat(truncated, each), pyarrow.bool_()),
        "revision": pyarrow.array([revision] * each * len(histories), pyarrow.string()),
    }
    return pyarrow.table(columns)
