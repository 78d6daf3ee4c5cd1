"""Where a deployment keeps user tokens: fixed when a checkpoint is exported, read from its config.json by vLLM."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from persona.errors import PersonaError

KEY = "persona_memory"
"""Its entry in config.json."""
LAYERS = "persona_layers"
"""The entry beside it that says which training the layers are of: the digest of their file."""
ROLE = "persona_memory"
"""Role of the first chat message, which carries the rows as a `prompt_embeds` part."""
SLOT_MULTIPLE = 32
"""vLLM's smallest block on a CPU; a multiple of the 16 that GPUs use."""


@dataclass(frozen=True)
class MemoryLayout:
    """The first `slots` positions of every request are reserved, and the first `tokens` of these are read.

    Raises `PersonaError` for numbers that cannot be.
    """

    tokens: int
    """K: user tokens that are read."""
    slots: int
    """M: positions reserved at the start of each request; a multiple of vLLM's block size."""
    every: int
    """User tokens are read after blocks 0, every, 2 * every..."""

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PersonaError(f"{KEY}.{name} must be a positive whole number, not {value!r}")
        if self.tokens > self.slots:
            raise PersonaError(f"{self.tokens} user tokens do not fit in {self.slots} slots; give more slots")

    @classmethod
    def for_tokens(cls, tokens: int, every: int, slots: int | None = None) -> MemoryLayout:
        """A layout with as few slots as hold the tokens in whole blocks, unless `slots` is given."""
        return cls(tokens, -(-tokens // SLOT_MULTIPLE) * SLOT_MULTIPLE if slots is None else slots, every)

    @classmethod
    def from_config(cls, config) -> MemoryLayout:
        """Reads a Hugging Face config. Raises `PersonaError` if it is not of an exported checkpoint."""
        entry = getattr(config, KEY, None)
        if not isinstance(entry, dict) or set(entry) != {"tokens", "slots", "every"}:
            raise PersonaError(
                f"config.json needs {KEY!r} with tokens, slots and every, but has {entry!r}; "
                "export the checkpoint again with persona.serving.vllm_memory.export_checkpoint"
            )
        return cls(**entry)

    def to_config(self) -> dict:
        """The entry for config.json."""
        return {KEY: asdict(self)}

    def reads(self, layer: int) -> bool:
        """Whether user tokens are read after block `layer`."""
        return layer % self.every == 0
