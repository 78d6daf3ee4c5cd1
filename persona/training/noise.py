"""Events that are not the user's: mixed into histories to train an encoder, or to see what they do to it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from persona.history import Event, History

MOST = 2.0
"""Foreign events that training mixes in, for each of the history's own, at the most."""


def fitting(window: int, share: float) -> int:
    """How many events a history may have so that a window holds them and `share` foreign ones for each."""
    return max(1, int(window / (1 + share)))


def with_noise(history: History, pool: Sequence[Event], share: float, rng: np.random.Generator) -> History:
    """The history with events of `pool` mixed in, `share` for each timed event, at random times among its own.

    `pool` is not empty unless nothing is to be mixed in.
    """
    timed = history.timed
    count = round(share * len(timed))
    if not count:
        return history
    first, last = timed[0].timestamp, timed[-1].timestamp
    when = np.sort(rng.uniform(first, last, count))
    drawn = [pool[i] for i in rng.integers(len(pool), size=count)]
    return history.of([*history.events, *(replace(event, timestamp=float(t)) for event, t in zip(drawn, when))])


def foreign_sources(sources: Collection[str], own: str, rng: np.random.Generator) -> frozenset[str]:
    """Some of `sources`, at random, but never `own`; none where there is no other."""
    others = sorted(set(sources) - {own})
    if not others:
        return frozenset()
    return frozenset(others[i] for i in rng.permutation(len(others))[: rng.integers(1, len(others) + 1)])
