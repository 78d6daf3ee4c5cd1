"""`Personalizer` puts a user's tokens into the body of an OpenAI request, as vLLM takes them.

Used by the server plug-in, the gateway and the client alike, so that the same request gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from persona.encoders import InstructionState, UserState
from persona.errors import PersonaError
from persona.injection.model import PersonalizedLM
from persona.serving.combined import Combined
from persona.serving.memory import Memory, UnservableError
from persona.serving.rows import check_rows, embeddings_part, encode_rows
from persona.serving.states import UserStates

CHAT, COMPLETION = "/chat/completions", "/completions"
"""Endings of the two routes that can be personalised."""
INSTRUCTION_HEADER, COUNT_HEADER = "x-persona-instruction", "x-persona-tokens"
"""How the instruction (percent-encoded UTF-8) and the number of user tokens travel to our server."""

REASONS = {
    "no-user": "no user was named",
    "unknown-user": "this user has no events",
    "unknown-sources": "none of this user's events is of a source that the adapter knows",
    "no-user-turn": "there is no user turn to put the user tokens before",
    "echo": "vLLM cannot echo a prompt that holds embeddings",
    "suffix": "vLLM cannot take a suffix beside embeddings",
    "too-long": "the prompts are too many or too long to be sent as embeddings",
    "timeout": "encoding the user took longer than the budget",
    "busy": "too many users are being encoded",
    "failed": "the store or the encoder failed",
    "bad-prompt": "the prompt is not one that this LLM can read",
}
"""Why a call is answered plainly: the word in headers and metrics, and what it means."""
CALLERS = ("no-user-turn", "echo", "suffix", "too-long", "bad-prompt")
"""The reasons that lie in the request itself, so that sending it again would not help."""

MOST_PROMPTS, MOST_BYTES = 64, 256 * 2**20
"""Prompts of one completion request, and bytes of their embeddings: a token of text becomes a whole row."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    personalized: bool
    """Whether the user has a part in the answer."""
    reason: str | None = None
    """A key of `REASONS`, when the answer is plain."""
    truncated: bool = False
    """True when only the newest events of a long history were read."""


class Personalizer:
    """User tokens for (user, instruction) pairs, and request bodies that hold them. Safe to share between threads.

    For an adapter with cross-attention, bodies are for the checkpoint that `export_adapter` writes, and plain ones
    bring user tokens, too: nobody's. Where that cannot be, `UnservableError` is raised.
    """

    def __init__(self, model: PersonalizedLM, states: UserStates):
        self.model, self.states = model, states
        self.memory = Memory.of(model.adapter)
        self._made = Combined(self._make, states.patience)

    def rows(
        self, user: str | None, instructions: Sequence[str], count: int | None = None, *, tenant: str = "default"
    ) -> tuple[torch.Tensor | None, Outcome]:
        """User tokens `[len(instructions), count, llm_width]` on the CPU, or None and the reason.

        Raises what the store and the encoder raise, and `PersonaError` for rows that would harm the engine.
        """
        if user is None:
            return None, Outcome(False, "no-user")
        state = self.states.get(user, tenant=tenant)
        if state is None:
            return None, Outcome(False, "unknown-user")
        if len(state.states) == 1:  # the start state alone
            return None, Outcome(False, "unknown-sources", state.truncated)
        asked = [self.states.instruction(text) for text in instructions]
        made = [self.states.made(state, one, lambda one=one: self._made((state, one))) for one in asked]
        rows = torch.stack(made)[:, :count]
        check_rows(rows.flatten(0, 1), self.model.adapter.llm_width)
        return rows, Outcome(True, truncated=state.truncated)

    def _make(self, pairs: Sequence[tuple[UserState, InstructionState]]) -> torch.Tensor:
        """All K user tokens of each (user, instruction) pair, `[B, K, llm_width]`."""
        return self.model.soft_rows(*zip(*pairs)).cpu()

    def chat(
        self, body: dict, user: str | None, *, instruction: str | None = None, count: int | None = None, **tenant
    ) -> tuple[dict, Outcome]:
        """A chat request whose last user turn opens with the user's rows as a `prompt_embeds` part.

        The body is a plain one when the outcome is plain. `instruction` defaults to that turn's text.
        """
        messages = body.get("messages")
        turns = user_turns(messages)
        if not turns or not isinstance(messages[turns[-1]].get("content"), (str, list)):
            return self.plain(CHAT, body), Outcome(False, "no-user-turn")
        if body.get("echo"):  # vLLM then asks for prompt logprobs, which stop the engine beside embeddings
            return self.plain(CHAT, body), Outcome(False, "echo")
        turn = messages[turns[-1]]
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        rows, outcome = self.rows(user, [instruction or _text(parts)], count, **tenant)
        if rows is None:
            return self.plain(CHAT, body), outcome
        if self.model.adapter.injection != "cross_attention":
            turn = {**turn, "content": [embeddings_part(rows[0]), *parts]}
            body = {**body, "messages": [*messages[: turns[-1]], turn, *messages[turns[-1] + 1 :]]}
        return self.memory.chat(body, rows[0]) if self.memory else body, outcome

    def completion(
        self, body: dict, user: str | None, *, instruction: str | None = None, count: int | None = None, **tenant
    ) -> tuple[dict, Outcome]:
        """A completion request whose prompts are embeddings that hold the user's rows; see `PromptTemplate.place`.

        The body is a plain one when the outcome is plain. `instruction` defaults to each prompt's last user turn.
        """
        for name in ("echo", "suffix"):
            if body.get(name):
                return self.plain(COMPLETION, body), Outcome(False, name)
        prompts, template = _prompts(body.get("prompt")), self.model.template
        if not prompts:
            return self.plain(COMPLETION, body), Outcome(False, "no-user-turn")
        if len(prompts) > MOST_PROMPTS:
            return self.plain(COMPLETION, body), Outcome(False, "too-long")
        rows, outcome = self.rows(user, [instruction or template.instruction(p) for p in prompts], count, **tenant)
        if rows is None:
            return self.plain(COMPLETION, body), outcome
        embedded = self._embedded(body, prompts, rows)
        return (self.plain(COMPLETION, body), Outcome(False, "too-long")) if embedded is None else (embedded, outcome)

    def plain(self, route: str, body: dict) -> dict:
        """A request as the LLM answers it without a user. Raises `UnservableError` where it takes none such."""
        if self.memory is None:
            return body
        if route.endswith(CHAT):
            return self.memory.chat(body, None)
        for name in ("echo", "suffix"):
            if body.get(name):
                raise UnservableError(name, REASONS[name])
        try:
            prompts = _prompts(body.get("prompt"))
            if not prompts:
                raise PersonaError("there is no prompt")
            embedded = self._embedded(body, prompts, None) if len(prompts) <= MOST_PROMPTS else None
        except PersonaError:
            raise UnservableError("bad-prompt", REASONS["bad-prompt"]) from None
        if embedded is None:
            raise UnservableError("too-long", REASONS["too-long"])
        return embedded

    def _embedded(self, body: dict, prompts: Sequence[str | list[int]], rows: torch.Tensor | None) -> dict | None:
        """A completion request whose prompts are embeddings, with user tokens `[prompts, count, llm_width]` or none.

        None where they would be too many.
        """
        count, special = 0 if rows is None else rows.shape[1], body.get("add_special_tokens", True)
        placed = [self.model.template.place(p, count, add_special_tokens=special) for p in prompts]
        slots = self.memory.layout.slots if self.memory else 0
        if sum(slots + len(p.ids) for p in placed) * self.model.embedding_bytes > MOST_BYTES:
            return None
        embeds = []
        for number, prompt in enumerate(placed):
            own = None if rows is None else rows[number]
            whole = self.model.prompt_rows(prompt, own)
            embeds.append(torch.cat([self.memory.rows(own).to(whole), whole]) if self.memory else whole)
        texts = [encode_rows(whole) for whole in embeds]
        rest = {key: value for key, value in body.items() if key != "prompt"}
        return {**rest, "prompt_embeds": texts if len(texts) > 1 else texts[0]}


def user_turns(messages: object) -> list[int]:
    """Positions of a chat's user turns; none where `messages` is no list, which is for the LLM's server to refuse."""
    listed = messages if isinstance(messages, (list, tuple)) else []
    return [i for i, m in enumerate(listed) if isinstance(m, dict) and m.get("role") == "user"]


def _text(parts: Sequence[dict]) -> str:
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") in ("text", "input_text")]
    return "\n".join(t for t in texts if isinstance(t, str))


def _prompts(prompt: object) -> list[str | list[int]]:
    """One or several prompts, each text or token ids, as the completion route takes them."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        return []
    if all(isinstance(p, int) and not isinstance(p, bool) for p in prompt):
        return [prompt]
    good = all(isinstance(p, str) or (isinstance(p, list) and all(isinstance(i, int) for i in p)) for p in prompt)
    if not good:
        raise PersonaError("prompt must be text, token ids, or a list of these")
    return prompt
