"""Writes events and histories as text, one line an event: the "history as text" baseline and what an LM reads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from persona.errors import RecipeError
from persona.history.cells import Template
from persona.history.event import Event, History
from persona.history.source import SourceSpec


class _Line(Template):
    """A template that writes a missing field as a gap under any conversion."""

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        return None if value is None else super().convert_field(value, conversion)


_line = lru_cache(maxsize=256)(_Line)


def render_event(event: Event, spec: SourceSpec) -> str:
    """One line by the source's `line` template; unknown fields are left out, white space is collapsed.

    Raises `RecipeError` for a template that does not parse or does not fit a value of the event.
    """
    fields = {"text": event.text, "value": event.value, "item_id": event.item_id, **event.attributes}
    try:
        line = _line(spec.line).vformat(spec.line, (), fields)
    except ValueError as error:
        raise RecipeError(
            f"sources.{event.source}: the line template {spec.line!r} does not fit an event: {error}"
        ) from None
    return " ".join(line.split())


def render_history(history: History, sources: Mapping[str, SourceSpec]) -> str:
    """The whole history, oldest first, a line an event. Events of sources the recipe does not name are left out."""
    return "\n".join(render_event(e, sources[e.source]) for e in history.events if e.source in sources)
