"""All users at once: a pure function for any worker (`EmbedUsers`), and `refresh`, which runs it through Ray Data."""

from persona.batch.function import SCHEMA, EmbedUsers
from persona.batch.refresh import Refreshed, refresh

__all__ = ["SCHEMA", "EmbedUsers", "Refreshed", "refresh"]
