"""`QuestionSpec`, as a recipe declares a kind of question, and `Question`, one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from persona.history import Event
from persona.history.source import STRICT

YES, NO = "yes", "no"

PLACES: dict[str, tuple[str, ...]] = {
    "top_attribute": (),
    "nth_attribute": ("{n}",),
    "count_attribute": ("{value}",),
    "trajectory": (),
    "next_attribute": (),
    "next_item": ("{item}",),
    "next_value": ("{item}",),
}
"""Places that each kind's prompt must have."""


@dataclass(frozen=True)
class QuestionSpec:
    """One kind of question, as a recipe declares it."""

    __pydantic_config__ = STRICT

    kind: Literal[
        "top_attribute", "nth_attribute", "count_attribute", "trajectory", "next_attribute", "next_item", "next_value"
    ]
    """Answered by the history: top_attribute, the commonest value of an attribute; nth_attribute, the value of the
    n-th newest event; count_attribute, how many events had a value; trajectory, the commonest value in each part of
    the history in turn. Answered by what comes next: next_attribute; next_item, whether one item, new to the user,
    comes next, yes or no; next_value, the number that the user will give an item."""
    source: str
    """The source whose events the question is about."""
    prompt: str
    """The user's turn. `{item}` stands for the text of the item asked about (next_item, next_value), `{n}` for a
    place counted from the newest event (nth_attribute), `{value}` for the value counted (count_attribute)."""
    attribute: str | None = None
    """Which attribute; for all kinds but next_item and next_value."""
    min_value: float | None = None
    """Kinds answered by the history: only events with at least this value count (liked films)."""
    last: int | None = None
    """Kinds answered by the history: only the newest so many of them count; None takes the whole history.
    nth_attribute: the farthest place asked for, 3 by default."""
    top: int = 1
    """top_attribute: the answer is so many of the commonest values, in alphabetical order."""
    parts: int = 3
    """trajectory: the history is cut into so many parts of equal numbers of events."""
    negatives: int = 3
    """next_item: unseen items of like popularity that compete with the true one in evaluation."""
    choices: int | None = None
    """Answers offered, the right one among them; the others are drawn as often as they are right for training users.
    None offers all answers. Not for next_item, which has `negatives`."""
    choice_prompt: str | None = None
    """next_item: the user's turn where items are offered as lettered choices, all at once."""
    horizon: int = 1
    """Kinds answered by what comes next: training draws from this many next events; evaluation always takes the very
    next ones."""
    per_cut: int = 1
    """Questions at one cut, for kinds that can ask several: the next events, places, values to count."""

    def __post_init__(self):
        if self.kind not in ("next_item", "next_value") and not self.attribute:
            raise ValueError(f"kind {self.kind} needs `attribute`")
        for place in PLACES[self.kind]:
            if place not in self.prompt:
                raise ValueError(f"kind {self.kind} needs `{place}` in its prompt")
        if self.open and not self.choices:
            raise ValueError(f"kind {self.kind} needs `choices`, say 4: its answers are too many to offer them all")
        if self.choices is not None and (self.choices < 2 or self.kind == "next_item"):
            raise ValueError("`choices` is at least 2, and not for next_item, which has `negatives`")

    @property
    def open(self) -> bool:
        """Whether answers are counts or made of several values, so that all of them cannot be listed."""
        return self.kind in ("count_attribute", "trajectory") or (self.kind == "top_attribute" and self.top > 1)


@dataclass(frozen=True)
class Question:
    """One question with its gold answer and the closed set of answers it is scored against."""

    task: str
    """Name of its `QuestionSpec` in the recipe."""
    prompt: str
    """Text of the user's turn, and the instruction given to the encoder."""
    answer: str
    """Gold answer, one of `options`."""
    options: tuple[str, ...]
    """All answers allowed."""
    item_id: str | None = None
    """The item asked about, for the floors that use no text."""
    group: int = 0
    """Yes/no questions of one group compete: the group is right when its true item has the highest odds of yes."""
    support: tuple[Event, ...] = field(default=(), hash=False)
    """The events that make the answer right: of the history, or of the future for kinds that ask what comes next. The
    answer "no" has none."""
