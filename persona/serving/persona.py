"""`Persona`: observe events, ask with a user id, forget. The whole library behind five methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from persona.encoders import UserState, UserTokens
from persona.errors import PersonaError
from persona.history import Event
from persona.injection.model import PersonalizedLM
from persona.injection.soft_prompt import Messages, last_user_turn
from persona.serving.export import export_adapter
from persona.serving.personalizer import Personalizer
from persona.serving.states import UserStates
from persona.serving.vllm_offline import VLLMEngine
from persona.store import EventStore


@dataclass(frozen=True)
class Answer:
    """What came back, and whether the user had a part in it."""

    text: str
    """The LLM's answer."""
    personalized: bool
    """False when the answer is the plain LLM's."""
    reason: str | None = None
    """Why the answer is plain, for people."""
    truncated: bool = False
    """True when only the newest events of a long history were read."""


class Persona:
    """A store of events, an adapter, and an LLM that runs in Hugging Face or in vLLM."""

    def __init__(
        self,
        model: PersonalizedLM,
        store: EventStore,
        engine: VLLMEngine | None = None,
        *,
        tenant: str = "default",
        cache_mib: float = 256,
    ):
        self.model, self.store, self.engine, self.tenant = model.eval(), store, engine, tenant
        self.states = UserStates(model.encoder, store, cache_mib)
        self.personalizer = Personalizer(model, self.states)

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        llm: str | Path | None = None,
        *,
        store: str | EventStore = "sqlite:///persona.db",
        engine: str | None = "transformers",
        tenant: str = "default",
        **kwargs,
    ) -> Persona:
        """Loads an adapter and its LLM; `engine` is "transformers" or "vllm", and `kwargs` go to it.

        With the engine None only the tokenizer and the input embeddings of the LLM are read: enough to personalise
        requests to an LLM that runs elsewhere (`persona.wrap`), not to answer. Raises `CheckpointError` for what
        cannot be loaded, and `PersonaError` for another engine and for what is no store.
        """
        if engine not in ("transformers", "vllm", None):
            raise PersonaError(f'engine is "transformers", "vllm" or None, not {engine!r}')
        if not isinstance(store, (str, EventStore)):
            raise PersonaError(f"store is a URL such as sqlite:///persona.db, or an EventStore, not {store!r}")
        store = EventStore(store) if isinstance(store, str) else store
        if engine == "transformers":
            return cls(PersonalizedLM.from_pretrained(adapter, llm, **kwargs), store, tenant=tenant)
        model = PersonalizedLM.from_pretrained(adapter, llm, llm_weights=False)
        if engine is None:
            return cls(model, store, tenant=tenant)
        if model.adapter.lora:
            raise PersonaError(f"{adapter} has a LoRA, which the vLLM engine does not load: use engine='transformers'")
        served = model.adapter.base_model
        if model.cross_attention is not None:
            served = export_adapter(adapter, llm=served)
        return cls(model, store, VLLMEngine(served, **kwargs), tenant=tenant)

    def observe(self, user: str, events: Event | Mapping | Iterable[Event | Mapping]) -> int:
        """Stores events, or mappings of their fields, and returns how many were new. Runs no model.

        An event with an `event_id` that is there already is not stored again.
        """
        one = isinstance(events, (Event, Mapping))
        return self.store.append(user, [events] if one else list(events), tenant=self.tenant)

    def state(self, user: str) -> UserState | None:
        """The user's cached state, brought up to date; None for a user without events."""
        return self.states.get(user, tenant=self.tenant)

    def tokens(self, user: str, instruction: str, count: int | None = None) -> UserTokens | None:
        """User tokens `[K, d]` for an instruction; None for a user without events."""
        state = self.state(user)
        return None if state is None else self.model.encoder.tokens([state], [instruction], count)[0]

    def generate(self, user: str | None, messages: Messages, **kwargs) -> Answer:
        """One answer; see `generate_batch`."""
        return self.generate_batch([(user, messages)], **kwargs)[0]

    def generate_batch(
        self,
        requests: Sequence[tuple[str | None, Messages]],
        *,
        instruction: str | None = None,
        count: int | None = None,
        **kwargs,
    ) -> list[Answer]:
        """Answers for (user, messages) pairs in one batch; the user None asks plainly.

        `instruction` defaults to each request's last user turn; `kwargs` go to the engine. An unknown user gets the
        plain answer, and the answer says so.
        """
        if not requests:
            return []
        found = [None if user is None else self.state(user) for user, _ in requests]
        states = [s if s is not None and len(s.states) > 1 else None for s in found]  # more than the start state
        known = [i for i, s in enumerate(states) if s is not None]
        instructions = [instruction or last_user_turn(requests[i][1]) for i in known]
        rows = self.model.soft_rows([states[i] for i in known], instructions, count) if known else None
        size = rows.shape[1] if known else 0
        prompts = [self.model.template.prompt(m, size if s else 0) for (_, m), s in zip(requests, states)]
        engine = self.engine or self.model
        texts = engine.complete(prompts, rows.flatten(0, 1) if known else None, **kwargs)
        return [
            Answer(text, True, truncated=used.truncated) if used else Answer(text, False, self._why_plain(user, state))
            for text, (user, _), state, used in zip(texts, requests, found, states)
        ]

    def _why_plain(self, user: str | None, state: UserState | None) -> str:
        if user is None:
            return "no user was named"
        if state is None:
            return "this user has no events"
        sources = ", ".join(self.model.encoder.vocabulary.sources)
        return f"none of this user's events is of a source that the adapter knows ({sources})"

    def forget(self, user: str) -> int:
        """Erases the user's events, cached states and cached texts; returns how many events there were."""
        return self.states.forget(user, tenant=self.tenant)
