"""Where events and embeddings are kept. No torch here."""

from persona.store.events import EventStore

__all__ = ["EventStore"]
