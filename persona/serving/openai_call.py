"""One request of a wrapped OpenAI client: the user in it, and what the answer says of the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import openai

from persona.serving.local import Local
from persona.serving.personalizer import COMPLETION, COUNT_HEADER, INSTRUCTION_HEADER, Outcome


class Call:
    """A request that may name a user: its options with the user in them, and the parser that says so in the answer."""

    def __init__(self, options):
        self.options, self._parser = options.model_copy(update={"post_parser": self}), options.post_parser
        self.user = {**options.json_data, **(options.extra_json or {})}.get("user")
        self._local, self._mode, self._outcome = None, None, Outcome(False, "no-user")

    @classmethod
    def of(cls, options) -> Call | None:
        """None for a request to another route."""
        personal = options.url.endswith(COMPLETION) and options.method.lower() == "post"
        return cls(options) if personal and isinstance(options.json_data, Mapping) else None

    def personalize(self, local: Local, mode: str) -> None:
        """Puts the user into the request. Raises as `Local.edit` does."""
        options, self._local, self._mode = self.options, local, mode
        headers = {_ours(name): value for name, value in options.headers.items()} if _given(options.headers) else {}
        if mode == "server":
            self._outcome = Outcome(False)  # until the server says otherwise
            if local.tokens is not None:
                options.headers = {COUNT_HEADER: str(local.tokens), **headers}
            return
        body = {**options.json_data, **(options.extra_json or {})}
        user, instruction, count = body.pop("user"), headers.pop(INSTRUCTION_HEADER, ""), headers.pop(COUNT_HEADER, "")
        options.json_data, self._outcome = local.edit(
            mode, options.url, body, user, unquote(instruction) or None, int(count) if count else None
        )
        options.extra_json, options.headers = None, headers

    def mark(self, response) -> None:
        """Notes the outcome in the answer's headers, or from them. Raises `PersonaError`, see `Local.require`."""
        headers = response.headers
        if "x-persona" in headers:
            self._outcome = Outcome(headers["x-persona"] == "personalized", headers.get("x-persona-reason"))
        elif self._mode != "server":
            word = "text-profile" if self._mode == "text" else "personalized"
            headers["x-persona"] = word if self._outcome.personalized else "plain"
            if self._outcome.reason:
                headers["x-persona-reason"] = self._outcome.reason
            if self._outcome.truncated:
                headers["x-persona-truncated"] = "true"
        if self._local:
            self._local.check(self._outcome)

    def __call__(self, parsed: Any) -> Any:
        """The parsed answer with its key `persona`; a stream of events stays as it is."""
        if _given(self._parser):
            parsed = self._parser(parsed)
        if isinstance(parsed, openai.BaseModel):
            outcome = self._outcome
            parsed.persona = {"mode": self._mode, "personalized": outcome.personalized, "reason": outcome.reason}
        return parsed


def _ours(header: str) -> str:
    """Our own headers in lower case, others as they are."""
    return header.lower() if header.lower() in (INSTRUCTION_HEADER, COUNT_HEADER) else header


def _given(value: object) -> bool:
    return not isinstance(value, (openai.NotGiven, openai.Omit))
