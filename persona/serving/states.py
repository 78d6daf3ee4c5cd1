"""`UserStates`: what the encoder made of users and of instructions, kept in memory and up to date with the store."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from cachetools import LRUCache

from persona.encoders import InstructionState, UserEncoder, UserState
from persona.encoders.state_bytes import events_digest
from persona.encoders.text import INSTRUCTION_LENGTH
from persona.history import Event, History
from persona.serving.combined import Combined, PatienceError
from persona.serving.shared_states import Shared, SharedStates
from persona.store import EventStore

_STRIPES = 64
_INSTRUCTIONS_MIB = 32
"""Memory for the states of instructions, 5 to 200 KB each."""
_MADE_MIB = 64
"""Memory for what was made of a user and an instruction, 4 KB for a small LLM to 128 KB for a large one each."""


class _Known(NamedTuple):
    """A cached state, and what of the store it was made from."""

    revision: int
    state: UserState
    events: tuple[Event, ...] | None
    """None where another process has made it; then the next two tell."""
    count: int = 0
    """Number of events."""
    digest: str = ""
    """Of these events."""

    @classmethod
    def of(cls, shared: Shared) -> _Known:
        """What another process has made."""
        return cls(shared.revision, shared.read.state, None, shared.read.count, shared.read.digest)

    def newer(self, history: History) -> tuple[Event, ...] | None:
        """The events behind those it was made from; None where the history does not begin with them."""
        size = self.count if self.events is None else len(self.events)
        old, new = history.events[:size], history.events[size:]
        same = events_digest(old) == self.digest if self.events is None else old == self.events
        return new if same else None

    @property
    def nbytes(self) -> int:
        """Bytes of the state and of the events, which may be longer."""
        return self.state.nbytes + sum(map(_event_bytes, self.events or ()))


class _Made(NamedTuple):
    """What was made of a state and an instruction, for as long as both are the same."""

    of: weakref.ref[UserState]
    by: weakref.ref[InstructionState]
    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.nbytes


class UserStates:
    """States by (tenant, user) and store revision: a new event extends the cached state, nothing is encoded twice.

    Safe to share between threads. One user's encoding never waits for another's, except that a few users in 64 share
    a lock; requests for the same user encode once. With `shared`, so do those to several processes.
    """

    def __init__(
        self,
        encoder: UserEncoder,
        store: EventStore,
        cache_mib: float = 256,
        patience: float = 60.0,
        shared: SharedStates | None = None,
    ):
        self.encoder, self.store, self.patience, self.shared = encoder, store, patience, shared
        self.hits = self.misses = 0
        """Look-ups answered from memory or the shared cache, and those that had to encode."""
        self._states: LRUCache[tuple[str, str], _Known] = _lru(cache_mib)
        self._instructions: LRUCache[str, InstructionState] = _lru(_INSTRUCTIONS_MIB)
        self._made: LRUCache[tuple[int, int], _Made] = _lru(_MADE_MIB)
        self._instructed = Combined(encoder.instruct, patience)
        self._lock = threading.RLock()  # taken again where dropping a state drops what was made of it
        self._encoding = [threading.Lock() for _ in range(_STRIPES)]
        self._forgotten = 0

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether a state of (tenant, user) is in memory."""
        return key in self._states

    def get(self, user: str, *, tenant: str = "default") -> UserState | None:
        """The user's state, brought up to date; None for a user without events.

        Raises what the store raises, and `PatienceError` when another request has not come to an end with encoding
        this user within `patience` seconds.
        """
        key = (tenant, user)
        revision = self.store.revision(user, tenant=tenant)
        known = self._find(key, revision)
        if known or not revision:
            return known and known.state
        with self._turn(key):
            revision = self.store.revision(user, tenant=tenant)
            known = self._find(key, revision)  # another request may have encoded it meanwhile
            if known or not revision:
                return known and known.state
            forgotten = self._forgotten
            found = self.shared and self.shared.get(user, tenant=tenant)
            if found and found.revision == revision:
                self._keep(key, _Known.of(found), forgotten, hit=True)
                return found.read.state
            history = self.store.history(user, last=self.encoder.config.max_events + 1, tenant=tenant)
            with self._lock:
                old = self._states.get(key) or (found and _Known.of(found))
            try:
                state = (old and self._extended(old, history)) or self.encoder.read([history])[0]
                if self._keep(key, _Known(revision, state, history.events), forgotten) and self.shared:
                    self._share(user, tenant, revision, state, history)
            finally:
                if forgotten != self._forgotten:  # perhaps this user, before the texts came into their cache
                    self._forget_texts(history.events)
            return state

    def _share(self, user: str, tenant: str, revision: int, state: UserState, history: History) -> None:
        self.shared.put(user, revision, state, history.events, tenant=tenant)
        now = self.store.revision(user, tenant=tenant)
        if now != revision:  # perhaps forgotten by another process, which has found nothing of this to erase
            self.shared.discard(user, tenant=tenant)
        if not now:
            self._find((tenant, user), now)

    def made(self, state: UserState, instruction: InstructionState, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives for a user's state and an instruction's, kept for when both are asked for again."""
        key = id(state), id(instruction)
        with self._lock:
            known, forgotten = self._made.get(key), self._forgotten
        if known and known.of() is state and known.by() is instruction:  # and not others that lie where these lay
            return known.tensor
        tensor = make()
        with self._lock:
            if forgotten == self._forgotten:
                gone = lambda _: self._drop(key)  # noqa: E731
                _put(self._made, key, _Made(weakref.ref(state, gone), weakref.ref(instruction, gone), tensor))
        return tensor

    def _drop(self, key: tuple[int, int]) -> None:
        """Forgets what was made of a state or an instruction that is no longer in memory."""
        with self._lock:
            self._made.pop(key, None)

    def instruction(self, text: str) -> InstructionState:
        """The state of an instruction, encoded when it is asked for the first time."""
        text = text[:INSTRUCTION_LENGTH]
        with self._lock:
            state, forgotten = self._instructions.get(text), self._forgotten
        if state:
            return state
        state = self._instructed(text)
        with self._lock:
            if forgotten == self._forgotten:  # else it may quote what was to be forgotten
                _put(self._instructions, text, state)
        return state

    def forget(self, user: str, *, tenant: str = "default") -> int:
        """Erases the user's events, states and cached texts; returns how many events there were.

        Does not wait for encodings under way: what they make of the user is not kept.
        """
        history = self.store.history(user, tenant=tenant)
        try:
            return self.store.forget(user, tenant=tenant)
        finally:  # the store raises also when it has deleted the events but not yet erased their bytes
            with self._lock:
                self._forgotten += 1
                self._instructions.clear()  # any of them may quote what is to be forgotten
                self._made.clear()
                known = self._states.pop((tenant, user), None)
            # What is in memory may have come after the history was read, or be forgotten already by another process.
            self._forget_texts([*history.events, *((known and known.events) or ())])
            if self.shared:
                self.shared.forget(user, tenant=tenant)

    def _forget_texts(self, events: Sequence[Event]) -> None:
        self.encoder.text_encoder.forget([row.text for row in self.encoder.rows(events)])

    @contextmanager
    def _turn(self, key: tuple[str, str]) -> Iterator[None]:
        lock = self._encoding[hash(key) % _STRIPES]
        if not lock.acquire(timeout=self.patience):
            raise PatienceError(f"another request has been encoding this user for {self.patience:g} s")
        try:
            yield
        finally:
            lock.release()

    def _find(self, key: tuple[str, str], revision: int) -> _Known | None:
        with self._lock:
            known = self._states.get(key)
            if known and not revision:
                del self._states[key]  # forgotten by another process
            elif known and known.revision == revision:
                self.hits += 1
                return known
        if known and not revision:
            self._forget_texts(known.events or ())
        return None

    def _keep(self, key: tuple[str, str], known: _Known, forgotten: int, *, hit: bool = False) -> bool:
        """Whether it is kept: not if somebody was forgotten meanwhile, who may be this user."""
        with self._lock:
            self.hits, self.misses = self.hits + hit, self.misses + (not hit)
            if forgotten != self._forgotten:
                return False
            _put(self._states, key, known)
            return True

    def _extended(self, known: _Known, history: History) -> UserState | None:
        """The old state continued by newer events, or None where only encoding again is right."""
        if known.state.truncated or len(history.timed) > self.encoder.config.max_events:
            return None
        # The old events themselves are compared: one may have come late, or all been forgotten by another process.
        new = known.newer(history)
        if new is None or any(e.timestamp is None for e in new):
            return None
        return self.encoder.extend(known.state, new)


def _event_bytes(event: Event) -> int:
    """Bytes that an event takes in memory, about: a string that several events share is counted for each."""
    facts = event.attributes
    held = (event, event.source, event.text, event.item_id, event.event_id, facts, *facts, *facts.values())
    return sum(map(sys.getsizeof, held))


def _lru(mib: float) -> LRUCache:
    """A cache of at most `mib` MiB; what was not asked for for the longest time goes first."""
    return LRUCache(mib * 2**20, getsizeof=lambda item: item.nbytes)


def _put(cache: LRUCache, key: Any, item: Any) -> None:
    with suppress(ValueError):  # raised for what is larger than the whole cache
        cache[key] = item
