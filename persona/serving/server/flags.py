"""Which of vLLM's flags and variables do not go together with user tokens, and why.

The same check runs before `persona serve` starts vLLM and inside a server that was started by hand, so it reads only
attributes and imports nothing of vLLM's. What merely costs speed, or what vLLM itself refuses, is not listed.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NamedTuple

from persona.errors import PersonaError

MIDDLEWARE = "persona.serving.server.middleware.PersonaMiddleware"
"""What vLLM's --middleware names."""
LORA_TARGETS = "--lora-target-modules qkv_proj o_proj gate_up_proj down_proj"

_EMBEDDINGS = re.compile(r"embed|lm_head|\bw[tp]e\b")
_NOT_HUGGING_FACE = ("cohere", "deepseek_v32", "deepseek_v4", "deepseek_v41", "inkling", "kimi_k3", "mistral")
_NO_HTTP = "its requests would not pass through persona; serve HTTP by vLLM's Python server"
_BY_TOKEN_IDS = "such a cache may be looked up by token ids alone, so that one user gets another's prompt; leave it out"
_DIVERGES = "speculative decoding does not know the embeddings and diverges (vLLM issue 37170); leave it out"
_OTHER_FILES = "persona reads the tokenizer and embeddings of --llm itself; give a folder with the right files as --llm"


class _Refusal(NamedTuple):
    """One attribute of vLLM's namespace that is refused."""

    name: str
    """The attribute; the flag is the same with dashes."""
    why: str
    """The reason, and what to do."""
    values: tuple[str, ...] | None = None
    """The values that are refused; None for any that is set."""


_REFUSED = (
    # The middleware would not run, or nothing behind it could answer.
    _Refusal("headless", _NO_HTTP),
    _Refusal("grpc", _NO_HTTP),
    _Refusal("grpc_port", _NO_HTTP),
    _Refusal("tokens_only", "it has no chat and completion routes; leave it out"),
    _Refusal("runner", "user tokens are for LLMs that generate; leave it out", ("pooling", "draft")),
    _Refusal("convert", "user tokens are for LLMs that generate; leave it out", ("embed", "classify")),
    _Refusal("mm_encoder_only", "it loads no LLM; leave it out"),
    # The rows would come to stand elsewhere than in training, or nowhere.
    _Refusal("skip_tokenizer_init", "without a tokenizer there are no chats; leave it out"),
    _Refusal("tokenizer_mode", "only Hugging Face tokenizers take prompt_embeds parts; use hf", _NOT_HUGGING_FACE),
    _Refusal(
        "chat_template_content_format",
        "adapters are trained with the format that vLLM finds in the chat template; leave it at auto",
        ("string", "openai"),
    ),
    _Refusal("trust_request_chat_template", "a caller's template could move or repeat the user tokens; leave it out"),
    _Refusal("revision", _OTHER_FILES),
    _Refusal("tokenizer_revision", _OTHER_FILES),
    # One user could be answered from another's cache, or wrongly.
    _Refusal("kv_transfer_config", _BY_TOKEN_IDS),
    _Refusal("kv_offloading_size", _BY_TOKEN_IDS),
    _Refusal("ec_transfer_config", _BY_TOKEN_IDS),
    _Refusal(
        "prefix_caching_hash_algo",
        "callers can make this hash collide and read another user's blocks; use sha256 or sha256_cbor",
        ("xxhash", "xxhash_cbor"),
    ),
    _Refusal("speculative_config", _DIVERGES),
    _Refusal("spec_method", _DIVERGES),
    _Refusal("spec_model", _DIVERGES),
    _Refusal("spec_tokens", _DIVERGES),
    # Users' texts would leave the server.
    _Refusal("enable_log_outputs", "it writes the answers to users into the log; leave it out"),
    _Refusal("enable_log_requests", "it writes users' requests into the log; leave it out"),
    _Refusal("log_error_stack", "stack traces of bad requests quote users' texts in the log; leave it out"),
    # Routes that generate past the middleware's checks.
    _Refusal("enable_scale_out", "its routes take token ids and cache salts of the caller's own; leave it out"),
)

_REFUSED_WITH_MEMORY = (
    _Refusal("chat_template", "the exported one puts the user tokens in front of each chat; leave it out"),
    _Refusal("enable_lora", "LoRA beside cross-attention was not tested; leave it out"),
)

_VARIABLES = {
    "VLLM_USE_RUST_FRONTEND": _NO_HTTP,
    "VLLM_SERVER_DEV_MODE": "it opens routes that control the engine, and logs stack traces that quote users",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "callers could load a LoRA into the LLM that the adapter was trained for",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": "it writes the answers to users into the log",
}
"""Environment variables that are refused when they are on."""


def check_vllm_args(args: Namespace, environment: Mapping[str, str] = os.environ, *, memory: bool = False) -> None:
    """Raises `PersonaError`, with the reason and what to do, for arguments or variables known to be wrong.

    `args` are vLLM's own, as its parser makes them; an attribute that is missing counts as not given. With `memory`
    the LLM reads user tokens by cross-attention, and more is wrong; `vllm_memory.limits` finds the rest in the engine.
    """
    if not getattr(args, "enable_prompt_embeds", False):
        raise PersonaError("vLLM takes user tokens only with --enable-prompt-embeds; add it")
    for name, why, values in (*_REFUSED, *(_REFUSED_WITH_MEMORY if memory else ())):
        value = getattr(args, name, None)
        if value in values if values else value not in (None, False):
            raise _refused(name, f" {value}" if values else "", why)
    for name, why in _VARIABLES.items():
        if environment.get(name, "").strip().lower() not in ("", "0", "false"):
            raise PersonaError(f"the variable {name} is on: {why}; unset it")
    _check_cache_events(args)
    _check_lora(args)
    _check_keys(args, environment)
    tokenizer, model = getattr(args, "tokenizer", None), getattr(args, "model", None)
    if tokenizer is not None and tokenizer != model:
        raise _refused("tokenizer", f" {tokenizer}", _OTHER_FILES)
    if list(getattr(args, "middleware", None) or ()).count(MIDDLEWARE) > 1:
        raise PersonaError(f"vLLM's --middleware names {MIDDLEWARE} twice; name it once (persona serve does)")


def _check_cache_events(args: Namespace) -> None:
    config = getattr(args, "kv_events_config", None)
    if _field(config, "enable_kv_cache_events") or _field(config, "publisher") not in (None, "null"):
        why = "its events carry users' token ids and the tenants' cache salts out of the server; leave it out"
        raise _refused("kv_events_config", "", why)


def _check_lora(args: Namespace) -> None:
    """vLLM wraps every module that a LoRA may change, and a wrapped embedding crashes beside prompt embeddings."""
    if not any(getattr(args, name, None) for name in ("enable_lora", "lora_modules", "default_mm_loras")):
        return
    targets = getattr(args, "lora_target_modules", None)
    if not targets or any(_EMBEDDINGS.search(name) for name in targets):
        why = f"LoRA beside prompt embeddings crashes unless it leaves the LLM's embeddings alone; add {LORA_TARGETS}"
        raise _refused("enable_lora", "", why)


def _check_keys(args: Namespace, environment: Mapping[str, str]) -> None:
    if not environment.get("PERSONA_KEYS_FILE"):
        return
    why = "vLLM would refuse the tenants' keys; use --keys (PERSONA_KEYS_FILE) alone"
    if any(getattr(args, "api_key", None) or ()):
        raise _refused("api_key", "", why)
    if environment.get("VLLM_API_KEY"):
        raise PersonaError(f"the variable VLLM_API_KEY is set beside a file of API keys: {why}")


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _refused(name: str, value: str, why: str) -> PersonaError:
    return PersonaError(f"vLLM's --{name.replace('_', '-')}{value} does not go with user tokens: {why}")
