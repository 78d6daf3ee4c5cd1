"""From histories to user tokens: event encoders, a sequence backbone, an instruction-aware resampler."""

from persona.encoders.config import EncoderConfig
from persona.encoders.factory import make_encoder
from persona.encoders.text import TextEncoder
from persona.encoders.user_encoder import InstructionState, UserEncoder, UserState, UserTokens
from persona.encoders.vocabulary import Vocabulary

__all__ = [
    "EncoderConfig",
    "InstructionState",
    "TextEncoder",
    "UserEncoder",
    "UserState",
    "UserTokens",
    "Vocabulary",
    "make_encoder",
]
