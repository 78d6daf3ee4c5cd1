"""`ReadReport` counts what reading raw records gave and, by file, field and reason, what it left out."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import Any

from persona.errors import DataError

EXAMPLES = 3
REASONS = 10

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


@dataclass
class BadRows:
    """Rows left out for one reason."""

    count: int = 0
    """How many."""
    examples: list[str] = field(default_factory=list)
    """The first few, as file:line and the cell."""


@dataclass
class ReadReport:
    """What `read_histories` read; `str(report)` is a short paragraph."""

    rows: int = 0
    """Raw rows seen, those of joined files not among them."""
    events: int = 0
    """Events made from them."""
    users: int = 0
    """Users with an event."""
    future: int = 0
    """Events later than the moment of reading: kept, but often a wrong `time_format`."""
    copies: int = 0
    """Events equal in every field to another of the same user: kept, but often a file that was exported twice."""
    bad: dict[tuple[str, str, str], BadRows] = field(default_factory=dict)
    """(file, field, reason) to the rows left out for it."""
    strict: bool = False
    """Raise at the first bad row instead of counting it."""

    @property
    def bad_rows(self) -> int:
        """Rows left out, those of joined files among them."""
        return sum(bad.count for bad in self.bad.values())

    def add_bad(self, file: str, line: int, field: str, reason: str, value: Any = None) -> None:
        """Counts one bad row; raises `DataError` instead if `strict`."""
        shown = "" if value is None else f" ({_short.repr(value)})"
        if self.strict:
            raise DataError(f"{file}, line {line}: {field} {reason}{shown}")
        bad = self.bad.setdefault((file, field, reason), BadRows())
        bad.count += 1
        if len(bad.examples) < EXAMPLES:
            bad.examples.append(f"{file}:{line}{shown}")

    def __str__(self) -> str:
        text = f"{count(self.rows, 'row')} gave {count(self.events, 'event')} of {count(self.users, 'user')}."
        if self.future:
            text += f" Dated in the future: {count(self.future, 'event')}; is time_format right?"
        if self.copies:
            text += f" Exact copies of another event, kept: {self.copies:,}; is a file there twice?"
        if not self.bad:
            return text
        reasons = [
            f"{bad.count:,} in {file} where {field} {reason}, first at {', '.join(bad.examples)}"
            for (file, field, reason), bad in sorted(self.bad.items(), key=lambda item: -item[1].count)
        ]
        more = f"; and {count(len(reasons) - REASONS, 'more reason')}" if len(reasons) > REASONS else ""
        return f"{text} {count(self.bad_rows, 'bad row')} left out: {'; '.join(reasons[:REASONS])}{more}."


def count(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
