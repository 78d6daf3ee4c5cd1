"""`LLMTrunk`: a small causal LM as a sequence backbone, which reads vectors and words and keeps its key-value cache.

It is called as the backbones of `persona.encoders.backbones` are; its cache is one tensor, `[layers, 2, B, heads, N,
d / heads]`, of which a part for each row can be taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from persona.errors import CheckpointError, MissingExtraError, RecipeError

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
READING = b"texts within a sentence, a column's value alone"
"""How texts become words. Give it another value when that changes, so that encoders of before are refused."""
_SAID = "\u2063said\u2063"
"""Stands for what a user says while a chat template is cut in two."""


class LLMTrunk(nn.Module):
    """The decoder of a Hugging Face causal LM, without its LM head, with LoRA or trained whole."""

    def __init__(self, name: str | Path, lora_rank: int):
        """With `lora_rank` 0 all of it is trained but its word embeddings. Raises `CheckpointError`, `RecipeError`."""
        super().__init__()
        if not name:
            raise RecipeError("encoder.backbone is llm: name the trunk as encoder.llm, a Hugging Face name or a folder")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            llm = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).base_model
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the encoder's LLM {str(name)!r} cannot be loaded: {error}") from error
        if self.tokenizer.eos_token_id is None:
            raise CheckpointError(f"the tokenizer of {name} has no end token; an answer's vector is read at it")
        if lora_rank:
            try:
                from peft import LoraConfig, inject_adapter_in_model
            except ImportError as error:
                raise MissingExtraError("LoRA needs peft: pip install 'persona[train]'") from error
            llm.requires_grad_(False)
            config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=list(LORA_TARGETS))
            try:
                llm = inject_adapter_in_model(config, llm)
            except ValueError as error:
                raise CheckpointError(f"{name} cannot have a LoRA on {', '.join(LORA_TARGETS)}: {error}") from error
        llm.get_input_embeddings().requires_grad_(False)
        self.llm = llm
        self.frozen = tuple(name for name, p in self.named_parameters() if not p.requires_grad)
        """Names of the parameters that are never trained, nor saved with an encoder."""

    @property
    def width(self) -> int:
        """Hidden size."""
        return self.llm.get_input_embeddings().weight.shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the word embeddings, which are never trained, and of how texts are read, which may change."""
        weight = self.llm.get_input_embeddings().weight.detach().float().cpu().contiguous()
        return hashlib.sha256(READING + weight.numpy().tobytes()).hexdigest()

    @torch.no_grad()
    def some_words(self) -> torch.Tensor:
        """Rows of the LM's input as its embedding layer puts them out, `[at most 8192, d]`."""
        embed = self.llm.get_input_embeddings()
        return embed(torch.arange(min(8192, len(embed.weight)), device=embed.weight.device))

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        cache_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States `[B, L, d]` of the vectors `x`, which go on from `cache`, and the cache with them.

        `mask` `[B, L]` and `cache_mask` `[B, N]` are True at real positions; None: all are. Padding may stand on
        either side of `x`: positions are counted over what is real. `times` is not read: event vectors tell the time.
        """
        size, length = x.shape[:2]
        past = 0 if cache is None else cache.shape[4]
        ones = x.new_ones(size, max(past, length), dtype=torch.bool)
        known = torch.cat(
            [
                ones[:, :past] if cache_mask is None else cache_mask,
                ones[:, :length] if mask is None else mask,
            ],
            dim=1,
        )
        positions = (known.cumsum(1) - 1).clamp(min=0)
        causal = torch.ones(length, past + length, dtype=torch.bool, device=x.device).tril(past)
        mask = (known[:, None] & causal)[:, None]
        kept = DynamicCache()
        for layer in range(0 if cache is None else len(cache)):
            kept.update(cache[layer, 0], cache[layer, 1], layer)
        out = self.llm(
            inputs_embeds=x,
            attention_mask=self._windowed(mask, positions, past),
            position_ids=positions[:, past:],
            past_key_values=kept,
            use_cache=True,
        )
        made = torch.stack([torch.stack([layer.keys, layer.values]) for layer in kept.layers])
        return out.last_hidden_state, made

    def _windowed(self, mask: torch.Tensor, positions: torch.Tensor, past: int):
        """The mask that the LM's layers take: of its sliding window, if it has one, or one for each kind of layer."""
        config = self.llm.config
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or ()
        if not window or (kinds and "sliding_attention" not in kinds):
            return mask
        near = positions[:, past:, None] - positions[:, None] < window
        sliding = mask & near[:, None]
        return {"full_attention": mask, "sliding_attention": sliding} if kinds else sliding

    def within(self, text: str) -> str:
        """The text as it stands in a sentence: behind a space, which some tokenizers add themselves."""
        return text if self._adds_space else f" {text}"

    def as_answer(self, text: str) -> str:
        """The text as it stands where the LM answers: as its chat template has it, or as in a sentence without one."""
        if not self.tokenizer.chat_template:
            return self.within(text)
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
        before = self.tokenizer.apply_chat_template(said, tokenize=False).partition(_SAID)[0]
        return self.within(text) if before.endswith(" ") else text

    @cached_property
    def _adds_space(self) -> bool:
        return self.tokenizer.tokenize("a") != ["a"]

    @property
    def frame(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The words of the LM's chat template before and after what a user says, `[T, d]` each; none without one."""
        if not self.tokenizer.chat_template:
            return tuple(self.words(["", ""]))
        said = [{"role": "user", "content": _SAID}]
        text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(_SAID)
        return tuple(self.words([before, after]))

    def words(self, texts: Sequence[str], *, end: bool = False) -> list[torch.Tensor]:
        """Embeddings `[T, d]` of each text's tokens, with the end token after them if asked."""
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        last = [self.tokenizer.eos_token_id] if end else []
        embed = self.llm.get_input_embeddings()
        return [embed(torch.tensor(i + last, dtype=torch.long, device=embed.weight.device)) for i in ids]
