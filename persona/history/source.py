"""`SourceSpec` says what a stream of events is; `ReaderSpec` says how raw records become its events.

Both are plain data, loaded from a recipe's YAML. Readers that carry them out are in `readers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid")
"""pydantic configuration shared by all configs: an unknown key is an error, not a silence."""


@dataclass(frozen=True)
class SourceSpec:
    """A stream of events of one structure."""

    __pydantic_config__ = STRICT

    kind: Literal["text", "item", "tabular"]
    """text: words only. item: acts on items of a catalogue, by id and by text. tabular: one row of named columns."""
    line: str = "{text}"
    """How one event is written when a history is shown as text; fields: text, value, item_id and the attributes."""


@dataclass(frozen=True)
class ColumnSpec:
    """One attribute taken from a raw column."""

    __pydantic_config__ = STRICT

    column: str
    """Name of the raw column."""
    type: Literal["text", "number"] = "text"
    """A number that does not parse is reported as a bad row."""
    split: str | None = None
    """Split the cell at this separator and keep the first part (a film's first genre), of a list its first item; None
    keeps all of it, the items of a list joined by a comma."""

    def __post_init__(self):
        if self.split == "":
            raise ValueError(
                "`split` is empty: name the separator, such as '|', or leave it out to keep the whole cell"
            )


@dataclass(frozen=True)
class JoinSpec:
    """Columns of a second file, found by a shared key: ratings with the titles of what was rated."""

    __pydantic_config__ = STRICT

    path: str
    """File name or glob, relative to the data folder."""
    on: str
    """Column that both files have."""
    format: Literal["csv", "jsonl", "parquet", "recbole"] | None = None
    """None: by the file's ending."""


@dataclass(frozen=True)
class ReaderSpec:
    """How one raw file becomes events of one source."""

    __pydantic_config__ = STRICT

    source: str
    """Name of the source, a key of the recipe's `sources`."""
    path: str
    """File name or glob, relative to the data folder; or a `datasets` folder or hub name."""
    user: str
    """Column of the user id; where a cell is a list, as of a paper's authors, the event is each one's."""
    timestamp: str | None = None
    """Column of the time. None: facts that always hold, such as a profile."""
    time_format: str = "unix"
    """unix (seconds), unix_ms, iso, or a strptime pattern; times without a zone are UTC."""
    format: Literal["csv", "jsonl", "parquet", "recbole", "datasets"] | None = None
    """None: by the file's ending (.csv .tsv .jsonl .parquet; .inter .item .user are RecBole's)."""
    split: str | None = None
    """Split of a `datasets` dataset; None takes all of them."""
    item_id: str | None = None
    """Column of the item's id."""
    value: str | None = None
    """Column of the number."""
    event_id: str | None = None
    """Column of the event's own id."""
    text: str | None = None
    """Template over raw and joined columns and over `attributes`, such as "{title} ({year})"; a column goes first."""
    attributes: dict[str, str | ColumnSpec] = field(default_factory=dict)
    """Attribute name to raw column, or to a `ColumnSpec`."""
    join: list[JoinSpec] = field(default_factory=list)
    """Other files whose columns are added before the template is filled."""
