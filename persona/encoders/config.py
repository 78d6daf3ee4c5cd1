"""`EncoderConfig`: the shape of a user encoder. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from persona.history.source import STRICT


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and names; what is learned from data stands in `Vocabulary`.

    With backbone llm the LM brings its own `heads`, `layers` and `inner`, and there is no `head`: they change nothing.
    """

    __pydantic_config__ = STRICT

    text_encoder: str = "all-MiniLM-L6-v2"
    """sentence-transformers name or path of the frozen text encoder; the default comes with the package."""
    backbone: str = "transformer"
    """Sequence model over the event vectors, a key of `persona.encoders.backbones.BACKBONES`; or llm, a small causal LM
    that reads the instruction, too, and makes the tokens itself (`LLMUserEncoder`)."""
    llm: str = ""
    """backbone llm: Hugging Face name or folder of the LM; empty in a recipe: the LLM that the adapter is for."""
    llm_sha256: str = ""
    """backbone llm: of the LM's word embeddings and how texts are read, in a saved encoder, so that no other LM, and no
    other version of persona, is taken for its own."""
    lora_rank: int = 16
    """backbone llm: rank of the LoRA by which the LM is trained; 0 trains all of it but its word embeddings."""
    source_adapters: bool = False
    """Whether each source has a text adapter (LayerNorm and MLP) of its own."""
    width: int = 192
    """d: width of event vectors, states and user tokens."""
    heads: int = 6
    """Attention heads, in the backbone and in the resampler; a divisor of `width`."""
    layers: int = 2
    """Layers of the backbone."""
    inner: int = 0
    """Width of the backbone's inner layers (feed-forward, GRU or Mamba state); 0 takes the backbone's own default."""
    item_text: bool = True
    """Whether an item's text is read beside its id; an item with an unknown id is always read by its text."""
    item_attributes: bool = False
    """Whether an item's attributes are read beside its id."""
    item_targets: Literal["text", "id"] = "text"
    """What the next-item objective foretells: an item by its text, or by its id (and its text, if that is read)."""
    mentions: bool = False
    """Whether an item that an instruction names by its whole text is looked up, so that the resampler knows its id and
    how it matches the newest state."""
    head: str = "resampler"
    """How tokens are made from states: resampler, which reads the instruction; linear or mlp of the states' mean."""
    resampler_layers: int = 2
    """Layers of the resampler, if that is the head."""
    tokens: int = 8
    """K: user tokens made for one instruction; every prefix of them is usable."""
    max_events: int = 50
    """Longest history, in timed events; of a longer one the newest are encoded and the result says so."""
    dropout: float = 0.1
    """Dropout in training."""

    def __post_init__(self):
        for name in ("width", "heads", "layers", "resampler_layers", "tokens", "max_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.backbone != "llm" and (self.width % self.heads or (self.width // self.heads) % 2):
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")
        for name in ("inner", "lora_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
