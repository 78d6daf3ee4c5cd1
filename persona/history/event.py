"""What a user did: `Event`, and `History`, one user's events in time order. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Real

from persona.errors import EventError

MAX_USER_ID = 256


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened, or one set of facts that hold.

    Raises `EventError` for a field of the wrong type, for NaN and infinities, and for a string with a lone
    surrogate (half an emoji), which no tokenizer, file or database could take.
    """

    source: str
    """Name of the stream the event belongs to; a recipe's `sources` say what that stream is."""
    timestamp: float | None = None
    """Seconds since 1970-01-01 UTC. None for facts without a time, such as a profile row; they come first."""
    text: str | None = None
    """What the event says, in words: a title, a query, a message."""
    item_id: str | None = None
    """Id of the thing acted on, within the source's catalogue."""
    value: float | None = None
    """A number that belongs to the event: a rating, a price, a duration."""
    attributes: Mapping[str, str | float | None] = field(default_factory=dict)
    """Named facts: columns of a tabular row, or attributes of the item. None means unknown."""
    event_id: str | None = None
    """Caller's id. Storing two events with the same id stores one."""

    def __post_init__(self):
        for name, required in (("source", True), ("text", False), ("item_id", False), ("event_id", False)):
            value = getattr(self, name)
            if value is None and not required:
                continue
            if not isinstance(value, str):
                raise EventError(f"event.{name} must be a string, not {type(value).__name__} ({value!r})")
            _encodable(f"event.{name}", value)
            if required and not value:
                raise EventError(f"event.{name} is empty; name the source the event belongs to")
        for name in ("timestamp", "value"):
            object.__setattr__(self, name, _finite(f"event.{name}", getattr(self, name)))
        if not isinstance(self.attributes, Mapping):
            raise EventError(f"event.attributes must be a mapping, not {type(self.attributes).__name__}")
        clean = {}
        for key, value in self.attributes.items():
            if not isinstance(key, str):
                raise EventError(f"event.attributes has the key {key!r}; keys must be strings")
            _encodable("event.attributes key", key)
            name = f"event.attributes[{key!r}]"
            clean[key] = _encodable(name, value) if isinstance(value, str) else _finite(name, value)
        object.__setattr__(self, "attributes", clean)


def event_to_dict(event: Event) -> dict:
    """The fields that are set, as JSON can hold them; `event_from_dict` takes them back."""
    return {f.name: value for f in fields(Event) if (value := getattr(event, f.name)) is not None and value != {}}


def event_from_dict(data: Mapping) -> Event:
    """The event with these fields; raises `EventError` for an unknown or missing field."""
    if not isinstance(data, Mapping):
        raise EventError(f"an event must be an Event or a mapping of its fields, not {type(data).__name__}")
    known = [f.name for f in fields(Event)]
    for name in data:
        if name not in known:
            raise EventError(f"an event has no field {name!r}; its fields are {', '.join(known)}")
    if "source" not in data:
        raise EventError("event.source is missing; name the source the event belongs to")
    return Event(**data)


def _finite(name: str, value) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise EventError(f"{name} must be a number, not {type(value).__name__} ({value!r})")
    try:
        number = float(value)
    except OverflowError:
        raise EventError(f"{name} is an integer too large for a float") from None
    if not math.isfinite(number):
        raise EventError(f"{name} is {number}; leave it out (None) when it is unknown")
    return number


def _encodable(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise EventError(f"{name} is not valid Unicode: {error.reason} at character {error.start}") from None
    return value


@dataclass(frozen=True, slots=True)
class History:
    """One user's events, oldest first; events without a time come before all others.

    Events of equal time keep the order in which they were given. Raises `EventError` for a bad user id.
    """

    user: str
    """Any Unicode string of 1 to 256 characters."""
    events: tuple[Event, ...] = ()
    """Sorted on construction."""

    def __post_init__(self):
        check_user(self.user)
        events = tuple(self.events)
        for event in events:
            if not isinstance(event, Event):
                raise EventError(f"history of {self.user!r}: {event!r} is not an Event")
        object.__setattr__(self, "events", tuple(sorted(events, key=_order)))

    def __len__(self) -> int:
        return len(self.events)

    @property
    def timed(self) -> tuple[Event, ...]:
        """The events that have a time, oldest first."""
        return tuple(e for e in self.events if e.timestamp is not None)

    def until(self, timestamp: float) -> History:
        """Events strictly before `timestamp` (seconds), and those without a time.

        Strictly, so that events of equal time never fall on both sides of a cut.
        """
        return self.of(e for e in self.events if e.timestamp is None or e.timestamp < timestamp)

    def last(self, count: int) -> History:
        """The newest `count` timed events; events without a time are always kept."""
        timed = self.timed
        return self.of([e for e in self.events if e.timestamp is None] + list(timed[max(0, len(timed) - count) :]))

    def of(self, events: Iterable[Event]) -> History:
        """The same user with other events."""
        return History(self.user, tuple(events))


def _order(event: Event) -> float:
    return -math.inf if event.timestamp is None else event.timestamp


def check_user(user: str) -> str:
    """Returns `user` if it is a string of 1 to 256 characters that UTF-8 can hold, none of them U+0000.

    Raises `EventError` otherwise. PostgreSQL cannot hold U+0000, and an id should not depend on where it is stored.
    """
    if not isinstance(user, str):
        raise EventError(f"a user id must be a string, not {type(user).__name__} ({user!r})")
    if not 1 <= len(user) <= MAX_USER_ID:
        raise EventError(f"a user id has 1 to {MAX_USER_ID} characters; this one has {len(user)}")
    if "\0" in user:
        raise EventError(f"a user id holds no character U+0000, as {user!r} does")
    return _encodable("the user id", user)
