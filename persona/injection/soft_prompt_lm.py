"""`SoftPromptLM`: a frozen Hugging Face causal LM that takes vectors beside text, wherever these come from.

They are rows of the prompt, or the memory of cross-attention layers; `PromptTemplate.injection` says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from persona.errors import MissingExtraError, PersonaError
from persona.injection.cross_attention import CrossAttention
from persona.injection.soft_prompt import Injection, Prompt, PromptTemplate

IGNORE = -100
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class SoftPromptBatch:
    """Left-padded prompts, with answers when training."""

    input_ids: torch.Tensor
    """`[B, L]`; 0 at soft positions and padding."""
    attention_mask: torch.Tensor
    """`[B, L]`."""
    soft: torch.Tensor
    """`[B, L]` True at soft positions."""
    labels: torch.Tensor | None = None
    """`[B, L]` answer tokens, -100 elsewhere."""
    answer_length: int = 0
    """Longest answer in tokens: only so many logits are computed."""
    users: tuple[int, ...] = ()
    """User tokens of each prompt."""


class SoftPromptLM(nn.Module):
    """A frozen LLM and its prompt template, with an optional LoRA; what makes the soft rows is a subclass's.

    With the injection "cross_attention" or "both" it has trainable layers after every `cross_every`-th block; for
    `scaled` see `CrossAttention`.
    """

    def __init__(
        self,
        llm: nn.Module,
        tokenizer,
        injection: Injection = "soft_prompt",
        cross_every: int = 2,
        *,
        scaled: bool = True,
    ):
        super().__init__()
        self.template = PromptTemplate(tokenizer, injection)
        self.llm = llm.requires_grad_(False)
        self.cross_attention = None if injection == "soft_prompt" else CrossAttention(llm, cross_every, scaled=scaled)

    def train(self, mode: bool = True):
        """Dropout of what is trained follows `mode`; the frozen LLM stays in evaluation mode."""
        super().train(mode)
        self.llm.train(False)
        return self

    def add_lora(self, rank: int, targets: Sequence[str] = LORA_TARGETS) -> None:
        """Adds a trainable peft LoRA on the LLM's attention projections."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise MissingExtraError("LoRA needs peft: pip install 'persona[train]'") from error
        self.llm = get_peft_model(self.llm, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)))

    def load_lora(self, folder: Path) -> None:
        """Takes back the weights of a LoRA that lies in `folder`."""
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(self.llm, load_peft_weights(str(folder)))

    def answer_loss(self, rows: torch.Tensor | None, batch: SoftPromptBatch) -> dict[str, torch.Tensor]:
        """Mean cross-entropy of the answer tokens given soft rows `[Q, K, llm_width]`, or none."""
        logits = self.logits(rows, batch, keep=batch.answer_length + 1)
        labels = batch.labels[:, -batch.answer_length :]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        return {"loss": loss, "logits": logits}

    def logits(self, rows: torch.Tensor | None, batch: SoftPromptBatch, keep: int = 1) -> torch.Tensor:
        """The LLM's logits at the last `keep` positions, `[B, keep, vocab]`.

        `rows` is `[B, K, llm_width]`, of which each prompt takes its first so many, or `[S, llm_width]`, the rows of
        all prompts in order. Raises `PersonaError` where their number is not what the prompts have room for.
        """
        with self.injected(rows, batch) as embeds:
            return self.llm(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask,
                position_ids=(batch.attention_mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=keep,
                use_cache=False,
            ).logits

    @contextmanager
    def injected(self, rows: torch.Tensor | None, batch: SoftPromptBatch) -> Iterator[torch.Tensor]:
        """Gives the LLM's input `[B, L, llm_width]`; within, the LLM reads the prompts' memory. See `logits`."""
        rows = self._flat(rows, batch)
        embeds = self.embed(rows, batch)
        if self.cross_attention is None:
            yield embeds
            return
        memory = mask = None
        if rows is not None:
            memory = pad_sequence(rows.split(batch.users), batch_first=True)  # [B, K, llm_width]
            users = torch.tensor(batch.users, device=rows.device)[:, None]
            # Who has no user tokens reads zeros, which add nothing; a softmax over nothing would be NaN.
            mask = (torch.arange(memory.shape[1], device=rows.device) < users) | (users == 0)
        with self.cross_attention.reading(memory, mask):
            yield embeds

    def embed(self, rows: torch.Tensor | None, batch: SoftPromptBatch) -> torch.Tensor:
        """The LLM's input `[B, L, llm_width]`: its own embeddings and the soft rows, if any; see `logits`."""
        rows = self._flat(rows, batch)
        embeds = self.llm.get_input_embeddings()(batch.input_ids)
        return embeds.masked_scatter(batch.soft[..., None], rows.to(embeds.dtype)) if batch.soft.any() else embeds

    def _flat(self, rows: torch.Tensor | None, batch: SoftPromptBatch) -> torch.Tensor | None:
        """Rows `[S, llm_width]` of all prompts in order, None where there are none."""
        if rows is not None and rows.dim() == 3:
            rows = torch.cat([r[:count] for r, count in zip(rows, batch.users)])
        found, room = 0 if rows is None else len(rows), sum(batch.users)
        if found != room:
            raise PersonaError(f"the prompts have room for {room} user tokens, but there are {found}")
        return rows if found else None

    def collate(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]] | None = None) -> SoftPromptBatch:
        """Pads prompts, and answers after them, on the left, so that all answers end in the last column."""
        answers = answers if answers is not None else [()] * len(prompts)
        length = max(len(p.ids) + len(a) for p, a in zip(prompts, answers))
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        attention, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
        soft = torch.zeros(ids.shape, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(zip(prompts, answers)):
            at = length - len(prompt.ids) - len(answer)
            ids[i, at:] = torch.tensor([*prompt.ids, *answer])
            attention[i, at:] = 1
            soft[i, at + prompt.start : at + prompt.start + prompt.count] = True
            if answer:
                labels[i, -len(answer) :] = torch.tensor(answer)
        ids[soft] = 0
        device = self.llm.get_input_embeddings().weight.device
        return SoftPromptBatch(
            ids.to(device),
            attention.to(device),
            soft.to(device),
            labels.to(device),
            max((len(a) for a in answers), default=0),
            tuple(p.users for p in prompts),
        )

    @torch.inference_mode()
    def complete(self, prompts: Sequence[Prompt], rows: torch.Tensor | None, **kwargs) -> list[str]:
        """Greedy completions of prompts with the user tokens `rows` `[S, llm_width]`, in order.

        Raises `PersonaError` if the LLM was loaded without its weights.
        """
        if any(p.is_meta for p in self.llm.parameters()):
            raise PersonaError("the LLM was loaded without its weights, so it cannot answer; wrap() one that can")
        batch = self.collate(prompts)
        with self.injected(rows, batch) as embeds:
            out = self.llm.generate(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask,
                **{"do_sample": False, "max_new_tokens": 32, **kwargs},
            )
        texts = self.template.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [text.rstrip("\ufffd").strip() for text in texts]  # half a character at the end, which vLLM drops too
