"""`Memory`: what every request must bring to a checkpoint whose cross-attention layers read user tokens.

Such a checkpoint takes the first positions of each request for user tokens, whatever they hold. So nothing reaches it
without them: a user who is not known brings zeros, which change nothing, and what cannot bring them is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from persona.errors import PersonaError
from persona.injection.model import AdapterConfig
from persona.serving.rows import embeddings_part
from persona.serving.vllm_memory import ROLE, MemoryLayout, memory_rows
from persona.serving.vllm_memory.layout import KEY, LAYERS


class UnservableError(PersonaError):
    """A request that cannot bring user tokens to a checkpoint that needs them; `reason` is a key of `REASONS`."""

    def __init__(self, reason: str, meaning: str):
        super().__init__(f"not answered, as this LLM takes no request without user tokens: {meaning}")
        self.reason = reason


@dataclass(frozen=True)
class Memory:
    """The slots of a served checkpoint."""

    layout: MemoryLayout
    """How many slots there are, and how many of them are read."""
    width: int
    """Hidden size of the LLM."""
    layers_sha256: str
    """Which training the layers are of."""

    @classmethod
    def of(cls, adapter: AdapterConfig) -> Memory | None:
        """None for an adapter without cross-attention, whose LLM is served as it is."""
        if adapter.injection == "soft_prompt":
            return None
        layout = MemoryLayout.for_tokens(adapter.tokens, adapter.cross_every)
        return cls(layout, adapter.llm_width, adapter.layers_sha256)

    def rows(self, rows: torch.Tensor | None) -> torch.Tensor:
        """User tokens `[count, width]`, or nobody's, as the `[slots, width]` that open a request."""
        layout = self.layout
        return memory_rows(rows, tokens=layout.tokens, slots=layout.slots, width=self.width)

    def chat(self, body: dict, rows: torch.Tensor | None) -> dict:
        """A chat request with user tokens `[count, width]`, or nobody's, as a message of their own in front."""
        messages = body.get("messages")
        if not isinstance(messages, list):
            return body  # which no engine takes
        part = self._nobody if rows is None else embeddings_part(self.rows(rows))
        return {**body, "messages": [{"role": ROLE, "content": [part]}, *messages]}

    @cached_property
    def _nobody(self) -> dict:
        return embeddings_part(self.rows(None))


def check_served(memory: Memory | None, model: str) -> None:
    """Raises `PersonaError` unless the LLM `model`, in vLLM, is the one that an adapter with this `memory` is for."""
    file = Path(model) / "config.json"  # an exported checkpoint always is a folder
    check_layers(memory, json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}, model)


def check_layers(memory: Memory | None, config: Mapping, model: str) -> None:
    """The same, from the LLM's configuration."""
    found = config.get(KEY)
    wanted = asdict(memory.layout) if memory else None
    if found == wanted and (not memory or config.get(LAYERS) == memory.layers_sha256):
        return
    what = "other cross-attention layers" if found and memory else "cross-attention layers" if found else "none"
    raise PersonaError(
        f"the adapter's user tokens are for {'its own cross-attention layers' if memory else 'a stock LLM'}, but "
        f"{model} has {what}; with cross-attention serve what `persona export` writes for the adapter, else the LLM as "
        "it is"
    )
