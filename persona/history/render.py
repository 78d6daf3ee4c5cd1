"""Writes events and histories as text, one line an event: the "history as text" baseline and what an LM reads."""

from __future__ import annotations

from collections.abc import Mapping

from persona.history.event import Event, History
from persona.history.source import SourceSpec


class _Unknown:
    """Formats to nothing under any format specification, so that a missing field leaves a gap and not a crash."""

    def __format__(self, spec: str) -> str:
        return ""


class _Fields(dict):
    def __missing__(self, key: str) -> _Unknown:
        return _Unknown()


def render_event(event: Event, spec: SourceSpec) -> str:
    """One line by the source's `line` template; unknown fields are left out, white space is collapsed."""
    fields = {"text": event.text, "value": event.value, "item_id": event.item_id, **event.attributes}
    line = spec.line.format_map(_Fields({k: v for k, v in fields.items() if v is not None}))
    return " ".join(line.split())


def render_history(history: History, sources: Mapping[str, SourceSpec]) -> str:
    """The whole history, oldest first, a line an event. Events of sources the recipe does not name are left out."""
    return "\n".join(render_event(e, sources[e.source]) for e in history.events if e.source in sources)
