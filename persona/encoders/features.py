"""From histories to tensors: `Row`s of indices and numbers, and the padded `EventBatch` the event encoder reads.

A text or item event is one row; a tabular event is one row for each of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from persona.encoders.text import TextEncoder
from persona.encoders.vocabulary import Vocabulary
from persona.history import Event, History

TIME_FEATURES = 5
"""log gap to the event before, and sine and cosine of the hour of the day and of the day of the week."""


@dataclass(slots=True)
class Row:
    """One input position, before the text is encoded."""

    text: str = ""
    source: int = 0
    item: int = 0
    column: int = 0
    category: int = 0
    number: float | None = None
    time: tuple[float, ...] = (0.0,) * TIME_FEATURES
    timestamp: float = 0.0
    attributes: tuple[int, ...] = ()


@dataclass
class EventBatch:
    """Padded rows of B histories, N positions each."""

    text: torch.Tensor
    """`[B, N, text_dim]` frozen text vectors."""
    source: torch.Tensor
    """`[B, N]` source index."""
    item: torch.Tensor
    """`[B, N]` item index, 0 for none or unknown."""
    column: torch.Tensor
    """`[B, N]` tabular column index."""
    category: torch.Tensor
    """`[B, N]` category index."""
    number: torch.Tensor
    """`[B, N, 2]` standard score, and 1 where there is a number."""
    time: torch.Tensor
    """`[B, N, TIME_FEATURES]`."""
    timestamp: torch.Tensor
    """`[B, N]` seconds, in float64; 0 for rows without a time."""
    attributes: torch.Tensor
    """`[B, N, A]` category indices of an item's attributes, 0 for none or unknown."""
    mask: torch.Tensor
    """`[B, N]` True where there is a row."""

    def to(self, device) -> EventBatch:
        """The same batch on another device."""
        return EventBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def event_rows(
    events: Sequence[Event], vocabulary: Vocabulary, previous: float | None = None, *, named: bool = True
) -> list[Row]:
    """Rows of `events` in order; `previous` is the time of the event before the first. Unknown sources make no row.

    `named`: whether the text of a column's value begins with the column's name; that of an unknown column always does.
    """
    index = {name: i for i, name in enumerate(vocabulary.sources, 1)}
    rows = []
    for event in events:
        kind = vocabulary.sources.get(event.source)
        if kind is None:
            continue
        time = _time_features(event.timestamp, previous)
        previous = event.timestamp if event.timestamp is not None else previous
        if kind == "tabular":
            rows += [_column_row(event, name, index, vocabulary, time, named) for name in event.attributes]
            continue
        rows.append(
            Row(
                text=event.text or "",
                source=index[event.source],
                item=vocabulary.items.get(f"{event.source}/{event.item_id}", 0) if kind == "item" else 0,
                number=None if event.value is None else vocabulary.normalise(event.source, event.value),
                time=time,
                timestamp=event.timestamp or 0.0,
                attributes=vocabulary.attributes(event) if kind == "item" else (),
            )
        )
    return rows


def _column_row(event: Event, name: str, index: dict[str, int], vocabulary: Vocabulary, time, named: bool) -> Row:
    key, value = f"{event.source}/{name}", event.attributes[name]
    row = Row(source=index[event.source], column=vocabulary.columns.get(key, 0), time=time)
    row.timestamp = event.timestamp or 0.0
    if isinstance(value, str):
        row.text = f"{name}: {value}" if named or not row.column else value
        row.category = vocabulary.categories.get(f"{key}/{value}", 0)
    elif value is not None:
        row.number = vocabulary.normalise(key, value)
    return row


def _time_features(timestamp: float | None, previous: float | None) -> tuple[float, ...]:
    if timestamp is None:
        return (0.0,) * TIME_FEATURES
    gap = 0.0 if previous is None else math.log1p(max(0.0, timestamp - previous)) / 10
    day, week = timestamp % 86_400 / 86_400, timestamp % 604_800 / 604_800
    tau = 2 * math.pi
    return gap, math.sin(tau * day), math.cos(tau * day), math.sin(tau * week), math.cos(tau * week)


def newest(history: History, max_events: int) -> tuple[History, bool]:
    """The history cut to its newest `max_events` timed events, and whether anything was cut."""
    return history.last(max_events), len(history.timed) > max_events


def make_batch(rows: Sequence[Sequence[Row]], text_encoder: TextEncoder) -> EventBatch:
    """Pads rows on the right; distinct texts are encoded once."""
    size, length = len(rows), max((len(r) for r in rows), default=0)
    batch = {name: torch.zeros(size, length, dtype=torch.long) for name in ("source", "item", "column", "category")}
    text = torch.zeros(size, length, text_encoder.dim)
    number, time = torch.zeros(size, length, 2), torch.zeros(size, length, TIME_FEATURES)
    timestamp = torch.zeros(size, length, dtype=torch.float64)
    widest = max((len(row.attributes) for history in rows for row in history), default=0)
    attributes = torch.zeros(size, length, widest, dtype=torch.long)
    mask = torch.zeros(size, length, dtype=torch.bool)
    vectors = text_encoder.vectors([row.text for history in rows for row in history])
    start = 0
    for b, history in enumerate(rows):
        n = len(history)
        if not n:
            continue
        text[b, :n] = vectors[start : start + n]
        start += n
        for name in batch:
            batch[name][b, :n] = torch.tensor([getattr(row, name) for row in history])
        number[b, :n] = torch.tensor([(row.number or 0.0, float(row.number is not None)) for row in history])
        time[b, :n] = torch.tensor([row.time for row in history])
        timestamp[b, :n] = torch.tensor([row.timestamp for row in history], dtype=torch.float64)
        if widest:
            padded = [row.attributes + (0,) * (widest - len(row.attributes)) for row in history]
            attributes[b, :n] = torch.tensor(padded)
        mask[b, :n] = True
    return EventBatch(
        text=text, number=number, time=time, timestamp=timestamp, attributes=attributes, mask=mask, **batch
    )
