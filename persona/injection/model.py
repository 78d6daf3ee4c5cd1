"""`PersonalizedLM`: a frozen Hugging Face causal LM that reads user tokens, in its prompt or by cross-attention."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from persona.encoders import EncoderConfig, InstructionState, TextEncoder, UserEncoder, UserState
from persona.encoders.chunks import encode_in_chunks
from persona.encoders.features import EventBatch
from persona.encoders.hub import load_weights, push, read_config, resolve
from persona.errors import CheckpointError, MissingExtraError, PersonaError
from persona.history.source import STRICT
from persona.injection.llm import default_device, load_llm
from persona.injection.projector import Projector, mean_row_norm
from persona.injection.soft_prompt import Injection, Messages, Prompt, last_user_turn
from persona.injection.soft_prompt_lm import LORA_TARGETS, SoftPromptBatch, SoftPromptLM

LAYERS = "cross_attention.safetensors"
"""Where an adapter keeps its cross-attention layers."""


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter was trained for; saved as adapter_config.json."""

    __pydantic_config__ = STRICT

    base_model: str
    """Hub name of the LLM, or its folder: absolute in memory, relative to the adapter in the file."""
    llm_width: int
    """Hidden size of the LLM; another LLM's is refused."""
    width: int
    """d of the user encoder."""
    tokens: int
    """K of the user encoder."""
    injection: Injection = "soft_prompt"
    """How user tokens enter the LLM."""
    cross_every: int = 0
    """Cross-attention layers stand after blocks 0, n, 2n...; 0 where there are none."""
    layers_sha256: str = ""
    """Of cross_attention.safetensors, so that an LLM exported with other layers is not taken for this one's."""
    lora: bool = False
    """Whether a peft LoRA for the LLM lies in the folder `lora`."""
    domain: str = ""
    """Name of the recipe."""


class PersonalizedLM(SoftPromptLM):
    """User encoder + projector + frozen LLM, with an optional LoRA.

    `row_norm`, the scale of the soft rows, is measured on the LLM unless it is given, for weights that are loaded.
    """

    def __init__(
        self,
        llm: nn.Module,
        tokenizer,
        encoder: UserEncoder,
        *,
        base_model: str = "",
        injection: Injection = "soft_prompt",
        cross_every: int = 2,
        domain: str = "",
        row_norm: float | None = None,
    ):
        super().__init__(llm, tokenizer, injection, cross_every, scaled=row_norm is None)
        self.encoder = encoder
        width = llm.get_input_embeddings().weight.shape[1]
        norm = mean_row_norm(llm) if row_norm is None else row_norm
        own = encoder.config
        self.projector = Projector(
            own.width,
            width,
            norm,
            linear=own.head == "linear",
            residual=own.backbone == "llm" and own.width == width,  # the trunk's states are near the LLM's own words
        )
        name = base_model or getattr(llm.config, "_name_or_path", "")
        every = 0 if self.cross_attention is None else cross_every
        self.adapter = AdapterConfig(
            name, width, encoder.config.width, encoder.config.tokens, injection, every, domain=domain
        )

    def add_lora(self, rank: int, targets: Sequence[str] = LORA_TARGETS) -> None:
        """Adds a trainable peft LoRA on the LLM's attention projections."""
        super().add_lora(rank, targets)
        self.adapter = replace(self.adapter, lora=True)

    # --- training -----------------------------------------------------------------------------------------------

    def forward(
        self,
        events: EventBatch,
        instructions: Sequence[str],
        owner: torch.Tensor,
        batch: SoftPromptBatch | None,
        *,
        chunk: int = 0,
    ) -> dict[str, torch.Tensor]:
        """Answer-only loss, logits `[Q, answer_length + 1, vocab]`, user tokens `[Q, K, d]`, states `[B, 1 + N, d]`.

        Question q asks about history `owner[q]`. The prompts in `batch` say how many of the K tokens are used; without
        `batch` the LLM is not asked and there is neither loss nor logits. For `chunk` see `encode_in_chunks`.
        """
        asked = events, instructions, owner
        tokens, states = encode_in_chunks(self.encoder, *asked, chunk) if chunk else self.encoder(*asked)
        answered = {} if batch is None else self.answer_loss(self.projector(tokens), batch)
        return {**answered, "tokens": tokens, "states": states}

    # --- inference ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def soft_rows(
        self, states: Sequence[UserState], instructions: Sequence[str | InstructionState], count: int | None = None
    ) -> torch.Tensor:
        """User tokens as the LLM reads them, rows `[B, count, llm_width]` for (state, instruction) pairs."""
        tokens = self.encoder.tokens(states, instructions, count)
        return self.projector(torch.stack([t.tokens for t in tokens]))

    @property
    def embedding_bytes(self) -> int:
        """Bytes of one row of the LLM's input embeddings."""
        return self.adapter.llm_width * self.llm.get_input_embeddings().weight.element_size()

    @torch.inference_mode()
    def prompt_rows(self, prompt: Prompt, rows: torch.Tensor | None) -> torch.Tensor:
        """The whole prompt as embeddings `[L, llm_width]`, its soft positions holding `rows` `[count, llm_width]`.

        Raises `PersonaError` for an LLM loaded without weights whose embeddings were not found either, and for token
        ids that it does not have.
        """
        embeddings = self.llm.get_input_embeddings()
        if embeddings.weight.is_meta:
            raise PersonaError(f"{self.adapter.base_model} was loaded without its embeddings; only chats can be asked")
        ids = torch.tensor([i if token else 0 for i, token in zip(prompt.ids, prompt.is_token)], dtype=torch.long)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(embeddings.weight):
            raise PersonaError(f"the prompt holds a token id beyond the LLM's {len(embeddings.weight)}")
        embeds = embeddings(ids.to(embeddings.weight.device))
        if prompt.count:
            embeds[prompt.start : prompt.start + prompt.count] = rows.to(embeds)
        return embeds

    @torch.inference_mode()
    def generate(
        self,
        messages: Sequence[Messages],
        states: Sequence[UserState | None] | None = None,
        *,
        instructions: Sequence[str] | None = None,
        count: int | None = None,
        **kwargs,
    ) -> list[str]:
        """Answers, one for each of `messages`, in one batch; where there is no state the LLM answers plainly.

        `instructions` default to the last user turns; further arguments go to the LLM's own `generate`. Raises
        `PersonaError` for a single prompt in place of a list, and for another number of states or instructions.
        """
        if isinstance(messages, (str, Mapping)) or any(isinstance(m, Mapping) for m in messages):
            raise PersonaError("messages is a list of prompts, each a text or a list of chat messages; make it one")
        for name, those in (("states", states), ("instructions", instructions)):
            if isinstance(those, str) or (those is not None and len(those) != len(messages)):
                raise PersonaError(f"{name} is a list with one for each of the {len(messages)} messages")
        if not messages:
            return []
        states = states if states is not None else [None] * len(messages)
        instructions = instructions if instructions is not None else [last_user_turn(m) for m in messages]
        known = [i for i, s in enumerate(states) if s is not None]
        rows = self.soft_rows([states[i] for i in known], [instructions[i] for i in known], count) if known else None
        size = rows.shape[1] if known else 0
        return self.complete(
            [self.template.prompt(m, size if s is not None else 0) for m, s in zip(messages, states)],
            rows.flatten(0, 1) if known else None,
            **kwargs,
        )

    # --- files --------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes adapter_config.json, `encoder/`, projector.safetensors and, if there are any, cross-attention layers
        (cross_attention.safetensors) and a LoRA (`lora/`)."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.cross_attention is not None:
            layers = folder / LAYERS
            save_file(self.cross_attention.layers.state_dict(), layers)
            self.adapter = replace(self.adapter, layers_sha256=hashlib.sha256(layers.read_bytes()).hexdigest())
        saved = asdict(self.adapter)
        if Path(saved["base_model"]).is_dir():  # relative to the adapter, so that the two can be moved together
            saved["base_model"] = Path(os.path.relpath(saved["base_model"], folder)).as_posix()
        (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2) + "\n")
        self.encoder.save_pretrained(folder / "encoder")
        save_file(self.projector.state_dict(), folder / "projector.safetensors")
        if self.adapter.lora:
            self.llm.save_pretrained(folder / "lora")
        return folder

    def load_trained(self, folder: Path) -> None:
        """Takes back the weights that `save_pretrained` wrote, into a model of the same shape."""
        load_weights(self.encoder, folder / "encoder" / "model.safetensors")
        load_weights(self.projector, folder / "projector.safetensors")
        if self.cross_attention is not None:
            load_weights(self.cross_attention.layers, folder / LAYERS)
        if self.adapter.lora:
            self.load_lora(folder / "lora")

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        llm: str | Path | None = None,
        *,
        llm_weights: bool = True,
        device: str | None = None,
        text_encoder: TextEncoder | None = None,
        **kwargs,
    ) -> PersonalizedLM:
        """Loads an adapter folder or hub name, and its LLM (`llm` overrides the recorded name).

        Without `llm_weights` the LLM is an empty shell, for an engine that holds the weights itself: user tokens and
        prompts are made as ever, but the model cannot answer. `device` defaults to the GPU if there is one,
        `text_encoder` to the one that the adapter names. Further arguments go to
        `AutoModelForCausalLM.from_pretrained`. Raises `CheckpointError` when a file is missing or corrupt, or when the
        LLM's width is not the one the adapter was trained for.
        """
        folder = resolve(adapter)
        config = read_config(AdapterConfig, folder / "adapter_config.json")
        name = str(llm) if llm else base_model_path(folder, config)
        base, tokenizer = load_llm(name, weights=llm_weights, **kwargs)
        width = base.get_input_embeddings().weight.shape[1]
        if width != config.llm_width:
            raise CheckpointError(
                f"{folder} was trained for an LLM of width {config.llm_width} ({config.base_model}); "
                f"{name} is {width} wide. Train an adapter for it with `persona train`"
            )
        # An encoder on the very LLM that it is for goes with it, wherever that is now.
        own = read_config(EncoderConfig, folder / "encoder" / "config.json").llm
        same = own and (
            own == config.base_model or _place(folder / "encoder", own) == _place(folder, config.base_model)
        )
        encoder = UserEncoder.from_pretrained(folder / "encoder", text_encoder, name if same else None)
        model = cls(
            base,
            tokenizer,
            encoder,
            injection=config.injection,
            cross_every=config.cross_every or 2,
            domain=config.domain,
            row_norm=1.0,  # the true one is with the weights
        )
        load_weights(model.projector, folder / "projector.safetensors")
        if model.cross_attention is not None:
            load_weights(model.cross_attention.layers, folder / LAYERS)
        if config.lora and llm_weights:
            try:
                from peft import PeftModel
            except ImportError as error:
                raise MissingExtraError("this adapter has a LoRA: pip install 'persona[train]'") from error
            model.llm = PeftModel.from_pretrained(model.llm, folder / "lora")
        model.adapter = replace(config, base_model=name)
        device = device or default_device()
        for part in (model.encoder, model.projector, model.cross_attention, *([model.llm] if llm_weights else [])):
            if part is not None:
                part.to(device)
        return model.eval()

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Uploads what `save_pretrained` writes; returns the URL. Raises `CheckpointError`; see `UserEncoder`."""
        self.encoder.check_public()
        return push(self, repo_id, **kwargs)


def _place(folder: Path, name: str) -> str:
    """A folder that is named relative to another, whether or not it is there."""
    return os.path.normpath(folder / name)


def base_model_path(adapter: Path, config: AdapterConfig) -> str:
    """The LLM recorded in an adapter: a folder relative to the adapter's, or a hub name."""
    beside = adapter / config.base_model
    return str(beside.resolve()) if config.base_model and beside.is_dir() else config.base_model
