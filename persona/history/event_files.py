"""Events of many users in Parquet files, in our own columns: read, checked row by row, and grouped by user.

No recipe is needed: a row is an `Event` and whose it is. `readers.py` is for records that know nothing of us.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persona.errors import DataError, EventError, MissingExtraError
from persona.history.event import Event, History, check_user
from persona.history.report import count

if TYPE_CHECKING:
    import pyarrow

TEXTS, NUMBERS = ("user", "source", "text", "item_id"), ("timestamp", "value")
COLUMNS = ("user", "source", "timestamp", "text", "item_id", "value", "attributes")
"""All columns that a file may have; those beyond user and source may be missing."""
CHECKED = 65_536
"""Rows that are turned into Python objects at a time."""
SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


@dataclass(frozen=True)
class _File:
    name: str
    """For messages: the path relative to the folder."""
    table: pyarrow.Table
    """Columns of `COLUMNS`: texts as large_string, numbers as float64, times in seconds, attributes as they came."""


class EventFiles:
    """The events of one Parquet file, or of all `*.parquet` in a folder and below it, by user.

    Texts are Arrow strings; `timestamp` is a number of seconds since 1970-01-01 UTC or an Arrow timestamp (UTC if it
    has no zone); `attributes` is a JSON object in a string, a map, or a struct, whose null fields are left out, as they
    are other sources' attributes. A user's rows may lie anywhere; events of equal time keep the order of files, by
    name, and of rows. All rows are held in memory as Arrow holds them, uncompressed (a million with short texts and
    attributes take 250 MB), and sorted once by an index of 8 bytes a row; only the users asked for, and the rows that
    are being checked, become Python objects.

    Raises `DataError` for files that cannot be read, for a column that is unknown, missing or of the wrong type, and
    for the first row that is no event, naming file, row (from 1) and reason; `MissingExtraError` without pyarrow.
    """

    def __init__(self, path: str | Path):
        try:
            import pyarrow
            import pyarrow.compute as compute
        except ImportError as error:
            raise MissingExtraError("events in Parquet need pyarrow: pip install 'persona[train]'") from error
        path = Path(path)
        self._files: list[_File] = []
        self.digests: dict[str, str] = {}
        """File name, relative to the folder, to the SHA-256 of its content."""
        for file, name in _find(path):
            table = _read(file, name)
            _check(name, table)
            self._files.append(_File(name, table))
            with file.open("rb") as content:
                self.digests[name] = hashlib.file_digest(content, "sha256").hexdigest()
        self._first = np.cumsum([0, *(len(f.table) for f in self._files)])
        self.rows = int(self._first[-1])
        """Events in all files."""
        if not self.rows:
            raise DataError(f"{path}: holds no events")
        users, sources = (_column(self._files, name) for name in ("user", "source"))
        # A stable sort, by bytes of UTF-8, which is the order of Python's strings.
        self._order = compute.sort_indices(users).to_numpy().astype(np.int64)
        ordered = users.take(pyarrow.array(self._order))
        changes = compute.not_equal(ordered[1:], ordered[:-1]).to_numpy()
        self._starts = np.concatenate([[0], np.flatnonzero(changes) + 1, [self.rows]])
        self.sources: dict[str, int] = {c["values"]: c["counts"] for c in compute.value_counts(sources).to_pylist()}
        """Source to its number of events."""
        times, now = [f.table["timestamp"] for f in self._files if "timestamp" in f.table.column_names], time.time()
        self.future = sum(compute.sum(compute.greater(own, now)).as_py() or 0 for own in times)
        """Events later than the moment of reading: kept, but often times in milliseconds."""

    def __str__(self) -> str:
        text = f"{self.rows} events of {len(self)} users"
        if self.future:
            text += f". Dated in the future: {count(self.future, 'event')}; are timestamps in seconds?"
        return text

    def __len__(self) -> int:
        """The number of users."""
        return len(self._starts) - 1

    def histories(self, first: int = 0, last: int | None = None) -> list[History]:
        """Users number `first` to `last` (without it) of all users in the order of their ids."""
        starts = self._starts[first : len(self) if last is None else min(last, len(self))]
        rows = self._order[starts[0] : self._starts[first + len(starts)]] if len(starts) else self._order[:0]
        made: dict[int, tuple[str, Event]] = {}
        by_file = np.sort(rows)
        bounds = np.searchsorted(by_file, self._first).tolist()
        for file, start, low, high in zip(self._files, self._first, bounds, bounds[1:]):
            if low < high:
                own = by_file[low:high]
                local = own - start
                made |= zip(own.tolist(), _events(file.name, file.table.take(local), (local + 1).tolist()))
        ordered = (made[row] for row in rows.tolist())
        return [History(user, tuple(e for _, e in own)) for user, own in groupby(ordered, key=lambda pair: pair[0])]


def _find(path: Path) -> list[tuple[Path, str]]:
    """Files and their names for messages."""
    if path.is_file():
        return [(path, path.name)]
    if not path.is_dir():
        raise DataError(f"{path}: there is no such file or folder")
    found = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*.parquet") if file.is_file())
    if not found:
        raise DataError(f"{path}: holds no file whose name ends in .parquet")
    return [(file, name) for name, file in found]


def _read(file: Path, name: str) -> pyarrow.Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            found = opened.schema_arrow.names
            for column in found:
                if column not in COLUMNS:
                    raise DataError(f"{name}: has a column {column!r}; the columns known are {', '.join(COLUMNS)}")
                if found.count(column) > 1:
                    raise DataError(f"{name}: two columns are named {column!r}")
            for column in ("user", "source"):
                if column not in found:
                    raise DataError(f"{name}: has no column {column!r}; its columns are {', '.join(found)}")
            table = opened.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: is not a whole Parquet file ({error})") from None
    cast = {column: _cast(name, column, table[column]) for column in COLUMNS if column in found}
    return pyarrow.table(cast).combine_chunks()  # or each look-up of rows would look through all chunks


def _cast(name: str, column: str, cells: pyarrow.ChunkedArray) -> pyarrow.ChunkedArray:
    """A column in the type that `_File.table` has."""
    import pyarrow
    from pyarrow import compute, types

    kind = cells.type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    text = types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)
    if types.is_null(kind):
        return cells.cast(pyarrow.float64() if column in NUMBERS else pyarrow.large_string())
    if text and column not in NUMBERS:
        return cells.cast(inner).cast(pyarrow.large_string())
    if column in NUMBERS and (types.is_integer(kind) or types.is_floating(kind)):
        return cells.cast(pyarrow.float64(), safe=False)
    if column == "timestamp" and types.is_timestamp(kind):
        return compute.divide(cells.cast(pyarrow.int64()).cast(pyarrow.float64(), safe=False), SECOND[kind.unit])
    if column == "attributes" and (types.is_struct(kind) or types.is_map(kind)):
        return cells
    wanted = {"timestamp": "a number of seconds or a timestamp", "value": "a number"}
    wanted |= {"attributes": "a JSON string, a struct or a map"}
    raise DataError(f"{name}: column {column!r} is {kind}, not {wanted.get(column, 'a string')}; cast it")


def _check(name: str, table: pyarrow.Table) -> None:
    """Raises `DataError` for the first row that is no event."""
    for start in range(0, len(table), CHECKED):
        part = table.slice(start, CHECKED)
        for _ in _events(name, part, range(start + 1, start + len(part) + 1)):
            pass


def _events(name: str, table: pyarrow.Table, numbers: Iterable[int]) -> Iterator[tuple[str, Event]]:
    """(user, event) of each row; `numbers` are the rows' numbers in the file, for messages."""
    for number, cells in zip(numbers, _cells(table)):
        try:
            if isinstance(cells, Exception):
                raise EventError(f"cannot be read: {cells}")
            user, attributes = check_user(cells.pop("user")), _attributes(cells.pop("attributes", None))
            yield user, Event(**cells, attributes=attributes)
        except EventError as error:
            raise DataError(f"{name}, row {number}: {error}") from None


def _cells(table: pyarrow.Table) -> Iterable[dict[str, Any] | Exception]:
    """Rows as Python objects; in place of one that holds bytes that are not UTF-8, or the like, the error."""
    try:
        return table.to_pylist()
    except ValueError:  # UnicodeDecodeError and ArrowInvalid, too
        return [_row(table.slice(i, 1)) for i in range(len(table))]


def _row(table: pyarrow.Table) -> dict[str, Any] | Exception:
    try:
        return table.to_pylist()[0]
    except ValueError as error:
        return error


def _attributes(cell: Any) -> Any:
    """What JSON, a map (pairs) or a struct (a dict) says; raises `EventError` for JSON and pairs that say nothing."""
    if cell is None:
        return {}
    try:
        if isinstance(cell, str):
            return _JSON.decode(cell)
        return _object(cell) if isinstance(cell, list) else {k: v for k, v in cell.items() if v is not None}
    except (ValueError, RecursionError) as error:
        raise EventError(f"event.attributes cannot be read: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_object)  # one for all rows: making it costs more than using it


def _column(files: Iterable[_File], name: str) -> pyarrow.ChunkedArray:
    import pyarrow

    return pyarrow.chunked_array([chunk for file in files for chunk in file.table[name].chunks], pyarrow.large_string())
