"""Arrays, labels and indices that a caller hands in, checked, so that an error names them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from persona.errors import DataError


def as_matrix(name: str, values: np.ndarray) -> np.ndarray:
    """Finite float64 `[rows, columns]`; raises `DataError` for anything else."""
    try:
        matrix = np.asarray(values, dtype=float)
    except (ValueError, TypeError) as error:
        raise DataError(f"{name} is not a matrix of numbers: {error}") from None
    if matrix.ndim != 2:
        raise DataError(f"{name} has the shape {list(matrix.shape)}; it is one row of numbers for each user")
    bad = np.flatnonzero(~np.isfinite(matrix).all(1))
    if len(bad):
        raise DataError(f"{name} holds NaN or an infinity in row {bad[0]}")
    return matrix


def as_labels(name: str, labels: Sequence[str], rows: np.ndarray) -> list[str]:
    """One string for each of `rows`; raises `DataError` for anything else."""
    if len(labels) != len(rows):
        raise DataError(f"{name} has {len(labels)} labels for {len(rows)} rows")
    for i, label in enumerate(labels):
        if not isinstance(label, str):
            raise DataError(f"{name}[{i}] is {label!r}; a label is a string")
    return [str(label) for label in labels]  # of numpy's strings, too


def as_indices(name: str, values: Sequence[int], size: int) -> np.ndarray:
    """Whole numbers `[n]` from 0 to `size` - 1; raises `DataError` for anything else."""
    indices = np.asarray(values)
    if indices.ndim != 1 or (len(indices) and indices.dtype.kind not in "iu"):
        raise DataError(f"{name} is not a list of indices")
    for bad in indices[(indices < 0) | (indices >= size)][:1]:
        raise DataError(f"{name} holds {bad}; indices are 0 to {size - 1}")
    return indices.astype(int)
