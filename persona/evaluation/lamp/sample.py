"""`Sample`: one question of LaMP with the profile of the user who asks it."""

from __future__ import annotations

from dataclasses import dataclass

from persona.history import Event, History


@dataclass(frozen=True)
class Sample:
    """One question; what it must not know is not in it."""

    id: str
    """Unique within a split."""
    input: str
    """The official input, which is also the instruction to the encoder."""
    profile: History
    """The user's items, oldest first: `event_id` is the item's id, `attributes` its fields, see `Task.fields`.

    Official files without dates keep their order; each item's time is then its place."""
    output: str | None = None
    """The gold answer, where it is public."""
    target: Event | None = None
    """The event asked about, where records made the question: for floors without an LLM, and for nobody else."""
