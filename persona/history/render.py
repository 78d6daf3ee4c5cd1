"""Writes events and histories as text, one line an event: the "history as text" baseline and what an LM reads."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from persona.errors import RecipeError
from persona.history.cells import Template
from persona.history.event import Event, History
from persona.history.source import ReaderSpec, SourceSpec

FIELDS = ("text", "value", "item_id")
"""Fields that every event has; a template may name its attributes, too."""


class _Line(Template):
    """A template that writes a missing field as a gap under any conversion."""

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        return None if value is None else super().convert_field(value, conversion)


_line = lru_cache(maxsize=256)(_Line)


def render_event(event: Event, spec: SourceSpec) -> str:
    """One line by the source's `line` template; unknown fields are left out, white space is collapsed.

    Raises `RecipeError` for a template that does not parse or does not fit a value of the event.
    """
    fields = {**{name: getattr(event, name) for name in FIELDS}, **event.attributes}
    try:
        line = _line(spec.line).vformat(spec.line, (), fields)
    except ValueError as error:
        raise RecipeError(
            f"sources.{event.source}: the line template {spec.line!r} does not fit an event: {error}"
        ) from None
    return " ".join(line.split())


def check_sources(sources: Mapping[str, SourceSpec], readers: Sequence[ReaderSpec]) -> None:
    """Raises `RecipeError` for a name that an encoder's vocabulary could not tell from others, and for a bad line."""
    for name, source in sources.items():
        if "/" in name or not name:
            raise RecipeError(f"sources has the name {name!r}; a name is not empty and holds no '/'")
        check_template(f"sources.{name}.line", source.line, name, readers)


def check_template(where: str, template: str, source: str, readers: Sequence[ReaderSpec]) -> None:
    """Raises `RecipeError`, in which `where` names the template, for one that no event of `source` could fill.

    Attributes are those that the source's readers make; of a source without readers nobody knows them.
    """
    try:
        named = Template(template).columns
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    own = [reader for reader in readers if reader.source == source]
    known = dict.fromkeys([*FIELDS, *(name for reader in own for name in reader.attributes)])
    for name in named if own else []:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"an event's fields are {', '.join(known)}"
            raise RecipeError(f"{where} names {name!r}, which no reader of the source {source!r} makes; {hint}")


def render_history(history: History, sources: Mapping[str, SourceSpec]) -> str:
    """The whole history, oldest first, a line an event. Events of sources the recipe does not name are left out."""
    return "\n".join(render_event(e, sources[e.source]) for e in history.events if e.source in sources)
