"""Means over users with bootstrap 95% intervals; users are resampled, since one user's answers are not independent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import bootstrap


def mean_over_users(values: np.ndarray) -> np.ndarray:
    """`[users, tasks]` user means, NaN where a user was not asked -> `[tasks + 1]`: each task, then their mean."""
    tasks = np.nanmean(values, axis=0)
    return np.append(tasks, tasks.mean())


def interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray] = mean_over_users, *, seed: int = 0, n: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """Low and high ends of the percentile bootstrap 95% interval of `statistic` over the first axis of `values`."""
    result = bootstrap(
        (np.arange(len(values)),),
        lambda index: statistic(values[index]),
        vectorized=False,
        n_resamples=n,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    # A resample may hold nobody who was asked something; it says nothing about that.
    low, high = np.nanpercentile(result.bootstrap_distribution, (2.5, 97.5), axis=-1)
    return low, high
