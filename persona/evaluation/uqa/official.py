"""Reads the official Arrow files of UQABench (arXiv 2502.19178), row by row, and makes histories of them.

A row is one user: for each click, oldest first, a bag of ids in each column. Rows of the align files also have a
question and its answer. The data are not part of persona: download them and mind their licence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from persona.errors import DataError, MissingExtraError
from persona.history import Event, History, SourceSpec

SOURCE = "click"
"""Source of the events."""
SOURCES = {SOURCE: SourceSpec("item")}
"""The sources of an encoder that reads these histories."""
MAX_CLICKS = 512
"""Newest clicks that a history keeps, as in the paper."""
IDS = {name: f"uni_seq_{name}_id" for name in ("item", "cate", "brand", "shop", "seller")}
"""Field of `OfficialRow` to column: what was clicked, and its attributes."""
TOKENS = {f"{name}_bpe": f"uni_seq_{name}_bpe_token_ids" for name in ("title", "cate", "shop", "brand", "seller")}
"""Field of `OfficialRow` to column: the same in words, as token ids of Qwen2.5."""
TEXT = "text"
"""Column of the question and its answer, in align files alone."""

Bags = list[list[int]]
"""For each click, oldest first, its ids."""


@dataclass(frozen=True)
class OfficialRow:
    """One user, and in align files one question; all lists have one entry for each click, oldest first."""

    item: list[int]
    """Item ids."""
    cate: Bags
    """Category ids."""
    brand: Bags
    """Brand ids."""
    shop: Bags
    """Shop ids."""
    seller: Bags
    """Seller ids."""
    title_bpe: Bags
    """Token ids of the item's title."""
    cate_bpe: Bags
    """Token ids of the category's name."""
    shop_bpe: Bags
    """Token ids of the shop's name."""
    brand_bpe: Bags
    """Token ids of the brand's name."""
    seller_bpe: Bags
    """Token ids of the seller's name."""
    question: str | None = None
    """The user's turn; None in pretrain files."""
    answer: str | None = None
    """The gold answer; None in pretrain files."""


class OfficialFile(Sequence[OfficialRow]):
    """The rows of one official file, `{pretrain,align}_data_{train,eval}.arrow`, in the Arrow IPC file format.

    The file is memory-mapped and a row is read when it is asked for. Raises `MissingExtraError` without pyarrow, and
    `DataError` when the file is missing, damaged or cut short, or when a column is missing or of the wrong type.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._table = _open(self.path)

    def __len__(self) -> int:
        return self._table.num_rows

    @property
    def has_questions(self) -> bool:
        """Whether this is an align file, whose rows have a question and an answer."""
        return TEXT in self._table.column_names

    def __getitem__(self, row: int) -> OfficialRow:
        """Row number `row`, from 0. Raises `IndexError`, and `DataError` naming the row for one that is not sound."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path}: has the rows 0 to {len(self) - 1}, and not {row}")
        bags = {field: self._bags(column, row) for field, column in {**IDS, **TOKENS}.items()}
        for field, column in {**IDS, **TOKENS}.items():
            if len(bags[field]) != len(bags["item"]):
                raise self._bad(row, f"{column} has {len(bags[field])} clicks and {IDS['item']} {len(bags['item'])}")
        if any(len(bag) != 1 for bag in bags["item"]):
            raise self._bad(row, f"a click in {IDS['item']} must have exactly one id")
        items = [bag[0] for bag in bags.pop("item")]
        question, answer = self._turns(row) if self.has_questions else (None, None)
        return OfficialRow(items, **bags, question=question, answer=answer)

    def _bags(self, column: str, row: int) -> Bags:
        """One cell; a null stands for no clicks, or for a click without ids."""
        bags = [bag or [] for bag in self._table[column][row].as_py() or []]
        if any(None in bag for bag in bags):
            raise self._bad(row, f"{column} has a null for an id")
        return bags

    def _turns(self, row: int) -> tuple[str, str]:
        """Question and answer of a `text` cell."""
        try:
            turns = json.loads(self._table[TEXT][row].as_py() or "null")
            (first, question), (second, answer) = ((turn["role"], turn["content"]) for turn in turns)
        except (ValueError, TypeError, KeyError, RecursionError):
            first = None
        if first != "user" or second != "assistant" or not isinstance(question, str) or not isinstance(answer, str):
            shape = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
            raise self._bad(row, f"{TEXT} is not the JSON {shape}")
        return question, answer

    def _bad(self, row: int, problem: str) -> DataError:
        return DataError(f"{self.path}, row {row} (counted from 0): {problem}")


def to_history(row: OfficialRow, user: str, *, decode: Callable[[list[int]], str] | None = None) -> History:
    """The newest 512 clicks as item events of source "click"; no clicks make an empty history.

    The order of clicks is all that the files tell of time, so they are numbered 0, 1, 2... in place of seconds. Ids
    become attributes such as "cate 12", or "cate 12 7" for a bag; an empty bag is unknown (None). `decode` turns the
    token ids of a title into text; without it the events have none. Raises `EventError` for a bad user id.
    """
    first = max(0, len(row.item) - MAX_CLICKS)
    events = []
    for time, click in enumerate(range(first, len(row.item))):
        bags = {name: getattr(row, name)[click] for name in IDS if name != "item"}
        title = row.title_bpe[click]
        events.append(
            Event(
                SOURCE,
                float(time),
                text=decode(title) if decode and title else None,
                item_id=str(row.item[click]),
                attributes={name: " ".join([name, *map(str, bag)]) if bag else None for name, bag in bags.items()},
            )
        )
    return History(user, tuple(events))


def _open(path: Path):
    """The checked file as a table whose buffers lie in the mapped file."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise MissingExtraError("the official UQABench files need pyarrow: pip install 'persona[train]'") from error
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        table.validate()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a whole Arrow IPC file ({error})") from None
    _check_schema(path, table.schema, pyarrow.types)
    return table


def _check_schema(path: Path, schema, types) -> None:
    def is_list(kind) -> bool:
        return types.is_list(kind) or types.is_large_list(kind)

    def is_bags(kind) -> bool:
        return is_list(kind) and is_list(kind.value_type) and types.is_integer(kind.value_type.value_type)

    def is_text(kind) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    wanted = dict.fromkeys((*IDS.values(), *TOKENS.values()), ("list<list<int>>", is_bags))
    if TEXT in schema.names:
        wanted[TEXT] = ("a string", is_text)
    for column, (name, fits) in wanted.items():
        count = schema.names.count(column)
        if count != 1:
            raise DataError(f"{path}: has {count or 'no'} columns named {column!r}; it needs one")
        kind = schema.field(column).type
        if not fits(kind):
            raise DataError(f"{path}: column {column!r} must be {name}, not {kind}")
