"""`SharedStates`: states of users that several processes share, through an `EmbeddingStore`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from persona.encoders import UserState
from persona.encoders.state_bytes import ReadState, state_from_bytes, state_to_bytes
from persona.errors import CheckpointError, PersonaError
from persona.history import Event
from persona.store import EmbeddingStore, Stored

log = logging.getLogger("persona.serving")

PAUSE = 1.0
"""Seconds for which a cache that has failed is not asked: a request does not wait for it again and again."""


class Shared(NamedTuple):
    """A state, and the store revision that it was made from."""

    revision: int
    read: ReadState


class SharedStates:
    """A cache of one encoder's states. Where it fails, users are encoded as if there were none, and it is logged.

    `space`: see `space_name`; the encoder's revision must be in it. `device`: where states are wanted.
    """

    def __init__(self, embeddings: EmbeddingStore, space: str, device: torch.device | str = "cpu"):
        self.embeddings, self.space, self.device = embeddings, space, device
        self._paused_until = 0.0

    def get(self, user: str, *, tenant: str = "default") -> Shared | None:
        """What there is of a user, perhaps out of date."""
        if time.monotonic() < self._paused_until:
            return None
        try:
            found = self.embeddings.get([user], self.space, tenant=tenant).get(user)
            return found and Shared(found.revision, state_from_bytes(found.value, self.device))
        except CheckpointError as error:
            log.warning("a state in the shared cache is made anew: %s", error)
        except PersonaError as error:
            self._failed(error)
        return None

    def put(
        self, user: str, revision: int, state: UserState, events: Sequence[Event], *, tenant: str = "default"
    ) -> None:
        """Keeps a state that was made of `events`, which are those of the store's `revision`."""
        if time.monotonic() < self._paused_until:
            return
        try:
            stored = Stored(revision, state_to_bytes(state, events))
            self.embeddings.put({user: stored}, self.space, tenant=tenant)
        except PersonaError as error:
            self._failed(error)

    def forget(self, user: str, *, tenant: str = "default") -> None:
        """Erases what there is of a user. Raises `PersonaError` where that cannot be done now."""
        try:
            self.embeddings.forget(user, tenant=tenant)
        except PersonaError as error:
            raise PersonaError(f"the user's events are erased, but not what the shared cache holds: {error}") from error

    def discard(self, user: str, *, tenant: str = "default") -> None:
        """Erases what there is of a user who changed while it was put there.

        A cache that has failed is asked all the same, since the user may be one who was forgotten; where it fails, a
        value stays that no revision of the store matches.
        """
        try:
            self.embeddings.forget(user, tenant=tenant)
        except PersonaError as error:
            self._failed(error)

    def _failed(self, error: PersonaError) -> None:
        self._paused_until = time.monotonic() + PAUSE
        log.warning("the shared cache is not used for %g s: %s", PAUSE, error)
