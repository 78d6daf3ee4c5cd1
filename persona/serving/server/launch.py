"""`persona serve`: stock vLLM, started in this process's place with our middleware, or the gateway.

vLLM takes some 40 seconds to start, so whatever can be known to be wrong is found before.
"""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import SecretStr
from transformers import AutoConfig

from persona.encoders.hub import read_config, resolve
from persona.errors import CheckpointError, MissingExtraError, PersonaError
from persona.injection.model import AdapterConfig, base_model_path
from persona.serving.export import export_adapter
from persona.serving.server.config import ServerConfig
from persona.serving.server.flags import MIDDLEWARE, check_vllm_args
from persona.serving.vllm_offline import import_vllm

SERVER = "vllm.entrypoints.openai.api_server"
"""Module that starts vLLM's server; `vllm serve` asks for the distribution `vllm`, which a CPU build is not called."""

_FLAGS = {"host": "127.0.0.1", "port": "8000"}
_CPU_FLAGS = {
    "dtype": "float32",
    "enforce_eager": None,
    "block_size": "32",  # the CPU default of 128 hardly ever shares a prefix
    "max_model_len": "auto",  # as long as fits into the KV cache
    "max_num_seqs": "16",
    "max_num_batched_tokens": "2048",
    "kv_cache_memory_bytes": str(256 * 2**20),
}
_VARIABLES = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_CPU_VARIABLES = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # One core for HTTP and for encoding users: the engine's threads wait for one another in busy loops.
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1)),
}
_MEMORY_VARIABLES = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""Where user tokens are read by cross-attention, which was not tested with vLLM's new model runner."""
_KV_CACHE_SIZES = ("gpu_memory_utilization", "num_gpu_blocks_override")
"""Flags that size the KV cache in another way."""
_LEAST_EMBED_BYTES = 4 * 2**20
_IGNORED = {
    "model_tag": "name the LLM with --llm",
    "config": "write --config FILE, without the equals sign",
    "api_server_count": "leave it out, and start several servers or gateways instead",
    "data_parallel_multi_port_external_lb": "leave it out, and start a server for each rank",
}
"""Arguments that vLLM's server would silently leave unread when it is started this way."""


def serve_vllm(config: ServerConfig, vllm_args: Sequence[str], say: Callable[[str], None] = print) -> NoReturn:
    """Becomes vLLM's server. Raises `PersonaError` for whatever is known to be wrong."""
    argv, environment = command(config, vllm_args, dict(os.environ))
    say(f"starting vLLM with {environment['PERSONA_LLM']}")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], argv, environment)


def serve_gateway(config: ServerConfig, vllm_args: Sequence[str], host: str | None, port: int | None) -> None:
    """Runs the gateway in front of `config.upstream` until it is stopped. Raises `PersonaError`."""
    _, adapter = read_adapter(config.adapter)
    if adapter.injection != "soft_prompt":
        raise PersonaError(
            f"{config.adapter} needs an LLM with cross-attention layers, and a gateway cannot see whether the one at "
            f"{config.upstream} has them; run persona serve without --upstream there"
        )
    if vllm_args:
        raise PersonaError(f"with --upstream no vLLM is started; give it these arguments: {' '.join(vllm_args)}")
    try:
        import uvicorn

        from persona.serving.server.gateway import gateway
    except ImportError as error:
        raise MissingExtraError(f"the gateway cannot be imported ({error}): pip install 'persona[serve]'") from error
    uvicorn.run(gateway(config), host=host or _FLAGS["host"], port=port or int(_FLAGS["port"]), lifespan="on")


def command(
    config: ServerConfig, vllm_args: Sequence[str], environment: Mapping[str, str], *, cuda: bool | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts vLLM with our middleware, and its environment.

    `vllm_args` are further arguments for vLLM, which win over our defaults, as does what `environment` sets. `cuda`
    says whether vLLM runs on a GPU, by default whether there is one. Raises `PersonaError` for an adapter that does
    not fit the LLM and for what `check_vllm_args` refuses.
    """
    cuda = torch.cuda.is_available() if cuda is None else cuda
    folder, adapter = read_adapter(config.adapter)
    given = _parse(vllm_args, unset=("model", *_FLAGS, *_CPU_FLAGS, *_KV_CACHE_SIZES))
    llm = config.llm or getattr(given, "model", None) or base_model_path(folder, adapter)
    if not llm:
        raise PersonaError(f"{config.adapter} names no LLM; give one with --llm")
    if getattr(given, "model", llm) != llm:
        raise PersonaError(f"--llm is {llm} but vLLM's --model is {given.model}; give --llm alone")
    llm_config = check_width(config.adapter, adapter, llm)

    served = llm if adapter.injection == "soft_prompt" else str(export_adapter(folder, llm=llm))
    defaults = _FLAGS if cuda else {**_FLAGS, **_CPU_FLAGS}
    wanted = [name for name in defaults if not hasattr(given, name)]
    if "VLLM_CPU_KVCACHE_SPACE" in environment or any(hasattr(given, name) for name in _KV_CACHE_SIZES):
        wanted = [name for name in wanted if name != "kv_cache_memory_bytes"]
    ours = ["--model", served, "--enable-prompt-embeds"]
    if served != llm:
        ours += ["--served-model-name", llm]  # what callers know it by
    for name in wanted:
        ours += [_flag(name)] if defaults[name] is None else [_flag(name), defaults[name]]
    # Ours comes last, which makes it the outermost: no other middleware sees a request that is not authenticated.
    flags = [*ours, *vllm_args, "--middleware", MIDDLEWARE]
    args = _parse(flags)
    settings = {f"PERSONA_{name.upper()}": _text(getattr(config, name)) for name in config.model_fields_set}
    variables = {
        "VLLM_MAX_EMBED_DECODE_BYTES": str(_embed_bytes(args, adapter, llm_config)),
        **_VARIABLES,
        **({} if served == llm else _MEMORY_VARIABLES),
        **({} if cuda else _CPU_VARIABLES),
        **environment,
        **settings,
        "PERSONA_LLM": llm,
    }
    check_vllm_args(args, variables, memory=served != llm)
    return [sys.executable, "-m", SERVER, *flags], variables


def read_adapter(adapter: str) -> tuple[Path, AdapterConfig]:
    """An adapter's folder and configuration. Raises `PersonaError` if it is missing, or if vLLM cannot serve it."""
    folder = resolve(adapter)
    config = read_config(AdapterConfig, folder / "adapter_config.json")
    if config.lora:
        raise PersonaError(f"{adapter} has a LoRA, which vLLM would not apply; merge it into the LLM first")
    return folder, config


def check_width(adapter: str, config: AdapterConfig, llm: str) -> Any:
    """The LLM's own configuration. Raises `CheckpointError` when it is missing, or of another width."""
    try:
        found = AutoConfig.from_pretrained(llm).get_text_config()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the LLM {llm!r} cannot be loaded ({_line(error)}); give another with --llm") from error
    width = getattr(found, "hidden_size", config.llm_width)  # a model that hides its width is checked when it loads
    if width != config.llm_width:
        raise CheckpointError(
            f"{adapter} was trained for an LLM of width {config.llm_width} ({config.base_model}); "
            f"{llm} is {width} wide. Train an adapter for it with `persona train`"
        )
    return found


def _parse(arguments: Sequence[str], unset: Sequence[str] = ()) -> Namespace:
    """Arguments as vLLM reads them; those of `unset` are attributes only if they were given. Raises `PersonaError`."""
    nothing = object()
    into = Namespace(**dict.fromkeys(unset, nothing))
    try:
        with _quiet_vllm():
            args = _parser().parse_args(list(arguments), into)
    except PersonaError:
        raise
    except Exception as error:  # of a configuration file that is missing or wrong
        raise PersonaError(f"vLLM's arguments cannot be read: {_line(error)}") from error
    for name in unset:
        if getattr(args, name, None) is nothing:
            delattr(args, name)
    for name, instead in _IGNORED.items():
        if getattr(args, name, None) not in (None, False):
            what = f"the argument {args.model_tag!r}" if name == "model_tag" else _flag(name)
            raise PersonaError(f"vLLM's server does not read {what} here; {instead}")
    return args


@cache
def _parser() -> Any:
    """vLLM's own parser, which raises instead of leaving."""
    import_vllm()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise PersonaError(f"vLLM's arguments: {_line(message)}; see python -m {SERVER} --help=all")

    return make_arg_parser(Parser(prog=f"python -m {SERVER}"))


@contextmanager
def _quiet_vllm() -> Iterator[None]:
    """Without vLLM's notes on its arguments: the server says them again."""
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _embed_bytes(args: Namespace, adapter: AdapterConfig, llm: Any) -> int:
    """Bytes of the longest prompt as float32 embeddings, which a personalised completion sends; a few MiB at least."""
    length = args.max_model_len if (args.max_model_len or 0) > 0 else getattr(llm, "max_position_embeddings", 0)
    return max(_LEAST_EMBED_BYTES, 4 * adapter.llm_width * (length or 0))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _text(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _line(message: object) -> str:
    return " ".join(str(message).split()) or type(message).__name__
