"""`Cut`: a user at a point in time, what a method may see and what came after."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from persona.history import Event, History


@dataclass(frozen=True)
class Cut:
    """A user at a point in time: what a method may see, and what came after."""

    history: History
    """Events strictly before the cut, at most the recipe's window."""
    future: tuple[Event, ...]
    """Events at or after the cut, oldest first."""
    met: frozenset[tuple[str, str]]
    """(source, item id) of all items the user touched before the cut, window or not; never asked about as next."""
    seen: frozenset[tuple[str, str]]
    """The same before or after the cut; never used as negatives."""


def make_cut(history: History, at: int, window: int) -> Cut:
    """Cuts before timed event number `at`; events of the same time as that event all fall into the future."""
    timed = history.timed
    before = history.until(timed[at].timestamp)
    return Cut(before.last(window), timed[len(before.timed) :], _items(before), _items(history))


def _items(history: History) -> frozenset[tuple[str, str]]:
    return frozenset((e.source, e.item_id) for e in history.events if e.item_id is not None)


def evaluation_cuts(history: History, window: int, count: int, min_events: int) -> list[Cut]:
    """At most `count` cuts, evenly spread over the events after the first `min_events`; never two alike."""
    size = len(history.timed)
    if size <= min_events:
        return []
    cuts = {}
    for at in np.linspace(min_events, size - 1, count).round().astype(int):
        cut = make_cut(history, int(at), window)
        if len(cut.history.timed) >= min_events:
            cuts[len(cut.future)] = cut
    return list(cuts.values())
