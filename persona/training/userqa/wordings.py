"""Other wordings of a recipe's questions, by any LLM behind an OpenAI-compatible server.

The LLM is sent the templates of the recipe's questions, `Will this user buy {item} next?`, and nothing else: no user,
no event, no item and no answer.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from persona.errors import MissingExtraError, PersonaError
from persona.history.config import parse_config
from persona.history.source import STRICT
from persona.training.questions import QuestionSpec

LONGEST = 300
"""A wording has fewer characters than this."""
PLACE = re.compile(r"\{[^{}]*\}")
STRING = r'"(?:[^"\\]|\\.)*"'
LIST = re.compile(rf"\[\s*{STRING}(?:\s*,\s*{STRING})*\s*\]")


@dataclass(frozen=True)
class Rewriting:
    """Which LLM is asked, and for how much. Raises `PersonaError` for what cannot be asked."""

    url: str
    """Base URL of the server, such as http://127.0.0.1:8000/v1. The key is read from OPENAI_API_KEY."""
    model: str
    """Name of the model there."""
    count: int = 4
    """Other wordings of each question."""

    def __post_init__(self):
        if not self.url or not self.model:
            raise PersonaError("rewriting needs both --rewrite-url and --rewrite-model, or neither")
        if not self.url.startswith(("http://", "https://")) or not self.url.isprintable():
            raise PersonaError(f"--rewrite-url must begin with http:// or https://, not {self.url!r}")
        if self.count < 1:
            raise PersonaError(f"--rewrite-count must be at least 1, not {self.count}")


@dataclass(frozen=True)
class Wordings:
    """What an LLM made of one question."""

    __pydantic_config__ = STRICT

    prompt: str
    """The recipe's template."""
    kept: list[str]
    """Other templates that ask the same."""
    refused: dict[str, int] = field(default_factory=dict)
    """Number of wordings that were not taken, by reason."""

    @property
    def all(self) -> tuple[str, ...]:
        """The recipe's template, then the others."""
        return (self.prompt, *self.kept)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.refused.items())
        return f"{len(self.kept)} wordings kept, {sum(self.refused.values())} refused" + f" ({reasons})" * bool(reasons)


@dataclass(frozen=True)
class _File:
    """wordings.json."""

    __pydantic_config__ = STRICT

    model: str
    """As in `Rewriting`."""
    count: int
    """As in `Rewriting`."""
    questions: dict[str, Wordings]
    """By name of the question."""


def reword(
    rewriting: Rewriting,
    specs: Mapping[str, QuestionSpec],
    known: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Wordings]:
    """Other wordings of each question: from the file `known` as far as it fits, else one call of the LLM for each.

    Raises `PersonaError` when the LLM does not answer, or the file is not one that `write_wordings` wrote.
    """
    old = _read(Path(known), rewriting) if known and Path(known).exists() else {}
    result, client = {}, None
    for name, spec in specs.items():
        if name in old and old[name].prompt == spec.prompt:
            result[name] = old[name]
            continue
        client = client or _client(rewriting)
        result[name] = choose(spec.prompt, _ask(client, rewriting, spec.prompt), rewriting.count)
        say(f"{name}: {result[name]}")
    return result


def write_wordings(path: Path, rewriting: Rewriting, wordings: Mapping[str, Wordings]) -> None:
    """Writes them as JSON, from which `reword` takes them the next time."""
    text = json.dumps(asdict(_File(rewriting.model, rewriting.count, dict(wordings))), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def choose(prompt: str, reply: str, count: int) -> Wordings:
    """The first `count` wordings in an LLM's reply that can stand for `prompt`."""
    kept, refused = [], Counter()
    found = _list_in(reply)
    if found is None:
        refused["replies without a JSON list of strings"] = 1
    for wording in map(str.strip, found or ()):
        if reason := refusal(wording, prompt, kept):
            refused[reason] += 1
        elif len(kept) < count:
            kept.append(wording)
    return Wordings(prompt, kept, dict(refused))


def refusal(wording: str, prompt: str, others: list[str]) -> str | None:
    """Why a wording cannot stand for the template `prompt` beside `others`, if so."""
    if not wording:
        return "empty"
    if len(wording) >= LONGEST:
        return f"of {LONGEST} characters or more"
    if len(wording.splitlines()) > 1:
        return "of several lines"
    if wording.encode(errors="ignore").decode() != wording:
        return "not valid Unicode"
    if sorted(PLACE.findall(wording)) != sorted(PLACE.findall(prompt)):
        return "with other places than the template"
    if wording.casefold() in (other.casefold() for other in (prompt, *others)):
        return "the same as another"
    return None


def _read(path: Path, rewriting: Rewriting) -> dict[str, Wordings]:
    """The wordings of a file, if they are of this model and as many as asked for."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PersonaError(f"{path} is not JSON in UTF-8 ({error}); remove it, and the LLM is asked again") from None
    file = parse_config(_File, data, str(path))
    for name, wordings in file.questions.items():
        for number, wording in enumerate(wordings.kept):
            if reason := refusal(wording, wordings.prompt, wordings.kept[:number]):
                raise PersonaError(f"{path}: questions.{name} has the wording {wording!r}, {reason}; remove it")
    return file.questions if (file.model, file.count) == (rewriting.model, rewriting.count) else {}


def _client(rewriting: Rewriting):
    try:
        import openai
    except ImportError as error:
        raise MissingExtraError(f"an LLM cannot be asked ({error}): pip install 'persona[serve]'") from error
    return openai.OpenAI(base_url=rewriting.url, api_key=os.environ.get("OPENAI_API_KEY") or "none")


def _ask(client, rewriting: Rewriting, prompt: str) -> str:
    """The LLM's reply to one template; empty if it has nothing to say."""
    import openai

    places = PLACE.findall(prompt)
    keep = f"Keep {' and '.join(places)} exactly as written: a name is put in there later. " if places else ""
    request = (
        f"Write {rewriting.count} other wordings of the question below, which is asked about a user. Each must ask "
        f"exactly the same, in the same language, in one line. {keep}"
        f"Reply with a JSON list of {rewriting.count} strings and nothing else.\n\nQuestion: {prompt}"
    )
    try:
        reply = client.chat.completions.create(
            model=rewriting.model, messages=[{"role": "user", "content": request}], temperature=0
        )
    except openai.OpenAIError as error:
        raise PersonaError(
            f"the LLM {rewriting.model!r} at {rewriting.url} did not answer ({error}); check --rewrite-url, "
            "--rewrite-model and the environment variable OPENAI_API_KEY, or leave rewriting out. Nothing was written"
        ) from None
    choices = getattr(reply, "choices", None)
    if not choices:
        raise PersonaError(
            f"{rewriting.url} answers, but not as a chat completion; --rewrite-url is the base URL of an "
            "OpenAI-compatible server, and mostly ends in /v1. Nothing was written"
        )
    return choices[0].message.content or ""


def _list_in(reply: str) -> list[str] | None:
    """The last JSON list of strings in a reply, whatever the LLM says around it."""
    try:
        return json.loads(LIST.findall(reply)[-1])
    except (IndexError, ValueError):
        return None
