"""Reads one raw cell as text, a number or a time; None stands for a missing one.

A cell is a string from a text file, or whatever JSON, parquet or a dataset holds: numbers, dates, lists, None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from decimal import Decimal
from numbers import Real
from string import Formatter
from typing import Any

from persona.errors import RecipeError


class BadCell(Exception):
    """A cell that cannot be read; `kind` says why, in words that fit after the field's name."""

    def __init__(self, kind: str, value: Any = None):
        super().__init__(kind)
        self.kind, self.value = kind, value


def is_missing(cell: Any) -> bool:
    """None, an empty string, or NaN."""
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def read_text(cell: Any) -> str | None:
    """The cell as it stands; the items of a list are joined by a comma. Raises `BadCell` for objects and bytes."""
    if is_missing(cell):
        return None
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list):
        return ", ".join(text for item in cell if (text := read_text(item)) is not None) or None
    if isinstance(cell, (dict, bytes)):
        raise BadCell("is not text", cell)
    return str(cell)


def read_id(cell: Any) -> str | None:
    """An id as it stands (1 is "1", not "1.0"). Raises `BadCell` for a bool, a list, an object and bytes.

    A whole number in a column of floats is an integer: pandas makes such columns of integers with gaps.
    """
    if isinstance(cell, (bool, list)):
        raise BadCell("is not an id", cell)
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else read_text(cell)


def read_number(cell: Any) -> float | None:
    """The cell as a float; raises `BadCell` for a bool, an infinity, and anything else that is no number."""
    if is_missing(cell):
        return None
    if isinstance(cell, bool) or not isinstance(cell, (str, Real, Decimal)):
        raise BadCell("is not a number", cell)
    if isinstance(cell, str) and not cell.strip():
        return None
    try:
        # Python reads "1_000" as 1000, which no data file means.
        number = float("_" if isinstance(cell, str) and "_" in cell else cell)
    except (ValueError, OverflowError):
        raise BadCell("is not a number", cell) from None
    if math.isnan(number):
        return None
    if math.isinf(number):
        raise BadCell("is infinite", cell)
    return number


def check_time_format(pattern: str) -> None:
    """Raises `RecipeError` unless `pattern` is unix, unix_ms, iso or a strptime pattern."""
    if pattern not in ("unix", "unix_ms", "iso") and "%" not in pattern:
        raise RecipeError(f"time_format {pattern!r} is not unix, unix_ms, iso or a strptime pattern such as '%Y-%m-%d'")


def read_time(cell: Any, pattern: str) -> float:
    """Seconds since 1970-01-01 UTC; a time without a zone is UTC. Raises `BadCell` if missing or not a time."""
    if isinstance(cell, date) and not isinstance(cell, datetime):
        cell = datetime.combine(cell, time())
    if not isinstance(cell, datetime):
        if pattern in ("unix", "unix_ms"):
            number = read_number(cell)
            if number is None:
                raise BadCell("is missing")
            return number / 1000 if pattern == "unix_ms" else number
        text = read_text(cell)
        if text is None:
            raise BadCell("is missing")
        try:
            cell = datetime.fromisoformat(text) if pattern == "iso" else datetime.strptime(text, pattern)
        except ValueError:
            raise BadCell(f"is not a time in the format {pattern}", text) from None
    return (cell if cell.tzinfo else cell.replace(tzinfo=UTC)).timestamp()


class Template(Formatter):
    """A text template over columns, such as "{title} ({year})".

    Unlike `str.format` a field is a column's name and nothing else, so a recipe from elsewhere cannot reach into
    Python objects, and names with dots or brackets work. Raises `RecipeError` for a template that does not parse.
    """

    def __init__(self, template: str):
        self.template = template
        try:
            self.columns = [name for _, name, _, _ in self.parse(template) if name is not None]
        except ValueError as error:
            raise RecipeError(f"the text template {template!r} does not parse: {error}") from None

    def fill(self, cells: Mapping[str, Any]) -> str | None:
        """The text with missing cells left blank; None if every named cell is missing. Raises `BadCell`."""
        if self.columns and all(is_missing(cells.get(name)) for name in self.columns):
            return None
        try:
            return self.vformat(self.template, (), cells) or None
        except ValueError as error:
            raise BadCell("does not fit the template", str(error)) from None

    def get_field(self, field_name, args, kwargs):
        return kwargs.get(field_name), field_name

    def format_field(self, value, format_spec):
        return (read_text(value) or "") if not format_spec or is_missing(value) else format(value, format_spec)
