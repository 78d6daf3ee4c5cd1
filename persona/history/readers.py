"""Carries out `ReaderSpec`s: raw files become one `History` per user, and every row left out is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from persona.errors import DataError, EventError
from persona.history.cells import BadCell, Template, check_time_format, read_id, read_number, read_text, read_time
from persona.history.event import Event, History, check_user
from persona.history.report import ReadReport
from persona.history.rows import Row, Table, open_tables
from persona.history.source import ColumnSpec, JoinSpec, ReaderSpec

ROW = "the row"


def read_histories(
    readers: Sequence[ReaderSpec], data: str | Path, *, strict: bool = False
) -> tuple[dict[str, History], ReadReport]:
    """Reads every file that `readers` name, below the folder `data`, into one history per user.

    A row that cannot become an event is left out and counted in the report: no user, no readable time where the
    reader has a time column, a number that does not parse, nothing to join with. An empty or NaN number is merely
    unknown. With `strict` the first such row raises `DataError` instead. A missing file or column, a damaged file
    and text that is not UTF-8 always raise `DataError`; an unusable template or time format, `RecipeError`.
    """
    data = Path(data)
    report = ReadReport(strict=strict)
    joins = _Joins(data, report)
    events: dict[str, list[Event]] = {}
    now = time.time()
    for spec in readers:
        check_time_format(spec.time_format)
        for table in open_tables(spec.path, data, spec.format, spec.split):
            for users, event in _events(spec, table, joins, report):
                for user in users:
                    events.setdefault(user, []).append(event)
                report.events += 1
                report.future += event.timestamp is not None and event.timestamp > now
    report.users = len(events)
    histories = {user: History(user, tuple(those)) for user, those in events.items()}
    report.copies = sum(_copies(history) for history in histories.values())
    return histories, report


def _copies(history: History) -> int:
    """Events that say in every field what another one says."""
    at_once = (list(group) for _, group in groupby(history.events, key=lambda event: event.timestamp))
    return sum(len(group) - len(set(map(repr, group))) for group in at_once if len(group) > 1)


def _events(spec: ReaderSpec, table: Table, joins: _Joins, report: ReadReport) -> Iterator[tuple[list[str], Event]]:
    """The event of each good row of one file, and whose it is."""
    template = Template(spec.text) if spec.text is not None else None
    attributes = {
        name: ColumnSpec(column) if isinstance(column, str) else column for name, column in spec.attributes.items()
    }
    named = [spec.user, spec.timestamp, spec.item_id, spec.value, spec.event_id]
    named += [column.column for column in attributes.values()]
    named += [name for name in (template.columns if template else []) if name not in attributes]
    joiners = joins.of(spec, table, {name for name in named if name is not None})
    for row in table.rows:
        report.rows += 1
        cells = row.cells
        try:
            if row.problem:
                raise _BadField(ROW, row.problem, row.detail)
            for join in joiners:
                cells = join(cells)
            users, event = _event(spec, template, attributes, cells)
        except _BadField as bad:
            report.add_bad(table.name, row.line, bad.field, bad.kind, bad.value)
        else:
            yield users, event


def _event(
    spec: ReaderSpec, template: Template | None, attributes: dict[str, ColumnSpec], cells: dict[str, Any]
) -> tuple[list[str], Event]:
    cell = cells.get(spec.user)
    users = [_read(spec.user, read_id, one) for one in (cell if isinstance(cell, list) else [cell])]
    if not users or None in users:
        raise _BadField(spec.user, "is missing")
    timestamp = None
    if spec.timestamp is not None:
        timestamp = _read(spec.timestamp, read_time, cells.get(spec.timestamp), spec.time_format)
    values = {name: _attribute(column, cells) for name, column in attributes.items()}
    try:
        return list(dict.fromkeys(map(check_user, users))), Event(
            source=spec.source,
            timestamp=timestamp,
            text=_read("text", template.fill, {**values, **cells}) if template else None,
            item_id=_optional(spec.item_id, read_id, cells),
            value=_optional(spec.value, read_number, cells),
            attributes=values,
            event_id=_optional(spec.event_id, read_id, cells),
        )
    except EventError as error:
        raise _BadField(ROW, "is not an event", str(error)) from None


def _attribute(spec: ColumnSpec, cells: dict[str, Any]) -> str | float | None:
    cell = cells.get(spec.column)
    if spec.split is not None:
        parts = cell  # a list is split already
        if not isinstance(cell, list):
            parts = (_read(spec.column, read_text, cell) or "").split(spec.split)
        cell = (_read(spec.column, read_text, parts[0]) or "").strip() if parts else None
    return _read(spec.column, read_number if spec.type == "number" else read_text, cell)


def _optional(column: str | None, read: Callable, cells: dict[str, Any]) -> Any:
    return None if column is None else _read(column, read, cells.get(column))


def _read(field: str, read: Callable, cell: Any, *more: Any) -> Any:
    try:
        return read(cell, *more)
    except BadCell as bad:
        raise _BadField(field, bad.kind, bad.value) from None


class _BadField(BadCell):
    """A `BadCell` that knows which field it was in."""

    def __init__(self, field: str, kind: str, value: Any = None):
        super().__init__(kind, value)
        self.field = field


class _Joins:
    """The joined files, each read once into a dict by key."""

    def __init__(self, data: Path, report: ReadReport):
        self.data, self.report = data, report
        self.loaded: dict[tuple, tuple[list[str], dict[str, dict[str, Any]]]] = {}

    def of(self, spec: ReaderSpec, table: Table, named: set[str]) -> list[Callable[[dict], dict]]:
        """Functions that add joined cells to a row's; raises `DataError` if a named column is in no file."""
        if table.columns is None:
            return []
        there, joiners, origin = list(table.columns), [], table.name
        for join in spec.join:
            self._check(origin, [join.on], there)
            columns, by_key = self._load(join)
            needed = named.intersection(columns).difference(there)
            joiners.append(_joiner(join, by_key, bool(needed)))
            there += [column for column in columns if column not in there]
            origin += f" joined with {join.path}"
        self._check(origin, sorted(named), there)
        return joiners

    def _check(self, file: str, wanted: Sequence[str], there: Sequence[str]) -> None:
        for column in wanted:
            if column not in there:
                raise DataError(f"{file}: has no column {column!r}; its columns are {', '.join(there)}")

    def _load(self, join: JoinSpec) -> tuple[list[str], dict[str, dict[str, Any]]]:
        key = (join.path, join.on, join.format)
        if key not in self.loaded:
            columns, by_key = {}, {}
            for table in open_tables(join.path, self.data, join.format):
                if table.columns is not None:
                    self._check(table.name, [join.on], table.columns)
                    columns |= dict.fromkeys(table.columns)
                for row in table.rows:
                    self._keep(join, table.name, row, by_key)
            self.loaded[key] = list(columns), by_key
        return self.loaded[key]

    def _keep(self, join: JoinSpec, file: str, row: Row, by_key: dict[str, dict[str, Any]]) -> None:
        if row.problem:
            self.report.add_bad(file, row.line, ROW, row.problem, row.detail)
            return
        try:
            value = _read(join.on, read_id, row.cells.get(join.on))
        except _BadField as bad:
            self.report.add_bad(file, row.line, bad.field, bad.kind, bad.value)
            return
        if value is None:
            self.report.add_bad(file, row.line, join.on, "is missing")
        elif by_key.setdefault(value, row.cells) != row.cells:
            self.report.add_bad(file, row.line, join.on, "appears twice with different cells", value)


def _joiner(join: JoinSpec, by_key: dict[str, dict[str, Any]], needed: bool) -> Callable[[dict], dict]:
    def joined(cells: dict[str, Any]) -> dict[str, Any]:
        value = _read(join.on, read_id, cells.get(join.on))
        if value not in by_key and needed:
            raise _BadField(join.on, "is missing" if value is None else f"is not in {join.path}", value)
        return {**by_key.get(value, {}), **cells}

    return joined
