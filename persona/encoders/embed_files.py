"""Embeddings of all users of Parquet files of events, as Parquet: part by part, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from persona.encoders.embedding import pooled
from persona.encoders.features import newest
from persona.encoders.hub import resolve
from persona.encoders.user_encoder import UserEncoder
from persona.errors import CheckpointError, PersonaError
from persona.history import History
from persona.history.event_files import EventFiles

if TYPE_CHECKING:
    import pyarrow

ENCODER_FILES = ("config.json", "vocabulary.json", "model.safetensors")
MANIFEST = "_manifest.json"
"""Settings and digests of a run. Named so that pandas, pyarrow and Spark, which read the folder, pass over it."""
TEMPORARY = ".writing-"
"""What the names of files begin with that are not whole."""
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
    events, out, instructions = Path(events), Path(out), list(instructions)
    _check_asked(instructions, batch_size)
    if out.resolve().is_relative_to(events.resolve()):
        raise PersonaError(f"{out} lies in {events}, whose files are read as events; name a folder elsewhere")
    width = encoder.encode([], dim=dim, tokens=tokens).shape[1]
    tokens = encoder.check_count(tokens)
    users = EventFiles(events)
    unknown = {name: count for name, count in users.sources.items() if name not in encoder.vocabulary.sources}
    parts = -(-len(users) // batch_size)
    manifest = {
        "revision": revision,
        "instructions": instructions,
        "dim": width,
        "tokens": tokens,
        "batch_size": batch_size,
        "events": users.digests,
        "users": len(users),
        "parts": parts,
    }
    say(f"read {users.rows} events of {len(users)} users")
    if unknown:
        listing = ", ".join(f"{name} ({count})" for name, count in list(unknown.items())[:20])
        say(f"{sum(unknown.values())} events are of sources that the encoder does not know, and not read: {listing}")
    kept = 0
    try:
        _prepare(out, manifest, overwrite)
        for number in range(parts):
            first, path = number * batch_size, out / f"part-{number:05d}.parquet"
            last = min(first + batch_size, len(users))
            if path.exists():
                if _is_whole(path, (last - first) * len(instructions)):
                    kept += 1
                    continue
                say(f"{path.name} is damaged and is made again")
            table = _embed(encoder, users.histories(first, last), instructions, width, tokens, revision)
            _write(path, lambda file, table=table: _write_parquet(table, file))
            if (number + 1) % max(1, parts // 20) == 0:
                say(f"wrote {path.name}, {last} of {len(users)} users")
    except OSError as error:
        raise PersonaError(f"{out} cannot be written: {error}") from error
    return Embedded(len(users), parts, kept, unknown)


def _check_asked(instructions: Sequence[str], batch_size: int) -> None:
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


def _embed(
    encoder: UserEncoder,
    histories: Sequence[History],
    instructions: Sequence[str],
    dim: int,
    tokens: int,
    revision: str,
) -> pyarrow.Table:
    """The rows of a part. Users are read once, whatever the number of instructions."""
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


def _prepare(out: Path, manifest: dict, overwrite: bool) -> None:
    """Makes the folder fit for the run of `manifest`: new, or holding whole parts of such a run alone."""
    if out.exists() and not out.is_dir():
        raise PersonaError(f"{out} is a file; name a folder for the embeddings")
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)
    path = out / MANIFEST
    if not path.exists():
        if found := sorted(entry.name for entry in out.iterdir()):
            listing = ", ".join(found[:5]) + ", ..." * (len(found) > 5)
            raise PersonaError(f"{out} holds {listing}, but no {MANIFEST} of an earlier run; name another folder")
    elif overwrite:
        for part in out.iterdir():
            if re.fullmatch(r"part-\d{5,}\.parquet", part.name):
                part.unlink()
    elif differences := _differences(path, manifest):
        raise PersonaError(
            f"{out} holds embeddings that were made otherwise: {'; '.join(differences)}. "
            "Replace them with --overwrite, or name another folder"
        )
    else:
        return
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    _write(path, lambda file: file.write(text.encode()))


def _differences(path: Path, manifest: dict) -> list[str]:
    """What differs in an earlier manifest, in words."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        files = dict(before["events"])
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST} is damaged"]
    now = manifest["events"]
    changed = sorted(name for name in now | files if now.get(name) != files.get(name))
    plain = [key for key in manifest if key != "events" and before.get(key) != manifest[key]]
    found = [f"{key} was {before.get(key)!r} and is {manifest[key]!r}" for key in plain]
    if changed:
        listing = ", ".join(changed[:5]) + ", ..." * (len(changed) > 5)
        found.append(f"files of events changed, came or went: {listing}")
    return found


def _is_whole(path: Path, rows: int) -> bool:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows == rows
    except pyarrow.ArrowException:
        return False


def _write_parquet(table: pyarrow.Table, file: BinaryIO) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, file, compression="zstd")


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
