"""`Local` personalises calls in the caller's own process, and decides what happens when that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from persona.errors import PersonaError
from persona.history import SourceSpec, check_user
from persona.serving.personalizer import CHAT, REASONS, Outcome
from persona.serving.profile import TextProfiles

if TYPE_CHECKING:
    import torch

    from persona.serving.persona import Persona

log = logging.getLogger("persona.serving")

T = TypeVar("T")


@dataclass(frozen=True)
class Local:
    """A persona and the settings of one `wrap`."""

    persona: Persona | None
    """None where a server does all the work."""
    tokens: int | None = None
    """User tokens of a call that names no number; None takes all that the adapter makes."""
    require: bool = False
    """Raise `PersonaError` instead of answering a named user plainly."""
    sources: Mapping[str, SourceSpec] | None = None
    """A recipe's sources, for text profiles."""

    @cached_property
    def profiles(self) -> TextProfiles:
        """Writes text profiles from the persona's store."""
        return TextProfiles(self.persona.store, self.sources)

    def edit(
        self, mode: str, route: str, body: dict, user: str, instruction: str | None = None, count: int | None = None
    ) -> tuple[dict, Outcome]:
        """The body with the user in it, in the mode "embeds" or "text"; unchanged when the outcome is plain.

        A store or an encoder that fails makes the outcome plain. Raises `EventError` for a user id that cannot be
        one, and `PersonaError` for another plain outcome than wanted, see `require`.
        """
        check_user(user)
        options = {"instruction": instruction, "tenant": self.persona.tenant}
        if mode == "embeds":
            if body.get("prompt_logprobs") is not None:  # they stop vLLM's engine beside embeddings
                return body, self.check(Outcome(False, "echo"))
            made_by, options["count"] = self.persona.personalizer, self.count(count)
        else:
            made_by = self.profiles
        apply = made_by.chat if route.endswith(CHAT) else made_by.completion
        plain = body if mode == "text" else self.persona.personalizer.plain(route, body)
        return self.guard(lambda: apply(body, user, **options), plain=plain)

    def rows(self, user: str | None, instruction: str, count: int | None = None) -> tuple[torch.Tensor | None, Outcome]:
        """Soft rows `[count, llm_width]` of a user, or None and the reason; fails as `edit` does."""
        if user is None:
            return None, Outcome(False, "no-user")
        check_user(user)
        personalizer, count = self.persona.personalizer, self.count(count)
        work = lambda: personalizer.rows(user, [instruction], count, tenant=self.persona.tenant)  # noqa: E731
        rows, outcome = self.guard(work, plain=None)
        return None if rows is None else rows[0], outcome

    def count(self, given: int | None) -> int | None:
        """How many user tokens a call uses. Raises `PersonaError` for more than the adapter makes."""
        count, most = self.tokens if given is None else given, self.persona.model.adapter.tokens
        if count is not None and not 1 <= count <= most:
            raise PersonaError(f"this adapter makes 1 to {most} user tokens, not {count}")
        if count is not None and self.persona.personalizer.memory and most % count:
            raise PersonaError(
                f"this adapter's LLM reads {most} user tokens, or a number that divides {most}: not {count}"
            )
        return count

    def guard(self, work: Callable[[], tuple[T, Outcome]], plain: T) -> tuple[T, Outcome]:
        """What `work` returns; `plain` and the reason "failed" when it raises."""
        try:
            result, outcome = work()
        except Exception as error:  # whatever fails in ours, the call is answered
            if self.require:
                raise PersonaError(f"not personalised: {REASONS['failed']} ({error})") from error
            log.warning("not personalised: %s", type(error).__name__)  # its message may quote a user
            log.debug("not personalised", exc_info=error)
            return plain, Outcome(False, "failed")
        return result, self.check(outcome)

    def check(self, outcome: Outcome) -> Outcome:
        """The outcome. Raises `PersonaError` for a plain one where a personal one is required."""
        if self.require and not outcome.personalized:
            raise PersonaError(f"not personalised: {REASONS.get(outcome.reason, 'the endpoint does not say why')}")
        return outcome


def per_prompt(user: str | Sequence[str | None] | None, size: int) -> list[str | None]:
    """One user for each of `size` prompts, from one for all of them or from a list. Raises `PersonaError`."""
    users = [user] * size if user is None or isinstance(user, str) else list(user)
    if len(users) != size:
        raise PersonaError(f"there are {len(users)} user ids for {size} prompts; give one, or one for each")
    return users
