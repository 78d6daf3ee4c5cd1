"""A recipe's settings as transformers' `TrainingArguments`, for pre-training and for training an adapter."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from persona.training.configs import PretrainingConfig, TrainingConfig
from persona.training.hardware import precision


def training_arguments(
    config: TrainingConfig | PretrainingConfig, out: str | Path, steps: int, batch_size: int, report_to: str, **more
) -> TrainingArguments:
    """AdamW with warm-up and cosine decay, on what this machine has; `more` adds to it or overrides it."""
    return TrainingArguments(
        **{
            "output_dir": str(out),
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": config.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": min(config.warmup_steps, steps // 5),
            "weight_decay": config.weight_decay,
            "adam_beta2": 0.98,
            "max_grad_norm": 1.0,
            **precision(),
            "report_to": report_to,
            "seed": config.seed,
            "data_seed": config.seed,  # else each process would draw by its own torch seed
            "remove_unused_columns": False,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,  # collators put their tensors where the model is
            **more,
        }
    )
