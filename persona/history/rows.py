"""Opens a raw file, whatever its format, as a `Table`: column names and an iterator of rows.

Nothing here knows what a column means; `cells.py` reads single values and `readers.py` makes events.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from persona.errors import DataError, MissingExtraError

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".inter": "recbole",
    ".item": "recbole",
    ".user": "recbole",
}


class Row(NamedTuple):
    """One raw record."""

    line: int
    """1-based line of the file where the record starts; its 1-based number in a file that has no lines."""
    cells: dict[str, Any]
    """Column name to raw value."""
    problem: str | None = None
    """The kind of thing wrong with the record as a whole, whose cells are then empty."""
    detail: str | None = None
    """The particulars of the problem."""


@dataclass
class Table:
    """A raw file that has been opened and not yet read."""

    name: str
    """For messages: the path relative to the data folder."""
    columns: list[str] | None
    """None when there is no row to learn them from."""
    rows: Iterator[Row]
    """Can be read once."""


def open_tables(path: str, data: Path, format: str | None = None, split: str | None = None) -> Iterator[Table]:
    """Opens each file that `path` (a name or a glob relative to the folder `data`) stands for, one after another.

    Raises `DataError` when nothing matches, the format is unknown or the file is damaged, and `MissingExtraError`
    when the format needs a library that is not installed.
    """
    if format == "datasets":
        yield from _datasets(path, data, split)
        return
    for file in find_files(path, data):
        name = str(file.relative_to(data)) if file.is_relative_to(data) else str(file)
        with _damage(name):
            yield _open_table(file, name, format or _format_of(file))


def find_files(path: str, data: Path) -> list[Path]:
    """The files that `path` stands for, sorted; raises `DataError` if there is none."""
    if not data.is_dir():
        raise DataError(f"{data}: there is no such folder")
    found = [data / path] if (data / path).is_file() else sorted(data / name for name in glob(path, root_dir=data))
    found = [file for file in found if file.is_file()]
    if not found:
        there = sorted(entry.name + "/" * entry.is_dir() for entry in data.iterdir())
        listing = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
        raise DataError(f"{data}: no file matches {path!r}; the folder holds {listing or 'nothing'}")
    return found


def _format_of(file: Path) -> str:
    ending = Path(file.name.removesuffix(".gz")).suffix.lower()
    if ending not in FORMATS:
        known = " ".join(FORMATS)
        raise DataError(f"{file}: cannot tell the format from the ending; set `format`, or use one of {known}")
    return FORMATS[ending]


def _open_table(file: Path, name: str, format: str) -> Table:
    if format == "csv":
        tabs = Path(file.name.removesuffix(".gz")).suffix.lower() == ".tsv"
        return _delimited(file, name, delimiter="\t" if tabs else ",")
    if format == "recbole":
        return _delimited(file, name, delimiter="\t", quoting=csv.QUOTE_NONE, typed=True)
    if format == "jsonl":
        return _jsonl(file, name)
    return _parquet(file, name)


@contextmanager
def _damage(name: str):
    """Turns the errors of a damaged or unreadable file into one `DataError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: is not a whole gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from None


def _open_text(file: Path, newline: str) -> TextIO:
    opener = gzip.open if file.name.endswith(".gz") else open
    return opener(file, "rt", encoding="utf-8-sig", newline=newline)


def _delimited(file: Path, name: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL, typed: bool = False) -> Table:
    records = _records(file, name, delimiter, quoting)
    _, header, broken = next(records, (1, None, None))
    if not header:
        raise DataError(f"{name}, line 1: {broken or 'is empty'}; expected a header with the names of the columns")
    columns = [column.split(":")[0] for column in header] if typed else header
    for column in columns:
        if columns.count(column) > 1:
            raise DataError(f"{name}, line 1: two columns are named {column!r}")

    def rows() -> Iterator[Row]:
        for line, cells, broken in records:
            if broken:
                yield Row(line, {}, "is not valid CSV", broken)
            elif len(cells) != len(columns):
                yield Row(line, {}, "has more or fewer cells than the header", f"{len(cells)} and {len(columns)}")
            else:
                yield Row(line, dict(zip(columns, cells)))

    return Table(name, columns, rows())


def _records(file: Path, name: str, delimiter: str, quoting: int) -> Iterator[tuple[int, list[str], str | None]]:
    with _damage(name), _open_text(file, newline="") as handle:
        # strict: an open quote is an error, where it would else swallow the rest of the file in silence.
        reader = csv.reader(handle, delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, [], f"{error}; read on to line {reader.line_num}, is a quote left open?"
                continue
            if cells:
                yield line, cells, None


def _jsonl(file: Path, name: str) -> Table:
    # The keys may differ from line to line, so all lines are looked at before a column can be called missing.
    columns = {key: None for row in _objects(file, name) for key in row.cells}
    return Table(name, list(columns) or None, _objects(file, name))


def _objects(file: Path, name: str) -> Iterator[Row]:
    with _damage(name), _open_text(file, newline="\n") as handle:
        for line, text in enumerate(handle, 1):
            if not text.strip():
                continue
            try:
                cells = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield Row(line, {}, "is not valid JSON", str(error))
                continue
            if isinstance(cells, dict):
                yield Row(line, cells)
            else:
                yield Row(line, {}, "is not a JSON object", type(cells).__name__)


def _parquet(file: Path, name: str) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("reading parquet needs pyarrow: pip install 'persona[train]'") from error
    try:
        opened = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: is not a whole parquet file ({error})") from None

    def rows() -> Iterator[Row]:
        number = 0
        try:
            with _damage(name), opened:
                for batch in opened.iter_batches():
                    for cells in batch.to_pylist():
                        number += 1
                        yield Row(number, cells)
        except pyarrow.ArrowException as error:
            raise DataError(f"{name}: is damaged after row {number} ({error})") from None

    return Table(name, list(opened.schema_arrow.names), rows())


def _datasets(path: str, data: Path, split: str | None) -> Iterator[Table]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading a dataset needs datasets: pip install 'persona[train]'") from error
    folder = data / path
    try:
        loaded = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(path)
    except Exception as error:  # the hub, the network and the builders each raise their own
        place = f"the folder {folder}" if folder.is_dir() else f"{folder} is no folder; as a hub dataset, {path!r}"
        raise DataError(f"{place}: cannot be loaded ({error})") from error
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "all"): loaded}
    if split is not None and split not in splits:
        raise DataError(f"{path}: has no split {split!r}; its splits are {', '.join(splits)}")
    for name in [split] if split is not None else splits:
        plain = splits[name].with_format(None)  # a saved dataset may remember to give tensors
        rows = (Row(number, cells) for number, cells in enumerate(plain, 1))
        yield Table(f"{path}[{name}]", list(plain.column_names), rows)
