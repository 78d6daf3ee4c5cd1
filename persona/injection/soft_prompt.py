"""Where the user tokens stand, computed from the LLM's own chat template and never by hand.

The layout is that of vLLM's `prompt_embeds` content part: a placeholder opens the last user turn, is tokenized as one
special token, and is then repeated once for each soft row. A shared system prompt stays in front, so its KV blocks are
shared by all users. What cross-attention reads stands beside the prompt, which is then as it would be without a user.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from persona.errors import PersonaError

PLACEHOLDER = "<prompt_embeds>"
"""vLLM's own sentinel (vllm/renderers/chat_utils.py); it may not occur in anybody's text."""
PLAIN_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
"""For base models without a chat template."""

Injection = Literal["soft_prompt", "cross_attention", "both"]
"""How user tokens enter the LLM: as rows of the prompt, as the memory of cross-attention layers, or as both at once."""

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
    memory: int = 0
    """Number of user tokens that cross-attention layers read beside the prompt."""

    @property
    def users(self) -> int:
        """Number of user tokens that come with this prompt. As rows and as memory they are the same ones."""
        return max(self.count, self.memory)

    @property
    def is_token(self) -> list[bool]:
        """False at the soft positions."""
        return [not self.start <= i < self.start + self.count for i in range(len(self.ids))]


class PromptTemplate:
    """Renders messages with or without user tokens. Works on its own copy of the tokenizer."""

    def __init__(self, tokenizer, injection: Injection = "soft_prompt"):
        if injection not in get_args(Injection):
            raise PersonaError(f"injection is one of {', '.join(get_args(Injection))}, not {injection!r}")
        self.injection = injection
        self.tokenizer = copy.deepcopy(tokenizer)
        if not self.tokenizer.chat_template:
            self.tokenizer.chat_template = PLAIN_TEMPLATE
        if PLACEHOLDER not in self.tokenizer.get_vocab():
            self.tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
        self.placeholder_id = self.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        self.takes_parts = _takes_parts(self.tokenizer)
        self._header, self._footer = self._around_user_turn()

    def prompt(self, messages: Messages, count: int = 0) -> Prompt:
        """The prompt up to where the answer starts, with `count` user tokens.

        Soft rows stand before the last user turn's text. Raises `PersonaError` when there is no user turn for them, or
        when a text contains the reserved placeholder.
        """
        messages = as_messages(messages)
        count, memory = self._injected(count)
        if count:
            messages = self._with_placeholder(messages)
        ids = self._render(messages, True, tokenize=True)
        if not count:
            return Prompt(ids, 0, 0, memory)
        if ids.count(self.placeholder_id) != 1:
            raise PersonaError(
                f"the chat template writes the user's turn {ids.count(self.placeholder_id)} times instead of once; "
                "user tokens need exactly one place"
            )
        start = ids.index(self.placeholder_id)
        return Prompt(ids[:start] + [self.placeholder_id] * count + ids[start + 1 :], start, count, memory)

    def place(self, prompt: str | Sequence[int], count: int, *, add_special_tokens: bool = True) -> Prompt:
        """An already rendered prompt, text or token ids, with `count` user tokens.

        Soft rows stand where `prompt` would put them if the text is written in the LLM's chat template, that is where
        the last user turn begins; otherwise they stand at the start, after the beginning-of-sequence token.
        """
        count, memory = self._injected(count)
        if isinstance(prompt, str):
            self._check_text(prompt)
            if not count:
                return Prompt(self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens), 0, 0, memory)
            at, bos = self._turn(prompt), self.tokenizer.bos_token
            if at is None:
                at = len(bos) if bos and prompt.startswith(bos) else 0
            text = prompt[:at] + PLACEHOLDER + self._joint + prompt[at:]
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
            start, rest = ids.index(self.placeholder_id), ids.index(self.placeholder_id) + 1
        else:
            if self.placeholder_id in prompt:
                raise PersonaError(f"the prompt contains {PLACEHOLDER}, which is reserved for user tokens")
            if not count:
                return Prompt(list(prompt), 0, 0, memory)
            header = self._after_special(self._header)
            places = [i for i in range(len(prompt), 0, -1) if header and list(prompt[i - len(header) : i]) == header]
            start = places[0] if places else int(bool(prompt) and prompt[0] == self.tokenizer.bos_token_id)
            ids, rest = [*prompt[:start], *self._after_special(self._joint), *prompt[start:]], start
        return Prompt([*ids[:start], *[self.placeholder_id] * count, *ids[rest:]], start, count, memory)

    def instruction(self, prompt: str | Sequence[int]) -> str:
        """The last user turn of an already rendered prompt; all of its text if no turn can be made out."""
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(list(prompt))
        at = self._turn(text)
        return text if at is None else text[at:].partition(self._footer)[0] if self._footer else text[at:]

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

    def _injected(self, count: int) -> tuple[int, int]:
        """Soft rows and memory for `count` user tokens."""
        return (0 if self.injection == "cross_attention" else count), (0 if self.injection == "soft_prompt" else count)

    def _render(self, messages, generation: bool, tokenize: bool):
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation, tokenize=tokenize, return_dict=False
        )

    @property
    def _joint(self) -> str:
        """What stands between the soft rows and the text of the turn."""
        return "" if self.takes_parts else "\n"

    def _after_special(self, text: str) -> list[int]:
        """Token ids of `text` where it follows a special token, and not at the beginning, which may add a space."""
        return self.tokenizer.encode(PLACEHOLDER + text, add_special_tokens=False)[1:]

    def _turn(self, text: str) -> int | None:
        """Where the last user turn of a rendered prompt begins."""
        at = text.rfind(self._header) if self._header else -1
        return None if at < 0 else at + len(self._header)

    def _around_user_turn(self) -> tuple[str, str]:
        """What the chat template writes right before and after a user's text; empty if it cannot be told."""
        first, second = "first_user_text", "second_user_text"
        chat = [{"role": "user", "content": first}, {"role": "assistant", "content": "reply"}]
        try:
            text = self._render([*chat, {"role": "user", "content": second}], True, tokenize=False)
        except Exception:  # a template may raise whatever it likes on a chat that it does not know
            return "", ""
        if text.count(first) != 1 or text.count(second) != 1:
            return "", ""
        before, rest = text.split(first)
        between, after = rest.split(second)
        return self._ending(before, between), _prefix([between, after])

    def _ending(self, *texts: str) -> str:
        """The common ending of texts, without the special tokens that end a turn or begin a sequence."""
        for special in filter(None, (self.tokenizer.bos_token, self.tokenizer.eos_token)):
            texts = [text.replace(special, "") for text in texts]
        return _prefix([text[::-1] for text in texts])[::-1]

    def _check_text(self, text: str) -> None:
        if PLACEHOLDER in text:
            raise PersonaError(f"the prompt contains {PLACEHOLDER}, which is reserved for user tokens")

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


def _prefix(texts: Sequence[str]) -> str:
    """The common beginning of texts, character by character."""
    return os.path.commonprefix(list(texts))  # noqa: RUF071


def _takes_parts(tokenizer) -> bool:
    """Whether the template writes a list of content parts as text (OpenAI's form) or only strings."""
    parts = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    except Exception:  # a template may raise whatever it likes on a form that it does not know
        return False
    return "first" in text and "second" in text and "'type'" not in text
