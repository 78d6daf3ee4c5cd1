"""`export_adapter`: what vLLM serves for an adapter with cross-attention, its LLM with the trained layers."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from persona.encoders.hub import read_config, resolve
from persona.errors import CheckpointError, PersonaError
from persona.injection.model import LAYERS, AdapterConfig, base_model_path
from persona.serving.vllm_memory import export_checkpoint


def export_adapter(adapter: str | Path, out: str | Path | None = None, llm: str | None = None) -> Path:
    """Writes the checkpoint to `out` and returns that folder; the LLM's own weights are linked, not copied.

    `llm` overrides the name that the adapter records. Without `out` it goes to a folder of its own under
    `$XDG_CACHE_HOME/persona`, by default `~/.cache/persona`. Raises `PersonaError` for an adapter without
    cross-attention, and for what vLLM cannot serve so; `CheckpointError` for files that are missing or corrupt.
    """
    folder = resolve(adapter)
    config = read_config(AdapterConfig, folder / "adapter_config.json")
    if config.injection == "soft_prompt":
        raise PersonaError(f"{adapter} has no cross-attention layers: vLLM serves its LLM as it is, with persona serve")
    if config.lora:
        raise PersonaError(f"{adapter} has a LoRA, which the export would leave out; merge it into the LLM first")
    try:
        layers, digest = load_file(folder / LAYERS), hashlib.sha256((folder / LAYERS).read_bytes()).hexdigest()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / LAYERS} cannot be read: {error}") from error
    if digest != config.layers_sha256:
        raise CheckpointError(f"{folder / LAYERS} is not the file that adapter_config.json was written with")
    base = llm or base_model_path(folder, config)
    if out is None:
        key = [str(Path(base).resolve()) if Path(base).is_dir() else base, str(config)]
        own = hashlib.sha256("\0".join(key).encode()).hexdigest()
        out = _cache() / "persona" / f"{config.domain or 'adapter'}-{own[:16]}"
    return export_checkpoint(base, out, layers, tokens=config.tokens, every=config.cross_every, layers_sha256=digest)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
