"""Profile prompts of LaMP (Salemi et al. 2023, arXiv 2304.11406): profile items in words, beside the input."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from persona.errors import DataError
from persona.evaluation.cutting import decoded
from persona.evaluation.lamp.tasks import Task
from persona.history import Event

MAX_LENGTH = 256
"""Tokens of a prompt; the benchmark's default."""
INPUT_SHARE = 0.6
"""The largest part of a prompt that is set aside for its input."""
JOIN = ", and "
"""Stands between two items."""
IN_FRONT = "{join}. {input}"
"""LaMP_1, for an input without the word after which the items go."""


def profile_prompt(
    task: Task,
    text: str,
    items: Sequence[Event],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = MAX_LENGTH,
) -> str:
    """The official prompt for the input `text` with these items, in the order given; without items, the input alone.

    The items have `max_length` tokens, less those of the input (at most 0.6 of `max_length`), less those of the words
    that join items and input. Each item gets an equal share, rounded down, and what the items before it did not use.
    Only `task.long` is cut, at its end; an item whose other words exceed its share takes from the items after it.
    A field that is not cut stands in the prompt character for character.

    The prompt has at most `max_length` tokens, unless the input is longer than its share or the words that are never
    cut do not fit. Then whoever asks the LLM lets the tokenizer truncate the whole, as the benchmark does.

    The benchmark leaves open, and we chose: the input counts with the tokenizer's special tokens, since the LLM reads
    them; the words on each side of the long field are counted apart from it, so that counts are rather too high than
    too low; half a character at a cut is left out; an input of LaMP_1 without the word `title` has the items in front.

    Raises `DataError` for an item without a field that the prompt shows.
    """
    if not items:
        return text
    before, after, words = _frame(task, text)
    fixed = _count(words, tokenizer) + (len(items) - 1) * _count(JOIN, tokenizer)
    room = max_length - min(len(tokenizer(text).input_ids), int(INPUT_SHARE * max_length))
    share = (room - fixed) // len(items)
    parts, spare = [], 0
    for item in items:
        part, used = _part(task, item, share + spare, tokenizer)
        parts.append(part)
        spare += share - used
    return before + JOIN.join(parts) + after


def _frame(task: Task, text: str) -> tuple[str, str, str]:
    """What stands before and after the joined items, and those words of it that are not the input's."""
    found = re.search(rf"\b{task.splice_after}\b", text) if task.splice_after else None
    if found:
        return text[: found.end()] + JOIN, text[found.end() :], JOIN
    before, after = (task.joined or IN_FRONT).split("{join}")
    return before, after.replace("{input}", text), before + after.replace("{input}", "")


def _part(task: Task, item: Event, allowed: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """An item in words, of `allowed` tokens at most unless its short fields need more, and its number of tokens."""
    before, after = task.part.split(f"{{{task.long}}}")
    try:
        before, after, long = (words.format_map(item.attributes) for words in (before, after, f"{{{task.long}}}"))
    except KeyError as error:
        raise DataError(
            f"{task.name}: profile item {item.event_id!r} has no field {error}; items of this task need "
            f"{', '.join(task.fields)}"
        ) from None
    around = _count(before, tokenizer) + _count(after, tokenizer)
    ids = tokenizer(long, add_special_tokens=False).input_ids
    kept = max(0, min(len(ids), allowed - around))
    if kept < len(ids):
        long = decoded(ids[:kept], tokenizer)
    return before + long + after, around + kept


def _count(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)
