"""`LLMUserEncoder`: a `UserEncoder` whose backbone and head are one small causal LM (InstructUE, arXiv 2510.11016).

The LM reads a start vector, the event vectors in order of time, the instruction's words, the items that it names, what
its chat template has between a question and its answer, and K learned user positions, whose states are the user tokens.
Since the instruction comes last, what the LM keeps of a history (its key-value cache) serves every instruction; since
attention is causal, every prefix of the K tokens is what a smaller K would have made, and an event is appended for its
own price. The paper groups events by source; here each event says what source it is of, so that new events always come
last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from persona.encoders.config import EncoderConfig
from persona.encoders.features import EventBatch
from persona.encoders.llm_trunk import LLMTrunk
from persona.encoders.text import INSTRUCTION_LENGTH, TextEncoder
from persona.encoders.user_encoder import InstructionState, UserEncoder, UserState, padded, start_times, with_start
from persona.encoders.vocabulary import Vocabulary
from persona.encoders.worded import WordedTexts
from persona.errors import CheckpointError, RecipeError

QUIET = 0.1
"""What is learned of an event begins so much smaller than usual: at first the LM reads its words alone."""


class LLMUserEncoder(UserEncoder):
    """Event encoders, then an LM that reads events and instruction; see the module for the order."""

    # Words are read as their mean, in which the answer "Lyon" would drown in "city: Lyon"; a column has its own vector.
    _named = False

    def __init__(self, config: EncoderConfig, vocabulary: Vocabulary, text_encoder: TextEncoder | None = None):
        """Raises `RecipeError` where `config` does not fit the LM, `CheckpointError` for an LM that does not load."""
        trunk = LLMTrunk(config.llm, config.lora_rank)
        if trunk.width != config.width:
            raise RecipeError(
                f"encoder.width is {config.width}, but {config.llm} is {trunk.width} wide: set it to {trunk.width}"
            )
        if config.llm_sha256 not in ("", trunk.digest):
            raise CheckpointError(
                f"{config.llm} is not the LM that this encoder was trained with (its word embeddings differ), or "
                "another version of persona reads texts for it: bring that one back, or train anew"
            )
        config = replace(config, llm_sha256=trunk.digest)
        texts = text_encoder or TextEncoder(config.text_encoder)
        texts = texts.texts if isinstance(texts, WordedTexts) else texts  # another encoder's
        super().__init__(config, vocabulary, WordedTexts(texts, trunk))
        before, after = (part.detach() for part in trunk.frame)
        self.register_buffer("_after", after, persistent=False)
        self.backbone, self.head = trunk, UserPositions(config.tokens, trunk, after[-1:])
        scale = trunk.some_words().norm(dim=-1).mean() / config.width**0.5
        self.register_buffer("scale", scale, persistent=False)  # of the LM's input; event vectors are normed to 1
        self.register_load_state_dict_post_hook(_without_frozen)
        with torch.no_grad():
            self.events.quieten(QUIET)
            self.start.normal_(std=float(scale))
            if len(before):
                self.start.copy_(before[-1])

    def _build(self, text_dim: int) -> None:
        pass  # the trunk is both backbone and head

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """Weights without those of the LM that are never trained."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = super().state_dict(*args, **kwargs)
        for name in self.backbone.frozen:
            state.pop(f"{prefix}backbone.{name}", None)
        return state

    def freeze(self, frozen: bool = True) -> None:
        """Leaves the event encoders and the LM as they are in training; only the user positions learn."""
        super().freeze(frozen)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(not frozen and name not in self.backbone.frozen)

    def forward(
        self, batch: EventBatch, instructions: Sequence[str], owner: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `UserEncoder.forward`."""
        mask = with_start(batch.mask)
        states, cache = self.backbone(self._vectors(batch), mask, times=start_times(batch))
        x, seen = self._asked(instructions)
        made, _ = self.backbone(x, seen, cache[:, :, owner], cache_mask=mask[owner])
        return made[:, -self.config.tokens :], states

    def _vectors(self, batch: EventBatch) -> torch.Tensor:
        vectors = self.events(batch) * self.scale
        return torch.cat([self.start.expand(len(vectors), 1, -1), vectors], dim=1)

    def _asked(self, instructions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The LM's input about instructions `[Q, T + K, d]`, padded on the left, and its mask."""
        rows = []
        words = self.backbone.words([text[:INSTRUCTION_LENGTH] for text in instructions])
        for text, own in zip(instructions, words):
            found = self.mentions.find(text) if self.config.mentions else []
            if found:
                texts = self.text_encoder.vectors([self.vocabulary.item_texts[i - 1] for i in found]).to(own.device)
                items = self.events.catalogue(texts, torch.tensor(found, device=own.device) - 1)
                own = torch.cat([own, self.events.norm(items) * self.scale])
            rows.append(torch.cat([own, self._after, self.head.positions]))
        x, seen = padded([row.flip(0) for row in rows])
        return x.flip(1), seen.flip(1)

    def answer_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """`[len(texts), d]`: the LM's state at the end token behind each text alone, said as an answer is."""
        if not texts:
            return self.start.new_zeros(0, self.config.width)
        x, mask = padded(self.backbone.words([self.backbone.as_answer(text) for text in texts], end=True))
        states, _ = self.backbone(x, mask)
        return states[torch.arange(len(x), device=x.device), mask.sum(1) - 1]

    @torch.inference_mode()
    def instruct(self, instructions: Sequence[str]) -> list[InstructionState]:
        """The LM's input for each instruction, `[T + K, d]`: nothing more can be known before the user is."""
        if not instructions:
            return []
        x, seen = self._asked(instructions)
        return [InstructionState(own[mask].clone(), own.new_zeros(0)) for own, mask in zip(x, seen)]

    def _memory(self, states, mask, cache):
        return cache

    def _keep(self, cache, row: int, unused: int) -> list[torch.Tensor]:
        return []  # the memory is the cache

    def _continue(self, state: UserState, vectors: torch.Tensor, times: torch.Tensor):
        return self.backbone(vectors * self.scale, cache=state.memory[:, :, None], times=times)

    def _answer(self, states, asked, memory, mask):
        x, seen = padded([a.latents.flip(0) for a in asked])
        made, _ = self.backbone(x.flip(1), seen.flip(1), memory, cache_mask=mask)
        return made[:, -self.config.tokens :]


def _without_frozen(encoder: LLMUserEncoder, keys) -> None:
    """Weights that are never saved are not missing."""
    frozen = tuple(f"backbone.{name}" for name in encoder.backbone.frozen)
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(frozen)]


class UserPositions(nn.Module):
    """K learned vectors that stand behind the instruction; the LM's states there are the user tokens.

    They begin near the word at which the LM begins to answer, where its chat template says so.
    """

    def __init__(self, tokens: int, trunk: LLMTrunk, answering: torch.Tensor):
        super().__init__()
        words = trunk.some_words()
        first = answering[0] if len(answering) else words.mean(0)
        noise = torch.randn(tokens, words.shape[1]) * words.std()
        self.positions = nn.Parameter(first + noise * (0.3 if len(answering) else 1.0))
