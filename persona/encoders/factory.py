"""`make_encoder`: the user encoder that a config describes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from persona.encoders.config import EncoderConfig
from persona.encoders.text import TextEncoder
from persona.encoders.user_encoder import UserEncoder
from persona.encoders.vocabulary import Vocabulary


def make_encoder(
    config: EncoderConfig,
    vocabulary: Vocabulary,
    text_encoder: TextEncoder | None = None,
    llm: str | Path = "",
) -> UserEncoder:
    """An untrained `UserEncoder`, or `LLMUserEncoder` for the backbone llm, whose LM is `llm` if `config` names none.

    Raises `RecipeError`, `CheckpointError`.
    """
    if config.backbone != "llm":
        return UserEncoder(config, vocabulary, text_encoder)
    from persona.encoders.llm_encoder import LLMUserEncoder  # transformers takes its time

    return LLMUserEncoder(config if config.llm else replace(config, llm=str(llm)), vocabulary, text_encoder)
