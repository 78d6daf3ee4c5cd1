"""`Vocabulary`: what an encoder has learned to count: sources, items, columns, categories, and the spread of numbers.

Fitted on training users only and saved beside the weights. Whatever it does not know is index 0.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from persona.history import Event, History, SourceSpec
from persona.history.source import STRICT


@dataclass
class Vocabulary:
    """Indices and scales for the event encoders."""

    __pydantic_config__ = STRICT

    sources: dict[str, str] = field(default_factory=dict)
    """Source name to kind; the position in the dict, from 1, is the source's index."""
    items: dict[str, int] = field(default_factory=dict)
    """"source/item_id" to index, from 1."""
    item_texts: list[str] = field(default_factory=list)
    """Text of item index i at position i - 1."""
    columns: dict[str, int] = field(default_factory=dict)
    """"source/column" of tabular sources to index, from 1."""
    categories: dict[str, int] = field(default_factory=dict)
    """"source/column/value" of tabular sources and of items' attributes to index, from 1."""
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and standard deviation of a source's value ("source") and of numeric columns ("source/column")."""

    @classmethod
    def fit(cls, histories: Iterable[History], sources: Mapping[str, SourceSpec], min_count: int = 2) -> Vocabulary:
        """Counts the events of `histories`; items and categories met fewer than `min_count` times stay unknown."""
        items, categories = Counter(), Counter()
        texts, columns, numbers = {}, {}, defaultdict(list)
        for history in histories:
            for event in history.events:
                spec = sources.get(event.source)
                if spec is None:
                    continue
                if event.value is not None:
                    numbers[event.source].append(event.value)
                if spec.kind == "item" and event.item_id is not None:
                    key = f"{event.source}/{event.item_id}"
                    items[key] += 1
                    texts.setdefault(key, event.text or "")
                    categories.update(_attribute_keys(event))
                if spec.kind == "tabular":
                    for column, value in event.attributes.items():
                        columns.setdefault(f"{event.source}/{column}", len(columns) + 1)
                        if isinstance(value, str):
                            categories[f"{event.source}/{column}/{value}"] += 1
                        elif value is not None:
                            numbers[f"{event.source}/{column}"].append(value)
        kept = [key for key, count in items.items() if count >= min_count]
        return cls(
            sources={name: spec.kind for name, spec in sources.items()},
            items={key: i for i, key in enumerate(kept, 1)},
            item_texts=[texts[key] for key in kept],
            columns=columns,
            categories={k: i for i, k in enumerate((k for k, c in categories.items() if c >= min_count), 1)},
            scales={key: _scale(values) for key, values in numbers.items()},
        )

    def normalise(self, key: str, value: float) -> float:
        """Standard score of a number, clipped to ±5; 0 for a key never seen."""
        mean, deviation = self.scales.get(key, (value, 1.0))
        return max(-5.0, min(5.0, (value - mean) / deviation))

    def attributes(self, event: Event) -> tuple[int, ...]:
        """Category indices of an item's attributes, those that are known."""
        return tuple(self.categories[key] for key in _attribute_keys(event) if key in self.categories)

    def source_of(self, key: str) -> int:
        """Index of the source that a key of `items` begins with."""
        return next(i for i, name in enumerate(self.sources, 1) if key.startswith(f"{name}/"))

    def to_dict(self) -> dict:
        """Plain data for JSON, which `persona.history.parse_config` takes back."""
        return asdict(self)


def _attribute_keys(event: Event) -> list[str]:
    return [f"{event.source}/{name}/{value}" for name, value in event.attributes.items() if isinstance(value, str)]


def _scale(values: list[float]) -> tuple[float, float]:
    largest = max(map(abs, values)) or 1.0  # so that squares of huge numbers stay finite
    mean = math.fsum(v / largest for v in values) / len(values)
    variance = math.fsum((v / largest - mean) ** 2 for v in values) / len(values)
    return mean * largest, max(math.sqrt(variance) * largest, 1e-6)
