"""Refuses at start-up what cannot work with user tokens in the KV cache, or what nobody has tested."""

from __future__ import annotations

from persona.errors import PersonaError
from persona.serving.vllm_memory.layout import MemoryLayout

TESTED_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Attention backends that take any number of requests; FLASH_ATTN and TRITON_ATTN by their source only."""


def check_config(vllm_config, layout: MemoryLayout) -> None:
    """Raises `PersonaError` that names every setting of a `vllm.config.VllmConfig` that must change."""
    problems = [*_placement(vllm_config), *_cache(vllm_config, layout), *_model(vllm_config)]
    if problems:
        raise PersonaError("this vLLM cannot serve user tokens by cross-attention:\n- " + "\n- ".join(problems))


def check_backend(backend) -> None:
    """Raises `PersonaError` for an attention backend that cannot read user tokens or was not tested."""
    if backend.get_name() not in TESTED_BACKENDS or not backend.supports_non_causal():
        raise PersonaError(
            f"vLLM chose the attention backend {backend.get_name()}, with which reading user tokens was not tested; "
            f"start it with --attention-backend and one of {', '.join(TESTED_BACKENDS)}"
        )


def has_sliding_window(config) -> bool:
    """Whether any layer of a Hugging Face config sees only a window of the text."""
    layers = getattr(config, "layer_types", None) or []
    return bool(getattr(config, "sliding_window", None)) or "sliding_attention" in layers


def _placement(config) -> list[str]:
    parallel, problems = config.parallel_config, []
    if parallel.pipeline_parallel_size > 1:
        problems.append("pipeline parallelism keeps user tokens at the first layers; drop --pipeline-parallel-size")
    if parallel.tensor_parallel_size > 1:
        problems.append("tensor parallelism was not tested; drop --tensor-parallel-size")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        problems.append("context parallelism spreads a request's KV cache; drop the context-parallel sizes")
    if parallel.use_ubatching:
        problems.append("dual batch overlap was not tested; drop --enable-dbo and --ubatch-size")
    if config.use_v2_model_runner:
        problems.append("model runner V2 was not tested; set VLLM_USE_V2_MODEL_RUNNER=0")
    return problems


def _cache(config, layout: MemoryLayout) -> list[str]:
    from vllm.utils.torch_utils import is_quantized_kv_cache

    cache, problems = config.cache_config, []
    if cache.block_size and layout.slots % cache.block_size:
        problems.append(
            f"--block-size {cache.block_size} does not divide the {layout.slots} slots for user tokens; "
            "take one that does (32 on a CPU, 16 on a GPU), or export the checkpoint with more slots"
        )
    scheme = getattr(config.quant_config, "kv_cache_scheme", None)
    if is_quantized_kv_cache(cache.cache_dtype) or scheme is not None:
        problems.append("a quantized KV cache was not tested; use --kv-cache-dtype auto and weights without KV scales")
    if cache.kv_sharing_fast_prefill:
        problems.append("fast prefill skips positions whose keys are needed; drop --kv-sharing-fast-prefill")
    if config.kv_transfer_config is not None:
        problems.append("KV connectors do not tell one user's blocks from another's; drop --kv-transfer-config")
    return problems


def _model(config) -> list[str]:
    model, problems = config.model_config, []
    if not model.enable_prompt_embeds:
        problems.append("user tokens arrive as embeddings; add --enable-prompt-embeds")
    if config.cache_config.sliding_window is not None or has_sliding_window(model.hf_config):
        problems.append(
            "this LLM has layers with a sliding window, which would slide over the user tokens; "
            "serve it with user tokens as a soft prompt"
        )
    if config.speculative_config is not None:
        problems.append("speculative decoding does not work with prompt embeddings; drop --speculative-config")
    if config.lora_config is not None:
        problems.append("LoRA adapters were not tested; drop --enable-lora")
    if model.runner_type != "generate":
        problems.append("only text generation is supported; drop --runner")
    return problems
