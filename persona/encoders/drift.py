"""`Drift`: how one encoder's space lies to another's, estimated from users whom both have encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from persona.encoders.part_files import PartFiles
from persona.encoders.stored_vectors import MAPPED_FROM, matrix_of, part_paths, read_manifest, read_part
from persona.errors import DataError


@dataclass(frozen=True)
class Drift:
    """Mean shift, rotation and scale of an old space to a new one (orthogonal Procrustes, Schönemann 1966).

    Two trainings of one encoder often differ by little more than that; what else they differ by, no such map brings
    back. How much that is, `persona.evaluation.drift` measures.
    """

    old_mean: np.ndarray
    """`[d]`."""
    new_mean: np.ndarray
    """`[d2]`."""
    rotation: np.ndarray
    """`[d, d2]` with orthonormal rows."""
    scale: float
    """By which distances to the mean grow."""

    @classmethod
    def fit(cls, old: np.ndarray, new: np.ndarray) -> Drift:
        """The map nearest, by squared error, to one that takes `old` `[n, d]` to `new` `[n, d2]`, row by row the same
        user.

        Where `new` is wider, `old` is turned into a d-dimensional part of its space: distances stay what they were.
        A narrower one would not hold them, and is refused. Raises `DataError` for that, for fewer than 2 rows, for
        shapes that do not fit, and for NaN.
        """
        from scipy.linalg import orthogonal_procrustes

        old, new = _checked("old", old), _checked("new", new)
        if len(old) != len(new) or len(old) < 2:
            raise DataError(f"there are {len(old)} old and {len(new)} new vectors; bring the same users', at least 2")
        width, wider = old.shape[1], new.shape[1] - old.shape[1]
        if wider < 0:
            raise DataError(
                f"old vectors have {width} dimensions and new ones {new.shape[1]}, which cannot hold them: encode all "
                "users anew"
            )
        old_mean, new_mean = old.mean(0), new.mean(0)
        centred = np.pad(old - old_mean, ((0, 0), (0, wider)))
        rotation, overlap = orthogonal_procrustes(centred, new - new_mean)
        spread = float((centred**2).sum())
        return cls(old_mean, new_mean, rotation[:width], overlap / spread if spread else 1.0)

    def map(self, old: np.ndarray) -> np.ndarray:
        """Old vectors `[n, d]` in the new space, `[n, d2]` float32, L2-normalised. Raises `DataError`."""
        old = _checked("old", old)
        if old.shape[1] != len(self.old_mean):
            raise DataError(f"old vectors have {old.shape[1]} dimensions, and the map takes {len(self.old_mean)}")
        made = self.scale * (old - self.old_mean) @ self.rotation + self.new_mean
        norms = np.linalg.norm(made, axis=1, keepdims=True)
        return (made / np.where(norms == 0, 1.0, norms)).astype(np.float32)


def write_mapped(folder: str | Path, out: str | Path, drifts: Mapping[str, Drift], revision: str, tokens: int) -> int:
    """Maps all vectors in `folder`, those of each instruction by the `Drift` of that name, into the folder `out`.

    The rows are those of `folder`, with `revision`, the new encoder's, in place of the old one, which stands in the
    column mapped_from. `tokens` is how many user tokens the new vectors were the mean of. The manifest says that they
    were mapped, so that `persona embed` refuses to go on with them. Returns the number of vectors. Raises `DataError`
    as `read_part` does, and `PersonaError` as `PartFiles` does for a folder that holds anything else.
    """
    import pyarrow
    import pyarrow.compute as compute

    paths = part_paths(folder)
    before = read_part(paths[0])["revision"][0].as_py()
    dim = len(next(iter(drifts.values())).new_mean)
    manifest = {**read_manifest(folder), "revision": f"{revision} mapped from {before}", "dim": dim, "tokens": tokens}
    made = PartFiles(out, {**manifest, "parts": len(paths)})
    made.prepare()
    count = 0
    for number, path in enumerate(paths):
        table = read_part(path)
        old, new = matrix_of(table), np.zeros((len(table), dim), np.float32)
        for instruction, drift in drifts.items():
            own = compute.equal(table["instruction"], instruction).to_numpy()
            new[own] = drift.map(old[own])
        vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(new.ravel()), dim)
        for name, column in (
            ("embedding", vectors),
            (MAPPED_FROM, table["revision"]),
            ("revision", pyarrow.array([revision] * len(table), pyarrow.string())),
        ):
            at = table.column_names.index(name) if name in table.column_names else table.num_columns
            table = table.remove_column(at) if at < table.num_columns else table
            table = table.add_column(at, name, column)
        made.write(number, table)
        count += len(table)
    return count


def _checked(name: str, vectors: np.ndarray) -> np.ndarray:
    """Finite float64 `[n, d]`."""
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise DataError(f"{name} vectors of the shape {list(vectors.shape)} are no matrix of finite numbers, [n, d]")
    return vectors
