"""What of a request's body is ours: read within bounds, checked, and cleared of what only the server may set."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import cache
from urllib.parse import unquote

from starlette.types import Receive

from persona.serving.personalizer import CHAT, COUNT_HEADER, INSTRUCTION_HEADER
from persona.serving.server.errors import Refused
from persona.serving.vllm_memory import ROLE


class Disconnected(Exception):
    """The client went away before its request was complete."""


async def read_body(receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
    """The whole body. Raises `Refused` (413) beyond `limit` bytes, and `Disconnected`."""
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise _too_long(limit)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_long(limit)
        if not message.get("more_body"):
            return bytes(body)


def parse(body: bytes) -> dict:
    """The body as a JSON object. Raises `Refused` (400)."""
    try:
        data = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refused(400, "invalid_json", "the body is not valid JSON") from None
    if not isinstance(data, dict):
        raise Refused(400, "invalid_json", "the body must be a JSON object")
    return data


def check(route: str, body: dict, memory: bool = False) -> None:
    """Raises `Refused` (400) for fields that would harm the engine or another tenant.

    With `memory` every request has to bring user tokens to cross-attention layers, so what would cut these off or
    cannot go with them is refused, too.
    """
    if _plays(body.get("messages"), ROLE):
        raise _refused("messages", f"the role {ROLE} is this server's own; leave such messages out")
    template = body.get("chat_template_kwargs") if memory else None
    if isinstance(template, Mapping) and (strange := sorted(_rendering().intersection(template))):
        raise _refused("chat_template_kwargs", f"{strange[0]} could move the user tokens in front of the prompt")
    for name in ("truncate_prompt_tokens", "echo", "suffix", "use_beam_search") if memory else ():
        if body.get(name) is not None and body[name] is not False and body[name] != "":
            raise _refused(name, f"{name} does not go with user tokens that the LLM reads beside its prompt")
    if body.get("prompt_embeds") is not None or _brings_embeddings(body.get("messages")):
        raise _refused("prompt_embeds", "embeddings are made by this server; set `user` instead of sending them")
    if body.get("cache_salt") is not None:
        raise _refused("cache_salt", "the cache salt is set by this server; leave it out")
    if body.get("prompt_logprobs") is not None:
        raise _refused("prompt_logprobs", "prompt_logprobs stops vLLM's engine beside embeddings; leave it out")
    probabilities = ("logprobs", "top_logprobs") if route.endswith(CHAT) else ("logprobs",)
    # Zero asks for log-probabilities too; only false and absence do not.
    if body.get("echo") and not all(body.get(name) is None or body[name] is False for name in probabilities):
        raise _refused("echo", "echo with logprobs stops vLLM's engine beside embeddings; leave one of them out")


def instruction_of(headers: Mapping[str, str]) -> str | None:
    """The instruction that a header gives, percent-decoded. Raises `Refused` (400)."""
    try:
        return unquote(headers.get(INSTRUCTION_HEADER, ""), errors="strict").strip() or None
    except UnicodeDecodeError:
        raise _refused(INSTRUCTION_HEADER, "the instruction must be percent-encoded UTF-8") from None


def count_of(headers: Mapping[str, str], most: int, memory: bool = False) -> int | None:
    """How many user tokens a header asks for. Raises `Refused` (400) outside 1 to `most`; see `check` for `memory`."""
    text = headers.get(COUNT_HEADER)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
        raise _refused(COUNT_HEADER, f"this server's adapter makes 1 to {most} user tokens")
    if memory and most % int(text):
        raise _refused(COUNT_HEADER, f"this server's LLM reads {most} user tokens, or a number that divides {most}")
    return int(text)


def _no_number(name: str) -> None:
    """Python reads NaN and Infinity, which are no JSON."""
    raise ValueError(name)


def _brings_embeddings(messages: object) -> bool:
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            if not isinstance(part, dict):
                continue
            kind = part.get("type")
            if (isinstance(kind, str) and kind.endswith("embeds")) or any(str(k).endswith("embeds") for k in part):
                return True
    return False


@cache
def _rendering() -> frozenset[str]:
    """Names that would say how a chat is rendered or tokenized; all others are the template's own."""
    from transformers import PreTrainedTokenizerBase

    return frozenset([*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages", ROLE])


def _plays(messages: object, role: str) -> bool:
    listed = messages if isinstance(messages, list) else []
    return any(isinstance(message, dict) and message.get("role") == role for message in listed)


def _refused(param: str, message: str) -> Refused:
    return Refused(400, "not_allowed", message, param)


def _too_long(limit: int) -> Refused:
    return Refused(413, "body_too_long", f"the body is longer than {limit} bytes (PERSONA_MAX_BODY)")
