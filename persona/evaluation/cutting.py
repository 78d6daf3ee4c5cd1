"""Cuts texts about users to what an LLM can read: at whole events, and within an event that alone is too long."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from persona.history import History, SourceSpec
from persona.history.render import render_event
from persona.injection import PersonalizedLM
from persona.training.questions import Question

_SEAM = 8
"""Tokens set aside for where text and question meet, which may be written otherwise together than apart."""


class UserText(NamedTuple):
    """What the LLM reads about a user."""

    text: str
    """A line for each event, oldest first."""
    cut: bool = False
    """Whether what was to be read was too long, and part of it was left out."""


def room(model: PersonalizedLM, questions: Sequence[Question]) -> int:
    """Tokens left for a text before the longest of these questions and its answer, by the LLM's number of positions."""
    positions = getattr(model.llm.config.get_text_config(), "max_position_embeddings", None)
    if not positions:
        return sys.maxsize
    template = model.template
    options = {option for question in questions for option in question.options}
    answer = max((len(template.answer("?", option)) for option in options), default=0)
    prompt = max((len(template.prompt(question.prompt).ids) for question in questions), default=0)
    return max(0, positions - prompt - answer - _SEAM)


def size(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a text and the line break behind it."""
    return len(tokenizer.encode(f"{text}\n", add_special_tokens=False))


def fitting(
    history: History, sources: Mapping[str, SourceSpec], most: int, tokenizer: PreTrainedTokenizerBase
) -> UserText:
    """The history as `render_history` writes it, without so many of its oldest events that it has `most` tokens.

    Events without a time are kept, unless not even the newest event fits beside them. Of a newest event that alone is
    too long the beginning is kept.
    """
    known, timed = [], []
    for event in history.events:
        if event.source in sources:
            (known if event.timestamp is None else timed).append(render_event(event, sources[event.source]))
    whole = "\n".join([*known, *timed])
    if size(whole, tokenizer) <= most:
        return UserText(whole)
    if not timed:
        known, timed = [], known
    for kept in (known, []):
        fits = bisect_right(
            range(1, len(timed) + 1), most, key=lambda n, kept=kept: size("\n".join(kept + timed[-n:]), tokenizer)
        )
        if fits:
            return UserText("\n".join(kept + timed[-fits:]), True)
    return UserText(beginning(timed[-1], most, tokenizer), True)


def beginning(text: str, most: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text, or so much of its beginning that it has `most` tokens with the line break behind it."""
    if size(text, tokenizer) <= most:
        return text
    ids, kept = tokenizer.encode(text, add_special_tokens=False), most
    while kept > 0:
        shorter = decoded(ids[:kept], tokenizer)
        if size(shorter, tokenizer) <= most:
            return shorter
        kept -= 1
    return ""


def decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a cut sequence, without half a character at its end."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).rstrip("\ufffd")
