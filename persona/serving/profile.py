"""`TextProfiles` puts what is known of a user into a request as words, for endpoints that take no embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from persona.errors import MissingExtraError
from persona.history import Event, History, SourceSpec
from persona.history.render import render_event
from persona.serving.personalizer import Outcome, user_turns
from persona.store import EventStore

HEAD = "What is known of this user, oldest first:"
NEWEST, FITTING = 5, 10
"""Events that are shown because they are new, and because their words fit the instruction."""
MAX_EVENTS = 1000
"""Timed events that are searched; of a longer history the newest."""
MAX_LINE = 200
"""Characters of an event's line."""


class TextProfiles:
    """Request bodies whose last user turn opens with a short profile; the twin in words of `Personalizer`.

    `sources` are a recipe's, whose `line` says how an event is written. `budget` is the profile's length in characters
    (four to a token). Safe to share between threads. Raises `MissingExtraError` without bm25s.
    """

    def __init__(self, store: EventStore, sources: Mapping[str, SourceSpec] | None = None, *, budget: int = 1500):
        try:
            import bm25s  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("text profiles need bm25s: pip install 'persona[serve]'") from error
        self.store, self.sources, self.budget = store, sources or {}, budget

    def profile(self, user: str, instruction: str, *, tenant: str = "default") -> tuple[str | None, Outcome]:
        """The user's profile for an instruction, or None and the reason. Raises what the store raises."""
        history = self.store.history(user, last=MAX_EVENTS + 1, tenant=tenant)
        if not history.events:
            return None, Outcome(False, "unknown-user")
        truncated = len(history.timed) > MAX_EVENTS
        text = write_profile(history.last(MAX_EVENTS), instruction, self.sources, budget=self.budget)
        return (text, Outcome(True, truncated=truncated)) if text else (None, Outcome(False, "unknown-sources"))

    def chat(
        self, body: dict, user: str, *, instruction: str | None = None, tenant: str = "default"
    ) -> tuple[dict, Outcome]:
        """A chat request with the profile at the start of its last user turn, after a shared system prompt.

        The body is returned unchanged when the outcome is plain. `instruction` defaults to that turn's text.
        """
        messages = body.get("messages")
        turns = user_turns(messages)
        content = messages[turns[-1]].get("content") if turns else None
        if not isinstance(content, (str, list)):
            return body, Outcome(False, "no-user-turn")
        profile, outcome = self.profile(user, instruction or _text(content), tenant=tenant)
        if profile is None:
            return body, outcome
        if isinstance(content, str):
            content = f"{profile}\n\n{content}"
        else:
            content = [{"type": "text", "text": f"{profile}\n\n"}, *content]
        turn = {**messages[turns[-1]], "content": content}
        return {**body, "messages": [*messages[: turns[-1]], turn, *messages[turns[-1] + 1 :]]}, outcome

    def completion(
        self, body: dict, user: str, *, instruction: str | None = None, tenant: str = "default"
    ) -> tuple[dict, Outcome]:
        """A completion request whose prompt, or each of its prompts, begins with the profile.

        The body is returned unchanged when the outcome is plain, as it is for prompts of token ids and for `echo`.
        """
        if body.get("echo"):
            return body, Outcome(False, "echo")
        given = body.get("prompt")
        prompts = [given] if isinstance(given, str) else given
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
            return body, Outcome(False, "no-user-turn")
        written = []
        for prompt in prompts:
            profile, outcome = self.profile(user, instruction or prompt, tenant=tenant)
            if profile is None:
                return body, outcome
            written.append(f"{profile}\n\n{prompt}")
        return {**body, "prompt": written[0] if isinstance(given, str) else written}, outcome


def write_profile(
    history: History, instruction: str, sources: Mapping[str, SourceSpec], *, budget: int = 1500
) -> str | None:
    """A profile of at most `budget` characters, in time order; None when no event has anything to say.

    Facts without a time come first, then the newest events, then those that share words with the instruction (BM25,
    Robertson and Zaragoza 2009), until the budget is used up. What happened several times is one line, where it
    happened last. With `sources`, events of other sources are left out.
    """
    times, newest = Counter(), {}
    for event in history.events:
        line = _line(event, sources)[:MAX_LINE] if event.source in sources or not sources else ""
        if line:
            times[line] += 1
            newest.pop(line, None)
            newest[line] = event
    lines = list(newest)
    timed = [i for i, line in enumerate(lines) if newest[line].timestamp is not None]
    facts = [i for i, line in enumerate(lines) if newest[line].timestamp is None]
    shown = [f"- {line} ({times[line]} times)" if times[line] > 1 else f"- {line}" for line in lines]
    chosen, left = [], budget - len(HEAD)
    for i in dict.fromkeys([*facts[-NEWEST:], *reversed(timed[-NEWEST:]), *best_matches(lines, instruction, FITTING)]):
        if len(shown[i]) < left:
            chosen.append(i)
            left -= len(shown[i]) + 1
    return "\n".join([HEAD, *(shown[i] for i in sorted(chosen))]) if chosen else None


def best_matches(lines: Sequence[str], query: str, count: int) -> list[int]:
    """Positions of the lines that share words with the query, best first, at most `count`."""
    import bm25s

    (words,) = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)
    documents = bm25s.tokenize(list(lines), stopwords="en", return_ids=False, show_progress=False) if lines else []
    if not words or not any(documents):  # bm25s cannot index nothing
        return []
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    scores = index.get_scores(words)
    return [int(i) for i in (-scores).argsort(kind="stable")[:count] if scores[i] > 0]


def _line(event: Event, sources: Mapping[str, SourceSpec]) -> str:
    """One event in one line: by the recipe's template, or with all that it holds."""
    if event.source in sources:
        return render_event(event, sources[event.source])
    facts = [f"{name}: {_value(value)}" for name, value in event.attributes.items() if value is not None]
    if event.value is not None:
        facts.insert(0, _value(event.value))
    words = event.text or event.item_id or ""
    line = f"{event.source}: {words} ({', '.join(facts)})" if words and facts else f"{event.source}: {words}"
    return " ".join((line if words or not facts else f"{event.source}: {', '.join(facts)}").split())


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.10g}"


def _text(content: str | list) -> str:
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))
