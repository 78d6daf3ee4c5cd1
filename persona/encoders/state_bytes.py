"""A user's state as bytes, for a cache that processes share: safetensors, which no reader executes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from persona.encoders.user_encoder import UserState
from persona.errors import CheckpointError
from persona.history.event import Event, event_to_dict

_LENGTH = 8
"""Bytes of the length of a safetensors header, which stands before it."""


class ReadState(NamedTuple):
    """A state, and what events it was made from."""

    state: UserState
    count: int
    """Number of events."""
    digest: str
    """`events_digest` of these."""


def events_digest(events: Sequence[Event]) -> str:
    """SHA-256 of events in order, so that a state is continued only by what comes after the very same ones."""
    rows = json.dumps([event_to_dict(event) for event in events], sort_keys=True)
    return hashlib.sha256(rows.encode()).hexdigest()


def state_to_bytes(state: UserState, events: Sequence[Event]) -> bytes:
    """A state that was made from `events`."""
    tensors = {"states": state.states, "memory": state.memory}
    tensors |= {f"cache.{n}": tensor for n, tensor in enumerate(state.cache)}
    plain = {
        "events": state.events,
        "last_timestamp": state.last_timestamp,
        "row_timestamp": state.row_timestamp,
        "truncated": state.truncated,
        "count": len(events),
        "digest": events_digest(events),
    }
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"state": json.dumps(plain)})


def state_from_bytes(value: bytes, device: torch.device | str = "cpu") -> ReadState:
    """What `state_to_bytes` wrote, on `device`. Raises `CheckpointError` for anything else."""
    try:
        tensors = {name: tensor.to(device) for name, tensor in load(value).items()}
        size = int.from_bytes(value[:_LENGTH], "little")
        plain = json.loads(json.loads(value[_LENGTH : _LENGTH + size])["__metadata__"]["state"])
        count, digest = plain.pop("count"), plain.pop("digest")
        cache = [tensors.pop(f"cache.{n}") for n in range(len(tensors) - 2)]
        return ReadState(UserState(**tensors, cache=cache, **plain), count, digest)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"these {len(value)} bytes are no user's state: {error!r}") from None
