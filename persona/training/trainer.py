"""Trainers for adapters on a frozen LLM, and `train_adapter`, which trains a `PersonalizedLM` for a domain."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from persona.encoders import TextEncoder, UserEncoder, Vocabulary, make_encoder
from persona.encoders.chunks import answers_in_chunks
from persona.errors import PersonaError
from persona.injection import PersonalizedLM, SoftPromptLM, load_llm
from persona.injection.llm import default_device
from persona.injection.soft_prompt_lm import IGNORE, SoftPromptBatch
from persona.training.arguments import training_arguments
from persona.training.configs import TrainingConfig
from persona.training.data import Collator, Examples, Pairs
from persona.training.objectives import matryoshka_contrastive_loss, next_item_loss
from persona.training.processes import (
    average_gradients,
    joined,
    mean_weight,
    own_share,
    process_count,
    process_number,
)
from persona.training.recipe import Domain
from persona.training.trained_on import write_trained_on


class AdapterTrainer(Trainer):
    """transformers' Trainer for a `SoftPromptLM` whose `forward` gives the answer loss; only its own weights are kept.

    The model has `save_pretrained(folder)` and `load_trained(folder)`, which takes back what was saved.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        loss = out["loss"] * mean_weight(answer_tokens(inputs["batch"]))
        return (loss, out) if return_outputs else loss

    def _prepare_inputs(self, inputs):
        return inputs  # the collator has put everything where the model is

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if self.args.should_save:  # what is saved is whole in every process, under FSDP too
            self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict=None):
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        (model or self.model).load_trained(Path(resume_from_checkpoint))


def answer_tokens(batch: SoftPromptBatch) -> torch.Tensor:
    """Tokens that the answer loss is the mean over."""
    return (batch.labels != IGNORE).sum()


class WithObjectives(nn.Module):
    """A `PersonalizedLM` whose `forward` gives the weighted sum of the objectives that a `TrainingConfig` turns on.

    Answer loss (autoregressive, through the frozen LLM), contrastive loss and next-item loss, all of the same batch.
    One module, since DDP finds the parameters that a step leaves out by what its `forward` returns.
    """

    def __init__(self, model: PersonalizedLM, objectives: TrainingConfig):
        super().__init__()
        self.model, self.objectives = model, objectives
        encoder = model.encoder
        self._texts = encoder.text_encoder.vectors(encoder.vocabulary.item_texts).to(encoder.device)

    def forward(
        self, pairs: Pairs | None = None, foretold: torch.Tensor | None = None, **inputs
    ) -> dict[str, torch.Tensor]:
        """`{"loss": scalar}` of what `Collator` makes."""
        config, encoder = self.objectives, self.model.encoder
        out = self.model(**inputs, chunk=config.contrastive_chunk)
        with torch.autocast(encoder.device.type, enabled=False):
            tokens, states = out["tokens"].float(), out["states"].float()
            loss = tokens.sum() * 0.0
            if config.answer_weight:
                loss = config.answer_weight * out["loss"].float() * mean_weight(answer_tokens(inputs["batch"]))
            if config.contrastive_weight:
                loss = loss + config.contrastive_weight * self._contrastive(encoder, tokens, pairs)
            if config.next_item_weight:
                events = inputs["events"]
                items = events.item > 0 if foretold is None else (events.item > 0) & foretold
                found = next_item_loss(encoder, states, events, self._texts, foretold=items)
                loss = loss + config.next_item_weight * found * mean_weight(items.sum())
        return {"loss": loss}

    def _contrastive(self, encoder: UserEncoder, tokens: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        config = self.objectives
        answers = (
            answers_in_chunks(encoder, pairs.answers, config.contrastive_chunk)
            if config.contrastive_chunk and pairs.answers
            else encoder.answer_vectors(pairs.answers)
        )
        return matryoshka_contrastive_loss(
            tokens[pairs.index, : pairs.count],
            answers,
            pairs.labels,
            (encoder.config.width, *config.contrastive_dims),
            temperature=config.temperature,
            margin=config.margin,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """See `PersonalizedLM`."""
        self.model.save_pretrained(folder)

    def load_trained(self, folder: Path) -> None:
        """See `PersonalizedLM`."""
        self.model.load_trained(folder)


class PersonaTrainer(AdapterTrainer):
    """Trains a `PersonalizedLM` with the objectives that a `TrainingConfig` turns on; see `WithObjectives`.

    FSDP shards the frozen LLM. What is trained is small: each process has all of it and averages its gradients.
    """

    def __init__(self, model: PersonalizedLM, *args, objectives: TrainingConfig, **kwargs):
        super().__init__(WithObjectives(model, objectives), *args, **kwargs)
        if self.is_fsdp_enabled and model.adapter.lora:
            raise PersonaError(
                "FSDP shards the LLM, of which training.lora_rank trains a part: use DDP, or set it to 0"
            )

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.is_fsdp_enabled:
            average_gradients(p for p in self.model.parameters() if p.requires_grad)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        return (out["loss"], out) if return_outputs else out["loss"]


def train_adapter(
    domain: Domain,
    llm: str | Path,
    out: str | Path,
    *,
    steps: int | None = None,
    without_history: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    report_to: str = "none",
    text_encoder: TextEncoder | None = None,
    pretrained: str | Path | None = None,
) -> PersonalizedLM:
    """Trains encoder and projector for `domain` on a frozen LLM and saves the adapter to `out`.

    `pretrained` is the folder of a pre-trained encoder to start from; see `persona.training.pretrain`. For `resume`
    and its error see `fit`. Raises `PersonaError` where `out` holds an adapter already and no unfinished run, unless
    `overwrite` says that it is to be replaced. Started by accelerate launch or torchrun, each process has its share of
    every batch, and all end with the same weights.
    """
    unfinished = refuse_unfinished(out, resume)
    if (Path(out) / "adapter_config.json").exists() and not unfinished and not overwrite:
        raise PersonaError(f"{out} holds an adapter already; give another --out, or --overwrite")
    recipe = domain.recipe
    config = recipe.training
    with joined():
        set_seed(config.seed)
        model = new_model(domain, llm, text_encoder, pretrained)
        if config.lora_rank:
            model.add_lora(config.lora_rank)
        steps = steps or config.steps
        Path(out).mkdir(parents=True, exist_ok=True)
        if process_number() == 0:
            write_trained_on(domain.fingerprints(domain.train), out)  # first, so that no finished weights are without
        fit(
            PersonaTrainer,
            model,
            Examples(domain, steps * config.histories_per_step, without_history=without_history),
            Collator(model, config),
            config,
            out,
            steps=steps,
            resume=resume,
            report_to=report_to,
            note={"without_history": without_history},
            objectives=replace(config, next_item_weight=0.0) if without_history or config.frozen_encoder else config,
        )
    return model


def refuse_unfinished(out: str | Path, resume: bool) -> str | None:
    """The newest checkpoint in `out`, if any; raises `PersonaError` when there is one and it is not to be resumed."""
    checkpoint = get_last_checkpoint(str(out)) if Path(out).is_dir() else None
    if checkpoint and not resume:
        raise PersonaError(f"{checkpoint} is of an unfinished run: go on with --resume, or remove it to start anew")
    return checkpoint


def fit(
    trainer: type[AdapterTrainer],
    model: SoftPromptLM,
    examples: Dataset,
    collate: Callable,
    config: TrainingConfig,
    out: str | Path,
    *,
    steps: int,
    resume: bool,
    report_to: str = "none",
    note: Mapping[str, object] | None = None,
    **options,
) -> None:
    """Trains what is trainable in `model` and saves it to `out`, with training.json, which also holds `note`.

    `resume` continues from the newest checkpoint in `out`, if there is one. Checkpoints are written four times a run
    and removed when it ends. Raises `PersonaError` when an unfinished run lies in `out` and is not to be resumed.
    """
    checkpoint = refuse_unfinished(out, resume)
    made = trainer(
        model=model,
        args=training_arguments(
            config,
            out,
            steps,
            own_share(config.histories_per_step),
            report_to,
            save_steps=max(1, steps // 4),
            save_total_limit=1,
            logging_steps=max(1, min(50, steps // 10)),
        ),
        train_dataset=examples,
        data_collator=collate,
        **options,
    )
    set_seed(config.seed + process_number())  # dropout of each process's own
    start = time.perf_counter()
    made.train(resume_from_checkpoint=checkpoint)
    model.eval()
    made.save_model(out)
    if process_number() == 0:
        record = {
            "steps": steps,
            "seconds": round(time.perf_counter() - start),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "processes": process_count(),
            "seed": config.seed,
            **(note or {}),
        }
        (Path(out) / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        for folder in Path(out).glob("checkpoint-*"):
            shutil.rmtree(folder)
    made.accelerator.wait_for_everyone()


def new_model(
    domain: Domain,
    llm: str | Path,
    text_encoder: TextEncoder | None = None,
    pretrained: str | Path | None = None,
) -> PersonalizedLM:
    """An untrained adapter on a frozen LLM, its vocabulary fitted on the training users; see `train_adapter`."""
    base, tokenizer = load_llm(llm)
    recipe = domain.recipe
    vocabulary = Vocabulary.fit((domain.histories[u] for u in domain.train), recipe.sources)
    encoder = make_encoder(recipe.encoder, vocabulary, text_encoder, llm)
    if pretrained:
        encoder.load_pretrained(pretrained)
    encoder.freeze(recipe.training.frozen_encoder)
    model = PersonalizedLM(
        base,
        tokenizer,
        encoder,
        base_model=str(llm),
        injection=recipe.injection.kind,
        cross_every=recipe.injection.every,
        domain=recipe.name,
    )
    return model.to(default_device())
