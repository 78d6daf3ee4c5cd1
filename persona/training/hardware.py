"""What this machine can do, as arguments of transformers' Trainer."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def has_bf16() -> bool:
    """True where the hardware computes bfloat16: Ampere GPUs and newer, CPUs with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(f in flags.read_text() for f in ("avx512_bf16", "amx_bf16"))


def precision() -> dict[str, bool]:
    """`TrainingArguments` for this machine: the GPU if there is one, and bfloat16 autocast where it is native.

    Under `accelerate launch` the mixed precision of its configuration is taken instead.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION")
    return {
        "bf16": has_bf16() if asked is None else asked == "bf16",
        "fp16": asked == "fp16",
        "use_cpu": not (torch.cuda.is_available() or torch.backends.mps.is_available()),
    }
