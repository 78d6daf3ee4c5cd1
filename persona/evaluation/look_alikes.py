"""Look-alikes: users who are near to some given ones, and how well that finds the others of a class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from persona.errors import DataError, MissingExtraError
from persona.evaluation.arrays import as_indices, as_labels, as_matrix

try:
    from sklearn.metrics import roc_auc_score
except ImportError as error:
    raise MissingExtraError(f"look-alikes cannot be scored ({error}): pip install 'persona[eval]'") from error


@dataclass(frozen=True)
class LookAlikes:
    """How well users of a class are found by some of them."""

    classes: tuple[str, ...]
    """Labels, sorted."""
    seeds: np.ndarray
    """`[classes]`: users of the class that were given."""
    rest: np.ndarray
    """`[classes]`: users of the class that were to be found: R."""
    auc_of: np.ndarray
    """`[classes]`: area under the ROC curve of the ranking of all users but the seeds."""
    precision_of: np.ndarray
    """`[classes]`: share of the class among the first R; of users that score the same, as many as chance would take."""
    chance_of: np.ndarray
    """`[classes]`: share of the class among all users but the seeds: the precision of a ranking by chance."""
    dropped: tuple[str, ...]
    """Labels with one user, who cannot be both given and found."""

    @property
    def auc(self) -> float:
        """Mean of `auc_of`."""
        return float(self.auc_of.mean())

    @property
    def precision(self) -> float:
        """Mean of `precision_of`."""
        return float(self.precision_of.mean())


def look_alikes(embeddings: np.ndarray, seeds: Sequence[int], count: int) -> np.ndarray:
    """The `count` users, seeds apart, nearest to the seeds, best first: indices `[count]` into `embeddings` `[n, d]`.

    Nearness is the cosine to the mean of the seeds' unit vectors. Raises `DataError` for an index that does not fit, no
    seed, more users than there are, NaN.
    """
    embeddings = as_matrix("embeddings", embeddings)
    seeds = np.unique(as_indices("seeds", seeds, len(embeddings)))
    others = np.setdiff1d(np.arange(len(embeddings)), seeds)
    if not 1 <= count <= len(others):
        raise DataError(f"there are {len(others)} users besides the seeds; {count} of them cannot be named")
    return others[np.argsort(-_nearness(embeddings, seeds)[others], kind="stable")[:count]]


def look_alike_scores(
    embeddings: np.ndarray, labels: Sequence[str], seed_share: float = 0.2, seed: int = 0
) -> LookAlikes:
    """Of each class, a share of its users (at least 1, not all) are seeds, and all other users `[n, d]` are ranked.

    `seed` draws the seeds. Raises `DataError` for a share outside (0, 1), fewer than two classes, no class of two
    users, and sizes that do not fit.
    """
    embeddings = as_matrix("embeddings", embeddings)
    labels = np.array(as_labels("labels", labels, embeddings), dtype=object)
    if not 0 < seed_share < 1:
        raise DataError(f"seed_share is between 0 and 1, not {seed_share}")
    sizes = Counter(labels.tolist())
    classes = tuple(sorted(label for label, size in sizes.items() if size > 1))
    if len(sizes) < 2 or not classes:
        raise DataError("look-alikes need two classes, and one of them with two users")
    found = []
    for number, label in enumerate(classes):
        own = np.flatnonzero(labels == label)
        drawn = min(max(1, round(seed_share * len(own))), len(own) - 1)
        seeds = np.random.default_rng([seed, number]).choice(own, drawn, replace=False)
        others = np.setdiff1d(np.arange(len(labels)), seeds)
        positive, scores = labels[others] == label, _nearness(embeddings, seeds)[others]
        precision = _precision(positive, scores)
        found.append((drawn, len(own) - drawn, roc_auc_score(positive, scores), precision, positive.mean()))
    columns = [np.array(column) for column in zip(*found)]
    return LookAlikes(classes, *columns, tuple(sorted(label for label, size in sizes.items() if size == 1)))


def _precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """Precision at R, the number of positives; at the score where R falls, positives are taken as by chance."""
    count = int(positive.sum())
    edge = np.sort(scores)[-count]
    above, level = scores > edge, scores == edge
    taken = (count - above.sum()) / level.sum()
    return float((positive[above].sum() + taken * positive[level].sum()) / count)


def _nearness(embeddings: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Cosine of each embedding to the mean of the seeds' unit vectors, `[n]`; 0 for a zero vector."""
    if not len(seeds):
        raise DataError("look-alikes need at least one seed")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(norms == 0, 1.0, norms)
    centre = unit[seeds].mean(0)
    return unit @ (centre / (np.linalg.norm(centre) or 1.0))
