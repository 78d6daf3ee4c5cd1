"""`make_encoder`: the user encoder that a config describes."""

from __future__ import annotations

from persona.encoders.config import EncoderConfig
from persona.encoders.text import TextEncoder
from persona.encoders.user_encoder import UserEncoder
from persona.encoders.vocabulary import Vocabulary


def make_encoder(config: EncoderConfig, vocabulary: Vocabulary, text_encoder: TextEncoder | None = None) -> UserEncoder:
    """An untrained `UserEncoder`, or `LLMUserEncoder` for the backbone llm. Raises `RecipeError`, `CheckpointError`."""
    if config.backbone != "llm":
        return UserEncoder(config, vocabulary, text_encoder)
    from persona.encoders.llm_encoder import LLMUserEncoder  # transformers takes its time

    return LLMUserEncoder(config, vocabulary, text_encoder)
