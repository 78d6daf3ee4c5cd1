"""Soft prompts in vLLM's offline engine: the same rows, the same places, the same greedy tokens as Hugging Face."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from persona.errors import MissingExtraError, PersonaError
from persona.injection.soft_prompt import Prompt
from persona.serving.rows import check_rows
from persona.serving.vllm_memory.layout import KEY, MemoryLayout
from persona.serving.vllm_memory.rows import memory_rows

TESTED = ("0.32", "0.33")
"""First version that works, first version not tested."""


class VLLMEngine:
    """A stock `vllm.LLM` that takes prompts with soft rows.

    `dtype` defaults to float32 on a CPU, where greedy answers equal Hugging Face's, and to vLLM's choice on a GPU.
    Further arguments go to `vllm.LLM`. Raises `MissingExtraError` without vLLM and `PersonaError` for a version that
    was not tested.
    """

    def __init__(self, model: str | Path, *, max_model_len: int = 2048, **kwargs):
        vllm = import_vllm()
        options: dict = {
            "enable_prompt_embeds": True,
            "max_model_len": max_model_len,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if not torch.cuda.is_available():
            options |= {
                "dtype": "float32",
                "enforce_eager": True,
                "block_size": 32,  # the CPU default of 128 hardly ever shares a prefix
                "max_num_seqs": 16,
                "max_num_batched_tokens": max(2048, max_model_len),
                "kv_cache_memory_bytes": 256 * 2**20,
            }
        self._sampling = vllm.SamplingParams
        self.engine = vllm.LLM(model=str(model), **{**options, **kwargs})

    def complete(
        self, prompts: Sequence[Prompt], rows: torch.Tensor | None, *, max_new_tokens: int = 32, **kwargs
    ) -> list[str]:
        """Greedy completions of prompts with the user tokens `rows` `[S, llm_width]`, in order.

        `kwargs` go to `vllm.SamplingParams`; for what is refused see `inputs`.
        """
        sampling = self._sampling(**{"temperature": 0.0, "max_tokens": max_new_tokens, **kwargs})
        outputs = self.engine.generate(self.inputs(prompts, rows), sampling, use_tqdm=False)
        return [out.outputs[0].text.strip() for out in outputs]

    def inputs(self, prompts: Sequence[Prompt], rows: torch.Tensor | None) -> list[dict]:
        """The prompts with their user tokens as `vllm.LLM.generate` takes them.

        Raises `PersonaError` for rows of another number or width, or that are not finite, or all zero: the engine
        would hang, answer nonsense, or confuse two users (vLLM issue 56655); and for prompts and a checkpoint that do
        not go together.
        """
        room, found = sum(p.users for p in prompts), 0 if rows is None else len(rows)
        if room != found:
            raise PersonaError(f"the prompts have room for {room} user tokens, but there are {found}")
        inputs, used = [], 0
        for prompt in prompts:
            own = rows[used : used + prompt.users] if prompt.users else None
            inputs.append(vllm_input(self.engine, prompt, own))
            used += prompt.users
        return inputs


def memory_layout(llm) -> MemoryLayout | None:
    """The slots for user tokens of a `vllm.LLM`'s checkpoint; None for a stock one."""
    config = llm.llm_engine.model_config.hf_config
    return MemoryLayout.from_config(config) if hasattr(config, KEY) else None


def vllm_input(llm, prompt: Prompt, rows: torch.Tensor | None) -> dict:
    """One prompt with its user tokens `[users, llm_width]` as the `generate` of a `vllm.LLM` takes it.

    Raises `PersonaError`, see `check_rows`, and for a prompt whose user tokens this checkpoint has no layers to read.
    """
    layout = memory_layout(llm)
    if prompt.memory and layout is None:
        raise PersonaError(
            "this adapter's user tokens are read by cross-attention layers, which the served LLM does not have: "
            "serve what `persona export` writes"
        )
    if not prompt.count and layout is None:
        return {"prompt_token_ids": prompt.ids}
    config = llm.llm_engine.model_config
    width, slots = config.get_hidden_size(), layout.slots if layout else 0
    embeds = torch.zeros(slots + len(prompt.ids), width, dtype=config.dtype)
    if rows is not None:
        rows = rows.to("cpu", config.dtype)  # in which a small row may become zero
        check_rows(rows, width)
    if layout:
        own = rows if prompt.memory else None
        embeds[:slots] = memory_rows(own, tokens=layout.tokens, slots=slots, width=width, dtype=config.dtype)
    if prompt.count:
        start = slots + prompt.start
        embeds[start : start + prompt.count] = rows
    is_token = [False] * slots + prompt.is_token
    # The placeholder's id may lie beyond the LLM's vocabulary; where there are rows the id is never looked at.
    ids = [i if token else 0 for i, token in zip([0] * slots + prompt.ids, is_token)]
    return {"prompt_embeds": embeds, "prompt_token_ids": ids, "prompt_is_token_ids": is_token}


def import_vllm():
    """The vllm module, set up for this machine and checked to be of a tested version."""
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise MissingExtraError(f"vLLM cannot be imported ({error}): pip install 'persona[vllm]'") from error
    _mind_llvmlite()
    from packaging.version import Version

    if not Version(TESTED[0]) <= Version(vllm.__version__) < Version(TESTED[1]):
        raise PersonaError(
            f"vLLM {vllm.__version__} is not tested; install one from {TESTED[0]} up to, not including, {TESTED[1]}"
        )
    return vllm


def _mind_llvmlite() -> None:
    """Lets vLLM start on a CPU after numba was imported, by bm25s for example.

    vLLM 0.32 looks through `vars()` of all that any module holds (triton_utils/dispatcher.py). llvmlite's library
    object answers every name with a C function, `__dict__` too, and vLLM stops.
    """
    if ffi := sys.modules.get("llvmlite.binding.ffi"):
        ffi.lib._fntab["__dict__"] = {}
