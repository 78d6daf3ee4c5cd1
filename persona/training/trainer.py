"""`PersonaTrainer`: transformers' Trainer for a `PersonalizedLM`; only the adapter is trained, saved and resumed."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path

from transformers import Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from persona.encoders import TextEncoder, UserEncoder, Vocabulary
from persona.encoders.hub import load_weights
from persona.errors import PersonaError
from persona.injection import PersonalizedLM, load_llm
from persona.injection.model import default_device
from persona.training.arguments import training_arguments
from persona.training.data import Collator, Examples
from persona.training.objectives import next_item_loss
from persona.training.recipe import Domain, write_trained_on


class PersonaTrainer(Trainer):
    """Answer loss, plus `next_item_weight` x next-item loss on the states of the same batch."""

    def __init__(self, *args, next_item_weight: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.next_item_weight = next_item_weight
        encoder = self.model.encoder
        self._texts = encoder.text_encoder.vectors(encoder.vocabulary.item_texts).to(encoder.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        loss = out["loss"]
        if self.next_item_weight:
            encoder = self.accelerator.unwrap_model(model).encoder
            loss = loss + self.next_item_weight * next_item_loss(encoder, out["states"], inputs["events"], self._texts)
        return (loss, out) if return_outputs else loss

    def _prepare_inputs(self, inputs):
        return inputs  # the collator has put everything where the model is

    def _save(self, output_dir: str | None = None, state_dict=None):
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model, folder = model or self.model, Path(resume_from_checkpoint)
        load_weights(model.encoder, folder / "encoder" / "model.safetensors")
        load_weights(model.projector, folder / "projector.safetensors")
        if model.adapter.lora:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(model.llm, load_peft_weights(str(folder / "lora")))


def train_adapter(
    domain: Domain,
    llm: str | Path,
    out: str | Path,
    *,
    steps: int | None = None,
    without_history: bool = False,
    resume: bool = False,
    report_to: str = "none",
    text_encoder: TextEncoder | None = None,
    pretrained: str | Path | None = None,
) -> PersonalizedLM:
    """Trains encoder and projector for `domain` on a frozen LLM and saves the adapter to `out`.

    `pretrained` is the folder of a pre-trained encoder to start from; see `persona.training.pretrain`.

    `resume` continues from the newest checkpoint in `out`, if there is one. Checkpoints are written four times a run
    and removed when it ends. Raises `PersonaError` when an unfinished run lies in `out` and is not to be resumed.
    """
    checkpoint = get_last_checkpoint(str(out)) if Path(out).is_dir() else None
    if checkpoint and not resume:
        raise PersonaError(f"{checkpoint} is of an unfinished run: go on with --resume, or remove it to start anew")
    recipe = domain.recipe
    config = recipe.training
    set_seed(config.seed)
    model = new_model(domain, llm, text_encoder, pretrained)
    if config.lora_rank:
        model.add_lora(config.lora_rank)
    steps = steps or config.steps
    trainer = PersonaTrainer(
        model=model,
        args=training_arguments(
            config,
            out,
            steps,
            config.histories_per_step,
            report_to,
            save_steps=max(1, steps // 4),
            save_total_limit=1,
            logging_steps=max(1, min(50, steps // 10)),
        ),
        train_dataset=Examples(domain, steps * config.histories_per_step, without_history=without_history),
        data_collator=Collator(model, config.seed),
        next_item_weight=0.0 if without_history or config.frozen_encoder else config.next_item_weight,
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    model.save_pretrained(out)
    record = {
        "steps": steps,
        "seconds": round(time.perf_counter() - start),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seed": config.seed,
        "without_history": without_history,
    }
    (Path(out) / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    write_trained_on(domain, out)
    for folder in Path(out).glob("checkpoint-*"):
        shutil.rmtree(folder)
    return model.eval()


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
    encoder = UserEncoder(recipe.encoder, vocabulary, text_encoder)
    if pretrained:
        encoder.load_pretrained(pretrained)
    encoder.freeze(recipe.training.frozen_encoder)
    model = PersonalizedLM(base, tokenizer, encoder, base_model=str(llm), domain=recipe.name)
    return model.to(default_device())
