"""Where events and embeddings are kept. No torch here."""

from __future__ import annotations

from persona.errors import PersonaError
from persona.store.embeddings import EmbeddingStore, Stored, space_name
from persona.store.embeddings_sql import SqlEmbeddings
from persona.store.events import EventStore

__all__ = ["EmbeddingStore", "EventStore", "SqlEmbeddings", "Stored", "open_embeddings", "space_name"]

IN_STORE = "store"
"""In place of a URL: embeddings lie in the event store's database."""


def open_embeddings(url: str, events: EventStore, *, ttl: float = 7 * 86400.0) -> EmbeddingStore:
    """Where embeddings are shared: `store` or a URL such as redis://127.0.0.1:6379/0 (rediss:// and unix:// too).

    `ttl`: seconds that Redis keeps a value. Raises `PersonaError` for anything else.
    """
    if url == IN_STORE:
        return SqlEmbeddings(events)
    if url.partition("://")[0] in ("redis", "rediss", "unix", "valkey", "valkeys"):
        from persona.store.embeddings_redis import RedisEmbeddings

        return RedisEmbeddings(url.replace("valkey", "redis", 1) if url.startswith("valkey") else url, ttl=ttl)
    raise PersonaError(f"embeddings are kept in the {IN_STORE!r} or at a URL such as redis://127.0.0.1:6379/0")
