"""Events that are not the user's: mixed into histories to train an encoder, or to see what they do to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from persona.history import Event, History

MOST = 2.0
"""Foreign events that training mixes in, for each of the history's own, at the most."""


def with_noise(history: History, pool: Sequence[Event], share: float, rng: np.random.Generator) -> History:
    """The history with events of `pool` mixed in, `share` for each timed event, at random times among its own."""
    timed = history.timed
    count = round(share * len(timed))
    if not count:
        return history
    first, last = timed[0].timestamp, timed[-1].timestamp
    when = np.sort(rng.uniform(first, last, count))
    drawn = [pool[i] for i in rng.integers(len(pool), size=count)]
    return history.of([*history.events, *(replace(event, timestamp=float(t)) for event, t in zip(drawn, when))])


def foreign_events(
    pools: Mapping[str, Sequence[Event]], own: str, rng: np.random.Generator
) -> tuple[set[str], list[Event]]:
    """Some sources of `pools`, at random but for the source `own`, and their events; none where there is no other."""
    others = [source for source in pools if source != own]
    chosen = {others[i] for i in rng.permutation(len(others))[: rng.integers(1, len(others) + 1)]} if others else set()
    return chosen, [event for source in pools if source in chosen for event in pools[source]]
