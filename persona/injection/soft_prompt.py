"""Where the user tokens stand in the prompt, computed from the LLM's own chat template and never by hand.

The layout is that of vLLM's `prompt_embeds` content part: a placeholder opens the last user turn, is tokenized as one
special token, and is then repeated once for each soft row. A shared system prompt stays in front, so its KV blocks are
shared by all users.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from persona.errors import PersonaError

PLACEHOLDER = "<prompt_embeds>"
"""vLLM's own sentinel (vllm/renderers/chat_utils.py); it may not occur in anybody's text."""
PLAIN_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
"""For base models without a chat template."""

Messages = str | Sequence[dict]
"""A user's turn, or messages in OpenAI's form with string contents."""


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt with room for soft rows."""

    ids: list[int]
    """Token ids; at the soft positions the placeholder's id, which the LLM may not know."""
    start: int
    """Position of the first soft row."""
    count: int
    """Number of soft rows; 0 for a plain prompt."""

    @property
    def is_token(self) -> list[bool]:
        """False at the soft positions."""
        return [not self.start <= i < self.start + self.count for i in range(len(self.ids))]


class PromptTemplate:
    """Renders messages with or without soft rows. Works on its own copy of the tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = copy.deepcopy(tokenizer)
        if not self.tokenizer.chat_template:
            self.tokenizer.chat_template = PLAIN_TEMPLATE
        if PLACEHOLDER not in self.tokenizer.get_vocab():
            self.tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
        self.placeholder_id = self.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        self.takes_parts = _takes_parts(self.tokenizer)

    def prompt(self, messages: Messages, count: int = 0) -> Prompt:
        """The prompt up to where the answer starts, with `count` soft rows before the last user turn's text.

        Raises `PersonaError` when there is no user turn, or when a text contains the reserved placeholder.
        """
        messages = as_messages(messages)
        if count:
            messages = self._with_placeholder(messages)
        ids = self._render(messages, True, tokenize=True)
        if not count:
            return Prompt(ids, 0, 0)
        if ids.count(self.placeholder_id) != 1:
            raise PersonaError(
                f"the chat template writes the user's turn {ids.count(self.placeholder_id)} times instead of once; "
                "user tokens need exactly one place"
            )
        start = ids.index(self.placeholder_id)
        return Prompt(ids[:start] + [self.placeholder_id] * count + ids[start + 1 :], start, count)

    def answer(self, messages: Messages, answer: str) -> list[int]:
        """Token ids of `answer` as the template writes it after the prompt, with the end-of-turn tokens."""
        messages = as_messages(messages)
        before = self._render(messages, True, tokenize=False)
        whole = self._render([*messages, {"role": "assistant", "content": answer}], False, tokenize=False)
        end = self.tokenizer.eos_token or ""
        text = whole[len(before) :] if whole.startswith(before) else answer
        if not text.rstrip().endswith(end):
            text += end
        return self.tokenizer.encode(text, add_special_tokens=False)

    def option(self, messages: Messages, option: str) -> list[int]:
        """Token ids of `option` as an answer, without the end-of-turn tokens."""
        ids, end = self.answer(messages, option), self.answer(messages, "")
        while end and ids[-len(end) :] != end:
            end = end[1:]
        return ids[: len(ids) - len(end)] if len(end) < len(ids) else ids

    def _render(self, messages, generation: bool, tokenize: bool):
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation, tokenize=tokenize, return_dict=False
        )

    def _with_placeholder(self, messages: list[dict]) -> list[dict]:
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
        if last is None:
            raise PersonaError("there is no user turn to put the user tokens before")
        text = messages[last]["content"]
        if self.takes_parts:
            content = [{"type": "text", "text": PLACEHOLDER}, {"type": "text", "text": text}]
        else:
            content = f"{PLACEHOLDER}\n{text}"
        return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]


def as_messages(messages: Messages) -> list[dict]:
    """A plain string becomes one user turn; contents are checked. Raises `PersonaError`."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise PersonaError(f"messages[{number}] needs a string `role` and a string `content`, not {message!r}")
        if PLACEHOLDER in content:
            raise PersonaError(f"messages[{number}] contains {PLACEHOLDER}, which is reserved for user tokens")
    return list(messages)


def last_user_turn(messages: Messages) -> str:
    """Text of the last user turn: the default instruction."""
    turns = [m["content"] for m in as_messages(messages) if m["role"] == "user"]
    if not turns:
        raise PersonaError("there is no user turn; give an instruction or a message of role user")
    return turns[-1]


def _takes_parts(tokenizer) -> bool:
    """Whether the template writes a list of content parts as text (OpenAI's form) or only strings."""
    parts = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    except Exception:  # a template may raise whatever it likes on a form that it does not know
        return False
    return "first" in text and "second" in text and "'type'" not in text
