"""Reads the vectors of `persona embed` and `persona migrate` for use: those of one encoder alone, and all of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from persona.encoders.part_files import MANIFEST, TEMPORARY
from persona.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("user", "instruction", "embedding", "revision")
MAPPED_FROM = "mapped_from"
"""Column of `persona migrate`: the revision of the encoder that made what was mapped."""


class StoredVectors(NamedTuple):
    """Users' vectors that can be compared with each other."""

    users: tuple[str, ...]
    """n ids, none twice."""
    matrix: np.ndarray
    """`[n, d]` float32, L2-normalised, but for a zero vector."""
    revision: str
    """The encoder whose space they lie in; see `encoder_revision`."""
    mapped_from: str
    """Revision of the encoder that made them, where they were mapped into that space by `persona migrate`; else
    empty: the space's own encoder did."""


def read_vectors(folder: str | Path, instruction: str | None = None) -> StoredVectors:
    """The vectors in a folder that `persona embed`, `persona refresh` or `persona migrate` wrote.

    `instruction` may be left out where the folder has one alone. Raises `DataError` for a folder that is none of
    these, is not whole (see `part_paths`) or holds a damaged file, for vectors of several encoders, which cannot be
    compared, or of several widths, for a user twice, NaN, and for an instruction that is not there.
    """
    folder, tables = Path(folder), []
    found: set[str] = set()
    for path in part_paths(folder):
        table = read_part(path)
        found |= set(table["instruction"].unique().to_pylist())
        tables.append(table)
    _check_one_encoder(folder, tables)
    widths = {table["embedding"].type.list_size for table in tables}
    if len(widths) > 1:
        raise DataError(f"{folder} holds vectors of the widths {sorted(widths)}; embed all users anew")
    if instruction is None and len(found) != 1:
        raise DataError(f"{folder} holds vectors for {len(found)} instructions, name one of {sorted(found)}")
    instruction = next(iter(found)) if instruction is None else instruction
    if instruction not in found:
        raise DataError(f"{folder} holds no vectors for {instruction!r}, but for {sorted(found)}")
    users, parts = [], []
    for table in tables:
        own, vectors = rows_of(table, instruction)
        users += own
        parts.append(vectors)
    twice = [user for user, count in Counter(users).items() if count > 1]
    if twice:
        raise DataError(f"{folder} holds the user {twice[0]!r} twice for one instruction; embed all users anew")
    matrix = np.concatenate(parts)
    if not np.isfinite(matrix).all():
        raise DataError(f"{folder} holds NaN or an infinity in a vector; embed all users anew")
    first = tables[0]
    mapped = first[MAPPED_FROM][0].as_py() if MAPPED_FROM in first.column_names else ""
    return StoredVectors(tuple(users), matrix, first["revision"][0].as_py(), mapped)


def instructions_of(folder: str | Path) -> list[str]:
    """The instructions that a folder has vectors for, in the order of its first part. Raises `DataError`."""
    return read_part(part_paths(folder)[0])["instruction"].unique().to_pylist()


def read_manifest(folder: str | Path) -> dict:
    """The settings of the run that wrote a folder of vectors. Raises `DataError` where there are none."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a folder of persona embed") from None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise DataError(f"{path} is damaged; embed all users anew with --overwrite")
    return manifest


def part_paths(folder: str | Path) -> list[Path]:
    """The files of a whole folder of vectors, in order.

    Raises `DataError` where one is missing, is too many or is being written, or there is none.
    """
    folder, parts = Path(folder), read_manifest(folder).get("parts")
    names = sorted(path.name for path in folder.glob("part-*.parquet"))
    wanted = [f"part-{number:05d}.parquet" for number in range(len(names) if parts is None else parts)]
    if missing := [name for name in wanted if name not in names]:
        raise DataError(f"{folder} lacks {len(missing)} parts, {missing[0]} first: let the run that wrote it end")
    if strange := [name for name in names if name not in wanted]:
        raise DataError(f"{folder} holds {strange[0]}, which its {MANIFEST} does not know; embed all users anew")
    if writing := sorted(path.name for path in folder.glob(f"{TEMPORARY}*")):
        raise DataError(f"{folder} holds {writing[0]}: a run is writing it, or was killed; let it end")
    if not names:
        raise DataError(f"{folder} holds no vectors")
    return [folder / name for name in wanted]


def read_part(path: Path) -> pyarrow.Table:
    """One file of vectors. Raises `DataError` for one that is damaged or has other columns."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("vectors in Parquet need pyarrow: pip install 'persona[train]'") from error
    try:
        table = pyarrow.parquet.read_table(path, partitioning=None)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is damaged ({str(error).splitlines()[0]}); run persona embed again") from None
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise DataError(f"{path} has no column {missing[0]!r}; name a folder of persona embed")
    if not pyarrow.types.is_fixed_size_list(table["embedding"].type):
        raise DataError(f"{path}: embedding is {table['embedding'].type}, not a list of a fixed size")
    if not len(table) or any(table[name].null_count for name in COLUMNS):
        raise DataError(f"{path} has no rows, or rows with a null; embed all users anew")
    return table


def rows_of(table: pyarrow.Table, instruction: str) -> tuple[list[str], np.ndarray]:
    """Users of one instruction in a part, and their vectors `[n, d]`."""
    import pyarrow.compute as compute

    own = table.filter(compute.equal(table["instruction"], instruction))
    return own["user"].to_pylist(), matrix_of(own)


def matrix_of(table: pyarrow.Table) -> np.ndarray:
    """The vectors of a part, `[rows, d]` float32."""
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(-1, table["embedding"].type.list_size).astype(np.float32)


def _check_one_encoder(folder: Path, tables: list[pyarrow.Table]) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for table in tables:
        mapped = table[MAPPED_FROM].to_pylist() if MAPPED_FROM in table.column_names else [""] * len(table)
        counts.update(zip(table["revision"].to_pylist(), mapped))
    if len(counts) > 1:
        listing = ", ".join(
            f"{count} of {revision[:12]}{f' mapped from {mapped[:12]}' if mapped else ''}"
            for (revision, mapped), count in counts.most_common()
        )
        raise DataError(
            f"{folder} holds vectors of {len(counts)} encoder revisions, which cannot be compared: {listing}. Embed "
            "all users anew with one encoder, or see persona migrate"
        )
