"""persona gives any LLM call a user id.

    persona = Persona.from_pretrained("adapters/demo/weights", engine="vllm")
    persona.observe("ana", Event("purchase", timestamp, text="oak violin music", item_id="..."))
    persona.generate("ana", "What does this user buy most?").text

A history of events (`persona.history`, kept by `persona.store`) becomes a few instruction-aware user tokens
(`persona.encoders`), which enter a frozen LLM as soft prompts (`persona.injection`) in Hugging Face or vLLM
(`persona.serving`). `persona.training` makes adapters from recipes, `persona.evaluation` the tables.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from persona.history import Event, History

if TYPE_CHECKING:
    from persona.encoders import UserEncoder, UserTokens
    from persona.injection import PersonalizedLM
    from persona.serving import Answer, Persona
    from persona.serving.wrap import wrap
    from persona.store import EventStore

__version__ = "0.1.0"
__all__ = ["Answer", "Event", "EventStore", "History", "Persona", "PersonalizedLM", "UserEncoder", "UserTokens", "wrap"]

_HOME = {
    "Answer": "persona.serving",
    "EventStore": "persona.store",
    "Persona": "persona.serving",
    "PersonalizedLM": "persona.injection",
    "UserEncoder": "persona.encoders",
    "UserTokens": "persona.encoders",
    "wrap": "persona.serving.wrap",
}


def __getattr__(name: str):
    if name in _HOME:  # loaded on first use: `import persona` does not import torch
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'persona' has no attribute {name!r}")
