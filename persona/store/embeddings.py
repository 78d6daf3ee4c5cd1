"""`EmbeddingStore`: what encoders made of users, as bytes, shared by processes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from persona.errors import PersonaError


class Stored(NamedTuple):
    """What is kept of a user."""

    revision: int
    """`EventStore.revision` of the events that it was made from."""
    value: bytes
    """What was made of them; its reader knows its form from the space it lies in."""


class EmbeddingStore(Protocol):
    """One value for each (tenant, user, space).

    A **space** names all that values must share to be comparable: the encoder's revision, and what else they depend on
    (see `space_name`). A value is looked up in its own space alone, so those of two encoders never mix.

    Safe to share between threads. Methods raise `EventError` for a bad user id or tenant and `PersonaError` where the
    server or database cannot be used.
    """

    def get(self, users: Sequence[str], space: str, *, tenant: str = "default") -> dict[str, Stored]:
        """The values of those of `users` that have one, a thousand in a round trip."""

    def revisions(self, users: Sequence[str], space: str, *, tenant: str = "default") -> dict[str, int]:
        """The revisions of those of `users` that have a value, without reading the values."""

    def put(self, values: Mapping[str, Stored], space: str, *, tenant: str = "default") -> None:
        """Keeps values, in the place of older ones."""

    def forget(self, user: str, *, tenant: str = "default") -> None:
        """Erases the user's values in all spaces."""

    def spaces(self, *, tenant: str = "default") -> dict[str, int]:
        """Number of values by space."""

    def drop(self, space: str, *, tenant: str = "default") -> int:
        """Erases a whole space, as after an upgrade of the encoder; returns how many values it had."""

    def check(self) -> None:
        """Raises `PersonaError` unless the server or database answers."""

    def close(self) -> None:
        """Closes connections."""


def space_name(encoder_revision: str, kind: str = "state", parts: Iterable[str] = ()) -> str:
    """The name of a space: the encoder's revision, the kind of value, and a digest of what else it depends on.

    >>> space_name("3fa1", "vector", ["What will this user buy next?"])
    '3fa1:vector:a942d3367abb9cda'
    """
    if not re.fullmatch(r"[\w.-]{1,128}", encoder_revision) or not re.fullmatch(r"[a-z_]{1,32}", kind):
        raise PersonaError(f"{encoder_revision!r} and {kind!r} are no names of an encoder's revision and of a kind")
    name, parts = f"{encoder_revision}:{kind}", list(parts)
    if not parts:
        return name
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return f"{name}:{digest}"
