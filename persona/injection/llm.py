"""Loads the LLM: with its weights, or as a shell for an engine that holds them itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from persona.errors import CheckpointError, PersonaError

FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer.json", "*.jinja", "vocab*", "merges.txt", "*.model")
"""Files of a folder that an LLM's answers depend on: weights, settings, tokenizer, chat template."""
_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
"""Arguments of `from_pretrained` that say which files are meant; they are for the tokenizer, too."""
_EMBEDDINGS = "embed_tokens.weight"


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_llm(name: str | Path, *, weights: bool = True, **kwargs):
    """A causal LM and its tokenizer by name or path, in float32 unless told. Raises `CheckpointError`.

    `kwargs` go to `from_pretrained`; those that say which files of the hub are meant, such as `revision`, are the
    tokenizer's, too. Without `weights` the LLM's parameters have shapes but no storage (torch's meta device), except
    for its input embeddings, which are mapped from the file and cost memory only where they are read.
    """
    hub = {key: kwargs[key] for key in _HUB if key in kwargs}
    if not weights and (unused := sorted(kwargs.keys() - hub.keys())):
        raise PersonaError(f"{', '.join(unused)}: an LLM that is loaded without weights has no use for it")
    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        if weights:
            llm = AutoModelForCausalLM.from_pretrained(name, **{"dtype": torch.float32, **kwargs})
        else:
            with torch.device("meta"):
                llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, **hub))
            _map_embeddings(llm, name, **hub)
    return llm.eval(), tokenizer


def llm_revision(name: str | Path) -> str:
    """Which LLM lies behind a name or path now: its commit on the hub, or SHA-256 of the folder's files.

    Those are the weights, the settings and the tokenizer with its chat template.

    Raises `CheckpointError`, as `load_llm` would, where there is none; loads no weights.
    """
    with _loading(name):
        AutoConfig.from_pretrained(name)
        config = Path(cached_file(name, "config.json"))
    if commit := extract_commit_hash(str(config), None):
        return commit
    digest = hashlib.sha256()
    for path in sorted(path for kind in FILES for path in config.parent.glob(kind)):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _loading(name: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the LLM {str(name)!r} cannot be loaded: {error}") from error


def _map_embeddings(llm: nn.Module, name: str | Path, **hub) -> None:
    """Gives a shell its input embeddings, memory-mapped, if they lie in a safetensors file under the usual name."""
    for file in ("model.safetensors.index.json", "model.safetensors"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
        if path and file.endswith(".json"):
            shards = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
            found = [shards[key] for key in shards if key.endswith(_EMBEDDINGS)]
            path = found and cached_file(name, found[0], **hub)
        if path:
            break
    else:
        return
    with safe_open(path, "pt") as weights:
        keys = [key for key in weights.keys() if key.endswith(_EMBEDDINGS)]  # noqa: SIM118
        if not keys:
            return
        embeddings = llm.get_input_embeddings()
        embeddings.weight = nn.Parameter(weights.get_tensor(keys[0]), requires_grad=False)
    if hasattr(embeddings, "scalar_embed_scale"):  # Gemma's, which lies in a buffer
        embeddings.embed_scale = torch.tensor(embeddings.scalar_embed_scale)
