"""`EmbedUsers`: users and their events in, embeddings out, as a function that can be sent to any worker."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from persona.encoders import EncoderConfig, UserEncoder, Vocabulary
from persona.encoders.embed_files import check_asked, embedding_rows, encoder_folder, encoder_revision
from persona.encoders.hub import read_config
from persona.errors import CheckpointError, DataError, EventError
from persona.history import History
from persona.history.event import event_from_dict

if TYPE_CHECKING:
    import pandas
    import pyarrow

SCHEMA = "user string, instruction string, embedding array<float>, events int, truncated boolean, revision string"
"""Spark's name for what `EmbedUsers.pandas_batches` gives."""


class EmbedUsers:
    """Embeds users for some instructions: what `embed_file` writes of them, wherever it runs.

    It is pickled as settings alone. A process loads the encoder at the first call, once for all functions of the same
    encoder, and only if its folder holds the very encoder that this was made with: it raises `CheckpointError`
    otherwise. Every machine must have that folder under the same name.

    In Spark, for a table of events whose attributes are a map or a struct:

        users = spark.sql('''SELECT user, to_json(collect_list(struct(source, timestamp, text, item_id, value,
                             attributes))) AS events FROM events GROUP BY user''')
        users.mapInPandas(EmbedUsers("adapters/demo/weights").pandas_batches, SCHEMA)

    Raises `CheckpointError` without an encoder; `EventError` for `dim` or `tokens` that it does not have;
    `PersonaError` for instructions that are none.
    """

    def __init__(
        self,
        encoder: str | Path,
        instructions: Sequence[str] = ("",),
        *,
        dim: int | None = None,
        tokens: int | None = None,
        device: str = "cpu",
    ):
        """`encoder`: folder or hub name of an encoder, or of an adapter. `dim` and `tokens` are as in `encode`."""
        check_asked(list(instructions))
        self.folder = encoder_folder(encoder).resolve()
        self.revision = encoder_revision(self.folder)
        """SHA-256 of the encoder, see `encoder_revision`."""
        config = read_config(EncoderConfig, self.folder / "config.json")
        self.max_events = config.max_events
        """Timed events that the encoder reads of a user, the newest."""
        self.sources = tuple(read_config(Vocabulary, self.folder / "vocabulary.json").sources)
        """Sources that the encoder knows."""
        self.instructions, self.device = tuple(instructions), device
        self.dim = _within("dimensions", dim, config.width)
        self.tokens = _within("tokens", tokens, config.tokens)

    @property
    def encoder(self) -> UserEncoder:
        """The encoder, in evaluation mode, on `device`; the same object at every call in a process."""
        return _loaded(self.folder, self.revision, self.device)

    def rows(self, histories: Sequence[History]) -> pyarrow.Table:
        """One row for each of one user or more and each instruction; see `embed_file` for the columns."""
        return embedding_rows(self.encoder, histories, self.instructions, self.dim, self.tokens, self.revision)

    def __call__(self, batch: pandas.DataFrame) -> pandas.DataFrame:
        """Columns `user` and `events`, a JSON list of a user's events as `event_to_dict` writes them -> `SCHEMA`.

        `embedding` is a float32 array. Raises `DataError` for events that cannot be read, naming user and event.
        """
        return self.rows([_history(user, events) for user, events in zip(batch["user"], batch["events"])]).to_pandas()

    def pandas_batches(self, batches: Iterator[pandas.DataFrame]) -> Iterator[pandas.DataFrame]:
        """`__call__` for Spark's `mapInPandas`, with one thread, as Spark runs a worker for each core.

        Embeddings may differ from `embed_file`'s in the last digits, as other users share their batches.
        """
        torch.set_num_threads(1)
        for batch in batches:
            if len(batch):
                yield self(batch)


@lru_cache(maxsize=2)
def _loaded(folder: Path, revision: str, device: str) -> UserEncoder:
    if encoder_revision(folder) != revision:
        raise CheckpointError(f"{folder} holds another encoder than it did when this run began; start the run again")
    return UserEncoder.from_pretrained(folder).to(device)


def _within(what: str, given: int | None, most: int) -> int:
    given = most if given is None else given
    if not 1 <= given <= most:
        raise EventError(f"this encoder makes embeddings of 1 to {most} {what}, not {given}")
    return given


def _history(user: str, events: str) -> History:
    """A user's history of a JSON list of events; their order counts where times are equal."""
    made = []
    try:
        found = json.loads(events)
        if not isinstance(found, list):
            raise EventError(f"they are a JSON {type(found).__name__}, not a list")
        for event in found:
            made.append(event_from_dict(event))
        return History(user, tuple(made))
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"user {user!r}, event {len(made) + 1}: cannot be read: {error}") from None
