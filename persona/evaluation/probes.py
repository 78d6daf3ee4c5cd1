"""What an embedding is worth: a linear probe, retrieval of answers, look-alikes. Arrays in, numbers out; no encoder.

Ties count as by chance or against the embedding, so that one which puts all users in one place gains nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from persona.errors import DataError, MissingExtraError
from persona.evaluation.arrays import as_indices, as_labels, as_matrix

try:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import auc as area
    from sklearn.metrics import roc_curve
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from persona.evaluation.intervals import interval
    from persona.evaluation.look_alikes import LookAlikes, look_alike_scores, look_alikes
except ImportError as error:
    raise MissingExtraError(f"embeddings cannot be probed ({error}): pip install 'persona[eval]'") from error

__all__ = [
    "Estimate",
    "LookAlikes",
    "Probe",
    "linear_probe",
    "look_alike_scores",
    "look_alikes",
    "recall_of_answers",
    "with_interval",
]

FOLDS = 5
"""Folds of cross-validation, and so the fewest training rows of a class."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""The values of C, the inverse of regularisation, that are tried."""
CUTOFFS = (1, 3, 10)
ROWS = 1024
"""Users that are scored against all answers at a time."""


class Estimate(NamedTuple):
    """A number, or several, with a 95% interval."""

    value: float | np.ndarray
    """The statistic of all rows."""
    low: float | np.ndarray
    """Low end."""
    high: float | np.ndarray
    """High end."""


@dataclass(frozen=True)
class Probe:
    """What a linear probe found on its test rows."""

    classes: tuple[str, ...]
    """Labels that the probe knows, sorted."""
    rows: np.ndarray
    """`[n]`: which of the test rows given were scored: those of a class that the probe knows."""
    truth: np.ndarray
    """`[n]`: index in `classes` of the right one."""
    probabilities: np.ndarray
    """`[n, classes]`."""
    common: int
    """Index in `classes` of the commonest training class."""
    strength: float
    """C that cross-validation chose."""
    dropped: Mapping[str, tuple[int, int]]
    """Label with fewer than 5 training rows, to its numbers of training and test rows, which were left out."""

    @property
    def n(self) -> int:
        """Test rows scored."""
        return len(self.truth)

    @property
    def correct(self) -> np.ndarray:
        """`[n]`: 1 where the likeliest class is the right one, else 0."""
        return (self.probabilities.argmax(1) == self.truth).astype(int)

    @property
    def accuracy(self) -> float:
        """Share of rows whose likeliest class is the right one."""
        return float(self.correct.mean())

    @property
    def majority(self) -> float:
        """Accuracy of naming the commonest training class always."""
        return float((self.truth == self.common).mean())

    @property
    def auc(self) -> float:
        """Area under the ROC curve; of more than two classes one against the rest, their mean."""
        return float(self.scores()[0])

    @property
    def ks(self) -> float:
        """Kolmogorov-Smirnov: the largest true-positive less false-positive rate; means as in `auc`."""
        return float(self.scores()[1])

    def scores(self, index: np.ndarray | None = None) -> np.ndarray:
        """AUC, KS and accuracy `[3]` of all rows, or of the rows `index`, for the bootstrap.

        A class that none or all of these rows have is left out of the first two, which are NaN if no class is left.
        """
        index = np.arange(self.n) if index is None else index
        truth, probabilities = self.truth[index], self.probabilities[index]
        found = []
        for number in range(len(self.classes)) if len(self.classes) > 2 else (1,):
            own = truth == number
            if 0 < own.sum() < len(own):
                false, true, _ = roc_curve(own, probabilities[:, number], drop_intermediate=False)
                found.append((area(false, true), (true - false).max()))
        auc, ks = np.mean(found, axis=0) if found else (np.nan, np.nan)
        return np.array([auc, ks, self.correct[index].mean()])

    def __str__(self) -> str:
        text = f"AUC {self.auc:.3f}, KS {self.ks:.3f}, accuracy {self.accuracy:.3f} (majority {self.majority:.3f})"
        text += f" of {len(self.classes)} classes, {self.n} rows"
        out = [f"{label!r} ({train} training rows, {test} test rows)" for label, (train, test) in self.dropped.items()]
        return text + (f"; too rare to be learned and left out: {', '.join(out)}" if out else "")


def linear_probe(
    train_x: np.ndarray, train_y: Sequence[str], test_x: np.ndarray, test_y: Sequence[str], seed: int = 0
) -> Probe:
    """Learns labels from embeddings `[rows, d]` by logistic regression on standardised columns, and tests it.

    C is chosen by the likelihood in 5-fold cross-validation on the training rows; `seed` draws the folds. Classes with
    fewer than 5 training rows are left out of both parts and named in `Probe.dropped`. Raises `DataError` for labels
    that are not strings, sizes that do not fit, NaN, and where fewer than two classes are left to learn or to test.
    """
    train_x, test_x = (as_matrix(name, x) for name, x in (("train_x", train_x), ("test_x", test_x)))
    train_y, test_y = as_labels("train_y", train_y, train_x), as_labels("test_y", test_y, test_x)
    if train_x.shape[1] != test_x.shape[1]:
        raise DataError(f"train_x has {train_x.shape[1]} columns, but test_x {test_x.shape[1]}")
    counts, tests = Counter(train_y), Counter(test_y)
    classes = tuple(sorted(label for label, count in counts.items() if count >= FOLDS))
    dropped = {label: (counts[label], tests[label]) for label in sorted({*counts, *tests} - {*classes})}
    if len(classes) < 2:
        raise DataError(
            f"a probe needs two classes of at least {FOLDS} training rows; there are "
            + (", ".join(f"{label!r} ({count})" for label, count in counts.most_common(10)) or "no rows")
        )
    number = {label: i for i, label in enumerate(classes)}
    kept = [i for i, label in enumerate(train_y) if label in number]
    rows = np.array([i for i, label in enumerate(test_y) if label in number], dtype=int)
    truth = np.array([number[test_y[i]] for i in rows], dtype=int)
    if len(set(truth.tolist())) < 2:
        raise DataError(f"the test rows have fewer than two of the classes {', '.join(map(repr, classes))}")
    learned = np.array([number[train_y[i]] for i in kept])
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        {"logisticregression__C": STRENGTHS},
        scoring="neg_log_loss",
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=seed),
    ).fit(train_x[kept], learned)
    return Probe(
        classes,
        rows,
        truth,
        search.predict_proba(test_x[rows]),
        int(np.bincount(learned).argmax()),
        search.best_params_["logisticregression__C"],
        dropped,
    )


def recall_of_answers(
    users: np.ndarray, answers: np.ndarray, right: Sequence[int], options: Sequence[Sequence[int]] | None = None
) -> dict[str, float | np.ndarray]:
    """How well embeddings `[n, d]` of users find their answers among embeddings `[m, d]`, by dot product.

    `right` `[n]` are the right answers' indices; `options` are, for each user, those that may be chosen from (all by
    default). Gives recall@1, recall@3, recall@10, mrr, and "ranks" `[n]`, from 1: the right answer stands behind all
    that score as high. Raises `DataError` for sizes or indices that do not fit, a right answer that is no option, NaN.
    """
    users, answers = as_matrix("users", users), as_matrix("answers", answers)
    right = as_indices("right", right, len(answers))
    if users.shape[1] != answers.shape[1]:
        raise DataError(f"users have {users.shape[1]} dimensions, but answers {answers.shape[1]}")
    if not len(users):
        raise DataError("there are no users to find answers for")
    for name, given in (("right answers", right), ("options", options)):
        if given is not None and len(given) != len(users):
            raise DataError(f"there are {len(users)} users, but {len(given)} {name}")
    ranks = np.empty(len(users), dtype=int)
    for start in range(0, len(users), ROWS):
        part = range(start, min(start + ROWS, len(users)))
        scores = users[part] @ answers.T  # [ROWS, m]
        if options is None:
            ranks[part] = (scores >= scores[np.arange(len(part)), right[part]][:, None]).sum(1)
            continue
        for row, i in enumerate(part):
            allowed = np.unique(as_indices(f"options of user {i}", options[i], len(answers)))
            if right[i] not in allowed:
                raise DataError(f"the right answer of user {i}, {right[i]}, is not among the options")
            ranks[i] = (scores[row, allowed] >= scores[row, right[i]]).sum()
    found = {f"recall@{k}": float((ranks <= k).mean()) for k in CUTOFFS}
    return {**found, "mrr": float((1 / ranks).mean()), "ranks": ranks}


def with_interval(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray], float | np.ndarray] = lambda rows: rows.mean(0),
    *,
    seed: int = 0,
    n: int = 2000,
) -> Estimate:
    """`statistic` of `rows` `[n, ...]`, their mean by default, with its bootstrap 95% interval over rows.

    One row for each user, since only rows that do not depend on each other can be resampled. For example
    `with_interval(probe.correct)`, `with_interval(found["ranks"] <= 3)`, `with_interval(np.arange(probe.n),
    probe.scores)`. Raises `DataError` for fewer than two rows.
    """
    rows = np.asarray(rows)
    if rows.ndim < 1 or len(rows) < 2:
        raise DataError("an interval needs at least two rows")
    low, high = interval(rows, lambda r: np.asarray(statistic(r), dtype=float), seed=seed, n=n)
    value = np.asarray(statistic(rows), dtype=float)
    if value.ndim:
        return Estimate(value, low, high)
    return Estimate(float(value), float(low), float(high))
