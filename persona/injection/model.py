"""`PersonalizedLM`: a frozen Hugging Face causal LM that reads user tokens as soft prompt rows."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from persona.encoders import InstructionState, TextEncoder, UserEncoder, UserState
from persona.encoders.features import EventBatch
from persona.encoders.hub import load_weights, push, read_config, resolve
from persona.errors import CheckpointError, MissingExtraError, PersonaError
from persona.history.source import STRICT
from persona.injection.projector import Projector, mean_row_norm
from persona.injection.soft_prompt import Messages, Prompt, PromptTemplate, last_user_turn

IGNORE = -100
_EMBEDDINGS = "embed_tokens.weight"


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
    injection: str = "soft_prompt"
    """How user tokens enter the LLM."""
    lora: bool = False
    """Whether a peft LoRA for the LLM lies in the folder `lora`."""
    domain: str = ""
    """Name of the recipe."""


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


class PersonalizedLM(nn.Module):
    """User encoder + projector + frozen LLM, with an optional LoRA.

    `row_norm`, the scale of the soft rows, is measured on the LLM unless it is given.
    """

    def __init__(
        self,
        llm: nn.Module,
        tokenizer,
        encoder: UserEncoder,
        *,
        base_model: str = "",
        domain: str = "",
        row_norm: float | None = None,
    ):
        super().__init__()
        self.llm = llm.requires_grad_(False)
        self.encoder = encoder
        self.template = PromptTemplate(tokenizer)
        width = llm.get_input_embeddings().weight.shape[1]
        norm = mean_row_norm(llm) if row_norm is None else row_norm
        self.projector = Projector(encoder.config.width, width, norm, linear=encoder.config.head == "linear")
        name = base_model or getattr(llm.config, "_name_or_path", "")
        self.adapter = AdapterConfig(name, width, encoder.config.width, encoder.config.tokens, domain=domain)

    def train(self, mode: bool = True):
        """Dropout of the encoder follows `mode`; the frozen LLM stays in evaluation mode."""
        super().train(mode)
        self.llm.train(False)
        return self

    def add_lora(self, rank: int) -> None:
        """Adds a trainable peft LoRA on the LLM's attention projections."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise MissingExtraError("LoRA needs peft: pip install 'persona[train]'") from error
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        self.llm = get_peft_model(self.llm, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        self.adapter = replace(self.adapter, lora=True)

    # --- training -----------------------------------------------------------------------------------------------

    def forward(
        self, events: EventBatch, instructions: Sequence[str], owner: torch.Tensor, batch: SoftPromptBatch
    ) -> dict[str, torch.Tensor]:
        """Answer-only loss, logits `[Q, answer_length + 1, vocab]`, and the histories' states `[B, 1 + N, d]`.

        Question q asks about history `owner[q]`. The soft positions in `batch` say how many of the K tokens are used.
        """
        states, mask = self.encoder.states(events)
        rows = self.projector(self.encoder.resample(states[owner], mask[owner], instructions))
        return {**self.answer_loss(rows, batch), "states": states}

    def answer_loss(self, rows: torch.Tensor, batch: SoftPromptBatch) -> dict[str, torch.Tensor]:
        """Mean cross-entropy of the answer tokens given soft rows `[Q, K, llm_width]`."""
        logits = self.logits(rows, batch, keep=batch.answer_length + 1)
        labels = batch.labels[:, -batch.answer_length :]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        return {"loss": loss, "logits": logits}

    def logits(self, rows: torch.Tensor | None, batch: SoftPromptBatch, keep: int = 1) -> torch.Tensor:
        """The LLM's logits at the last `keep` positions, `[B, keep, vocab]`; see `embed` for `rows`."""
        return self.llm(
            inputs_embeds=self.embed(rows, batch),
            attention_mask=batch.attention_mask,
            position_ids=(batch.attention_mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=keep,
            use_cache=False,
        ).logits

    def embed(self, rows: torch.Tensor | None, batch: SoftPromptBatch) -> torch.Tensor:
        """The LLM's input `[B, L, llm_width]`: its own embeddings with soft rows spliced in.

        `rows` is `[B, K, llm_width]`, of which each prompt takes its first `count`, or `[S, llm_width]`, one row for
        each soft position of the batch in order.
        """
        embeds = self.llm.get_input_embeddings()(batch.input_ids)
        counts = batch.soft.sum(1).tolist()
        if rows is not None and rows.dim() == 3:
            rows = torch.cat([r[:count] for r, count in zip(rows, counts)])
        found = 0 if rows is None else len(rows)
        if found != sum(counts):
            raise PersonaError(f"the prompts have room for {sum(counts)} soft rows, but there are {found}")
        if not found:
            return embeds
        return embeds.masked_scatter(batch.soft[..., None], rows.to(embeds.dtype))

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
        device = self.projector.row_norm.device
        return SoftPromptBatch(
            ids.to(device),
            attention.to(device),
            soft.to(device),
            labels.to(device),
            max((len(a) for a in answers), default=0),
        )

    # --- inference ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def soft_rows(
        self, states: Sequence[UserState], instructions: Sequence[str | InstructionState], count: int | None = None
    ) -> torch.Tensor:
        """Soft prompt rows `[B, count, llm_width]` for (state, instruction) pairs."""
        tokens = self.encoder.tokens(states, instructions, count)
        return self.projector(torch.stack([t.tokens for t in tokens]))

    @property
    def embedding_bytes(self) -> int:
        """Bytes of one row of the LLM's input embeddings."""
        return self.adapter.llm_width * self.llm.get_input_embeddings().weight.element_size()

    @torch.inference_mode()
    def prompt_rows(self, prompt: Prompt, rows: torch.Tensor | None) -> torch.Tensor:
        """The whole prompt as embeddings `[L, llm_width]`, its soft positions holding `rows` `[count, llm_width]`.

        Raises `PersonaError` for an LLM loaded without weights whose embeddings were not found either.
        """
        embeddings = self.llm.get_input_embeddings()
        if embeddings.weight.is_meta:
            raise PersonaError(f"{self.adapter.base_model} was loaded without its embeddings; only chats can be asked")
        ids = torch.tensor([i if token else 0 for i, token in zip(prompt.ids, prompt.is_token)])
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

        `instructions` default to the last user turns; further arguments go to the LLM's own `generate`.
        """
        if not messages:
            return []
        states = states if states is not None else [None] * len(messages)
        instructions = instructions or [last_user_turn(m) for m in messages]
        known = [i for i, s in enumerate(states) if s is not None]
        rows = self.soft_rows([states[i] for i in known], [instructions[i] for i in known], count) if known else None
        size = rows.shape[1] if known else 0
        return self.complete(
            [self.template.prompt(m, size if s is not None else 0) for m, s in zip(messages, states)],
            rows.flatten(0, 1) if known else None,
            **kwargs,
        )

    @torch.inference_mode()
    def complete(self, prompts: Sequence[Prompt], rows: torch.Tensor | None, **kwargs) -> list[str]:
        """Greedy completions of prompts whose soft positions hold `rows` `[S, llm_width]`, in order.

        Raises `PersonaError` if the LLM was loaded without its weights.
        """
        if any(p.is_meta for p in self.llm.parameters()):
            raise PersonaError("the LLM was loaded without its weights, so it cannot answer; wrap() one that can")
        batch = self.collate(prompts)
        out = self.llm.generate(
            inputs_embeds=self.embed(rows, batch),
            attention_mask=batch.attention_mask,
            **{"do_sample": False, "max_new_tokens": 32, **kwargs},
        )
        texts = self.template.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [text.rstrip("\ufffd").strip() for text in texts]  # half a character at the end, which vLLM drops too

    # --- files --------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes adapter_config.json, `encoder/`, projector.safetensors and, if there is one, `lora/`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        saved = asdict(self.adapter)
        if Path(saved["base_model"]).is_dir():  # relative to the adapter, so that the two can be moved together
            saved["base_model"] = Path(os.path.relpath(saved["base_model"], folder)).as_posix()
        (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2) + "\n")
        self.encoder.save_pretrained(folder / "encoder")
        save_file(self.projector.state_dict(), folder / "projector.safetensors")
        if self.adapter.lora:
            self.llm.save_pretrained(folder / "lora")
        return folder

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
        encoder = UserEncoder.from_pretrained(folder / "encoder", text_encoder)
        model = cls(base, tokenizer, encoder, domain=config.domain, row_norm=1.0)  # the true one is with the weights
        load_weights(model.projector, folder / "projector.safetensors")
        if config.lora and llm_weights:
            try:
                from peft import PeftModel
            except ImportError as error:
                raise MissingExtraError("this adapter has a LoRA: pip install 'persona[train]'") from error
            model.llm = PeftModel.from_pretrained(model.llm, folder / "lora")
        model.adapter = replace(config, base_model=name)
        device = device or default_device()
        for part in (model.encoder, model.projector, *([model.llm] if llm_weights else [])):
            part.to(device)
        return model.eval()

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Uploads what `save_pretrained` writes; returns the URL."""
        return push(self, repo_id, **kwargs)


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def base_model_path(adapter: Path, config: AdapterConfig) -> str:
    """The LLM recorded in an adapter: a folder relative to the adapter's, or a hub name."""
    beside = adapter / config.base_model
    return str(beside.resolve()) if config.base_model and beside.is_dir() else config.base_model


def load_llm(name: str | Path, *, weights: bool = True, **kwargs):
    """A causal LM and its tokenizer by name or path, in float32 unless told. Raises `CheckpointError`.

    Without `weights` the LLM's parameters have shapes but no storage (torch's meta device), except for its input
    embeddings, which are mapped from the file and cost memory only where they are read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if weights:
            llm = AutoModelForCausalLM.from_pretrained(name, **{"dtype": torch.float32, **kwargs})
        else:
            with torch.device("meta"):
                llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
            _map_embeddings(llm, name)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the LLM {str(name)!r} cannot be loaded: {error}") from error
    return llm.eval(), tokenizer


def _map_embeddings(llm: nn.Module, name: str | Path) -> None:
    """Gives a shell its input embeddings, memory-mapped, if they lie in a safetensors file under the usual name."""
    for file in ("model.safetensors.index.json", "model.safetensors"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path and file.endswith(".json"):
            shards = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
            found = [shards[key] for key in shards if key.endswith(_EMBEDDINGS)]
            path = found and cached_file(name, found[0])
        if path:
            break
    else:
        return
    with safe_open(path, "pt") as weights:
        keys = [key for key in weights.keys() if key.endswith(_EMBEDDINGS)]  # noqa: SIM118
        if not keys:
            return
        embeddings = llm.get_input_embeddings()
        embeddings.weight = nn.Parameter(weights.get_tensor(keys[0]), requires_grad=False)
    if hasattr(embeddings, "scalar_embed_scale"):  # Gemma's, which lies in a buffer
        embeddings.embed_scale = torch.tensor(embeddings.scalar_embed_scale)
