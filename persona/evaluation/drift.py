"""What is lost when old vectors are mapped into a new encoder's space instead of being made anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from persona.encoders.drift import Drift
from persona.errors import DataError
from persona.evaluation.intervals import interval

NEIGHBOURS = 10
"""k of recall@k."""


@dataclass(frozen=True)
class DriftLoss:
    """Means over held-out users, each `(mean, low, high)` with a bootstrap 95% interval.

    Recall: each held-out user's new vector asks for the k users nearest to it. Right are those by the others' new
    vectors, so an index of vectors made anew has recall 1. Among more users than these the k nearest lie closer
    together, and recall is lower.
    """

    users: int
    """Held-out users: those that are asked for, and the index."""
    k: int
    """Neighbours asked for."""
    mapped: tuple[float, float, float]
    """Recall of an index of mapped old vectors."""
    unmapped: tuple[float, float, float]
    """Recall of an index of the old vectors as they are; the narrower of the two is filled up with zeros."""
    cosine: tuple[float, float, float]
    """Of a mapped old vector and the same user's new one."""

    @property
    def chance(self) -> float:
        """Recall of an index of anything."""
        return self.k / (self.users - 1)

    def __str__(self) -> str:
        mapped, unmapped, cosine = (f"{m:.3f} [{low:.3f}, {high:.3f}]" for m, low, high in self._values)
        return (
            f"recall@{self.k} among {self.users} held-out users: mapped {mapped}, old as they are {unmapped}, "
            f"encoded anew 1, chance {self.chance:.3f}; cosine of mapped to new {cosine}"
        )

    @property
    def _values(self) -> tuple[tuple[float, float, float], ...]:
        return self.mapped, self.unmapped, self.cosine


def measure(old: np.ndarray, new: np.ndarray, *, k: int = NEIGHBOURS, seed: int = 0) -> DriftLoss:
    """The loss of a `Drift` fitted on a random half of the users and asked about the other half.

    `old` `[n, d]` and `new` `[n, d2]` are both encoders' vectors of the same n users; `seed` draws the half. Raises
    `DataError` as `Drift.fit` does, and for too few users: the held-out half has more than k + 1.
    """
    old, new = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
    half = len(old) // 2
    if len(old) - half < k + 2:
        raise DataError(f"a sample of {len(old)} users is too small to measure recall@{k}; take at least {2 * k + 4}")
    order = np.random.default_rng(seed).permutation(len(old))
    fitted, held = order[:half], order[half:]
    mapped = Drift.fit(old[fitted], new[fitted]).map(old[held])
    asked = _unit(new[held])
    right = _nearest(asked, asked, k)
    values = np.stack(
        [
            _recall(_nearest(asked, mapped, k), right),
            _recall(_nearest(asked, _unit(_filled(old[held], new.shape[1])), k), right),
            (mapped * asked).sum(1),
        ],
        axis=1,
    )  # [held-out users, 3]
    low, high = interval(values, lambda rows: rows.mean(0), seed=seed)
    results = [(float(m), float(a), float(b)) for m, a, b in zip(values.mean(0), low, high)]
    return DriftLoss(len(held), k, *results)


def _nearest(queries: np.ndarray, index: np.ndarray, k: int) -> np.ndarray:
    """The k rows of `index` with the highest dot product to each query, the query's own row apart, `[n, k]`."""
    scores = queries @ index.T
    np.fill_diagonal(scores, -np.inf)
    return np.argpartition(-scores, k - 1, axis=1)[:, :k]


def _recall(found: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Share of `right` `[n, k]` that was found, `[n]`."""
    return (found[:, :, None] == right[:, None]).any(1).mean(1)


def _filled(vectors: np.ndarray, width: int) -> np.ndarray:
    return np.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms == 0, 1.0, norms)
