"""Pre-training (UQABench's first stage): event encoders and backbone learn to foretell the next item.

`pretrain` trains on stretches of the histories it is given and keeps the state of the encoder that ranks the held-out
next items best. The head that makes tokens is not trained here.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad as pad_right
from torch.utils.data import Dataset
from transformers import Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from persona.encoders import UserEncoder
from persona.encoders.features import EventBatch, make_batch
from persona.encoders.hub import load_weights
from persona.errors import DataError
from persona.history import History
from persona.training.arguments import training_arguments
from persona.training.configs import PretrainingConfig
from persona.training.objectives import next_item_loss
from persona.training.processes import check_one_process
from persona.training.ranking import Held, ranking_values


@dataclass(frozen=True)
class Sequences:
    """Whole histories as tensors, made once; `Stretches` cuts pieces out of them."""

    events: list[EventBatch]
    """One batch of one history each, without the events that make no row."""

    @classmethod
    def of(cls, encoder: UserEncoder, histories: Sequence[History]) -> Sequences:
        """Raises `DataError` when no history has two rows."""
        rows = [encoder.rows(h.events) for h in histories]
        made = [make_batch([r], encoder.text_encoder) for r in rows if len(r) > 1]
        if not made:
            raise DataError("no history has two events; there is no next item to learn from")
        widest = max(b.attributes.shape[2] for b in made)
        return cls([replace(b, attributes=pad_right(b.attributes, (0, widest - b.attributes.shape[2]))) for b in made])


class Stretches(Dataset):
    """Stretch `i` is drawn from its own seed: a random place of a random history, each event as likely to be the last.

    Deterministic by index, so that a resumed run draws what an uninterrupted one would have drawn.
    """

    def __init__(self, sequences: Sequences, length: int, size: int, seed: int):
        self.sequences, self.length, self.size, self.seed = sequences.events, length, size, seed
        sizes = np.array([e.mask.shape[1] - 1 for e in self.sequences])
        self.ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> EventBatch:
        at = int(np.random.default_rng([self.seed, 4, index]).integers(self.ends[-1]))
        user = int(np.searchsorted(self.ends, at, side="right"))
        end = at - (self.ends[user - 1] if user else 0) + 2
        start = max(0, end - self.length)
        return EventBatch(**{f.name: getattr(self.sequences[user], f.name)[:, start:end] for f in fields(EventBatch)})


def pad(batches: Sequence[EventBatch]) -> EventBatch:
    """Batches of one history each, with equally many attributes, as one batch, padded on the right."""
    return EventBatch(
        **{
            f.name: nn.utils.rnn.pad_sequence([getattr(b, f.name)[0] for b in batches], batch_first=True)
            for f in fields(EventBatch)
        }
    )


class NextItemModel(nn.Module):
    """An encoder with the next-item loss, in the form that transformers' Trainer takes."""

    def __init__(self, encoder: UserEncoder, negatives: int, frequency: torch.Tensor):
        super().__init__()
        self.encoder, self.negatives = encoder, negatives
        texts = encoder.text_encoder.vectors(encoder.vocabulary.item_texts)
        self.register_buffer("texts", texts, persistent=False)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, events: EventBatch) -> dict[str, torch.Tensor]:
        """`{"loss": scalar}` of a batch of stretches."""
        events = events.to(self.encoder.device)
        states, _ = self.encoder.states(events)
        options = {"negatives": self.negatives, "frequency": self.frequency}
        return {"loss": next_item_loss(self.encoder, states, events, self.texts, **options)}


class NextItemTrainer(Trainer):
    """transformers' Trainer for a `NextItemModel`; evaluation ranks held-out next items among the catalogue."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        values = ranking_values(self.model.eval().encoder, self.eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": float(v.mean()) for name, v in values.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _prepare_inputs(self, inputs):
        return inputs

    def _save(self, output_dir: str | None = None, state_dict=None):
        self.accelerator.unwrap_model(self.model).encoder.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_weights((model or self.model).encoder, Path(resume_from_checkpoint) / "model.safetensors")

    def _load_best_model(self):
        load_weights(self.model.encoder, Path(self.state.best_model_checkpoint) / "model.safetensors")


def pretrain(
    encoder: UserEncoder,
    histories: Sequence[History],
    held: Held,
    config: PretrainingConfig,
    out: str | Path,
    *,
    steps: int | None = None,
    report_to: str = "none",
) -> UserEncoder:
    """Trains `encoder` on `histories` and saves its best state, by NDCG@10 on `held`, to `out`.

    A run that was stopped goes on from its newest checkpoint. Raises `DataError` when there is nothing to learn from,
    and `PersonaError` in several processes: the catalogue's softmax and the validation are of one.
    """
    check_one_process("pre-training")
    out, steps = Path(out), steps or config.steps
    set_seed(config.seed)
    sequences = Sequences.of(encoder, histories)
    frequency = torch.zeros(len(encoder.vocabulary.items))
    for events in sequences.events:
        frequency += torch.bincount(events.item[0], minlength=len(frequency) + 1)[1:]
    every = max(1, steps // config.evaluations)
    trainer = NextItemTrainer(
        model=NextItemModel(encoder, config.negatives, frequency.clamp(min=1e-3)).to(encoder.device),
        args=training_arguments(
            config,
            out,
            steps,
            config.batch_size,
            report_to,
            eval_strategy="steps",
            eval_steps=every,
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="ndcg@10",
            greater_is_better=True,
            logging_steps=every,
        ),
        train_dataset=Stretches(sequences, encoder.config.max_events, steps * config.batch_size, config.seed),
        data_collator=lambda batches: {"events": pad(batches)},
        eval_dataset=held,
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    encoder.eval().save_pretrained(out)
    record = {
        "steps": steps,
        "seconds": round(time.perf_counter() - start),
        "best_step": trainer.state.best_global_step,
        "best_ndcg@10": trainer.state.best_metric,
        "log": [
            {k: v for k, v in line.items() if k in ("step", "loss", "eval_ndcg@10")}
            for line in trainer.state.log_history
        ],
    }
    (out / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)
    return encoder
