"""Writes a checkpoint that vLLM serves with user tokens: the LLM's own files by link, and what we add to them."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from persona.errors import CheckpointError, PersonaError
from persona.injection.soft_prompt import PLAIN_TEMPLATE
from persona.serving.vllm_memory.layout import LAYERS, ROLE, MemoryLayout
from persona.serving.vllm_memory.limits import has_sliding_window
from persona.serving.vllm_memory.plugin import ARCHITECTURES

WEIGHTS = "persona.safetensors"
INDEX = "model.safetensors.index.json"
_LINKED = (".json", ".txt", ".model")
"""Endings of files beside the weights that a tokenizer may need."""
_OURS = ("config.json", INDEX, "chat_template.json", "params.json")
"""Not linked: written here, or would make vLLM read another config."""

_OWN, _OTHERS = (f"messages | {kind}attr('role', 'equalto', '{ROLE}') | list" for kind in ("select", "reject"))
_FRONT = (
    f"{{%- set {ROLE} = {_OWN} %}}{{%- set messages = {_OTHERS} %}}"
    f"{{%- if {ROLE} %}}{{%- set {ROLE} = {ROLE}[0]['content'] %}}"
    f"{{{{ {ROLE} if {ROLE} is string else {ROLE}[0]['text'] }}}}{{%- endif %}}\n"  # no line break: it ends a block
)


def export_checkpoint(
    base: str | Path,
    out: str | Path,
    layers_state: dict[str, torch.Tensor],
    *,
    tokens: int,
    every: int,
    slots: int | None = None,
    layers_sha256: str = "",
) -> Path:
    """Writes to `out` the LLM `base` with trained layers, `CrossAttention.layers.state_dict()`; returns `out`.

    `tokens` of `slots` positions are read, after blocks 0, `every`, 2 * `every`...; slots are as few as hold the
    tokens in whole blocks of 32 unless given. `layers_sha256` names their training, for whoever serves this. An earlier
    export at `out` is replaced as a whole, or stays if it is the same. Raises `PersonaError` for an LLM that cannot be
    served so, and for layers that are not of this LLM.
    """
    out, layout = Path(out), MemoryLayout.for_tokens(tokens, every, slots)
    source = _source(base)
    config = _config(source)
    _check_layers(layers_state, config, layout)
    shards, index = _weights(source)
    if out.resolve() == source.resolve():
        raise PersonaError(f"{out} is the LLM itself; give another folder to export to")
    if out.exists() and not (out / WEIGHTS).exists() and any(out.iterdir()):
        raise PersonaError(f"{out} holds something else than an earlier export; give a folder that is empty or new")

    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for file in (*shards, *_beside_weights(source)):
            _link(source / file, building / file)
        weights = {f"model.layers.{name.replace('.', '.user_attn.', 1)}": t for name, t in layers_state.items()}
        save_file({k: t.detach().cpu().contiguous().clone() for k, t in weights.items()}, building / WEIGHTS)
        (building / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
        if index is not None:
            index["weight_map"] |= dict.fromkeys(weights, WEIGHTS)
            _write_json(index, building / INDEX)
        content = json.loads((source / "config.json").read_text(encoding="utf-8"))
        content["architectures"] = [ARCHITECTURES[config.architectures[0]]]
        _write_json(content | layout.to_config() | {LAYERS: layers_sha256}, building / "config.json")
        _write_templates(source, building)
        building.chmod(0o755)
        _replace(out, building)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def memory_template(template: str) -> str:
    """A chat template that writes a message of role `persona_memory` before all else, BOS included, and drops it.

    The content is vLLM's placeholder for `prompt_embeds`, as a string or as one part: vLLM looks for a loop over parts
    in the template, so there is none here.
    """
    return _FRONT + template


def _source(base: str | Path) -> Path:
    """The folder of a checkpoint given by folder or hub name."""
    if Path(base).is_dir():
        return Path(base)
    try:
        patterns = ["*.safetensors", *(f"*{ending}" for ending in _LINKED), "*.jinja"]
        return Path(
            snapshot_download(str(base), allow_patterns=patterns, ignore_patterns=["consolidated*", "original/*"])
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the LLM {str(base)!r} is neither a folder nor can it be downloaded: {error}") from error


def _config(source: Path):
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the LLM's config.json in {source} cannot be read: {error}") from error
    found = (config.architectures or ["none"])[0]
    if found not in ARCHITECTURES:
        raise PersonaError(
            f"vLLM serves cross-attention for {', '.join(ARCHITECTURES)}, not for {found}; use injection: soft_prompt"
        )
    if has_sliding_window(config):
        raise PersonaError(
            f"{source} has layers with a sliding window, which would slide over the user tokens; "
            "use injection: soft_prompt"
        )
    return config


def _check_layers(state: dict[str, torch.Tensor], config, layout: MemoryLayout) -> None:
    width, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    kv_width = size * (getattr(config, "num_key_value_heads", None) or heads)
    shapes = {
        "norm.weight": (width,),
        "memory_norm.weight": (width,),
        "to_q.weight": (heads * size, width),
        "to_k.weight": (kv_width, width),
        "to_v.weight": (kv_width, width),
        "to_o.weight": (width, heads * size),
        "gate": (1,),
    }
    layers = [i for i in range(config.num_hidden_layers) if layout.reads(i)]
    expected = {f"{i}.{name}": shape for i in layers for name, shape in shapes.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise PersonaError(
                f"the cross-attention layers are not of this LLM: {name} should be {expected.get(name, 'absent')}, "
                f"but is {found.get(name, 'absent')}; export with the LLM and `every` that they were trained with"
            )


def _weights(source: Path) -> tuple[list[str], dict | None]:
    """Files of weights, and the index of a sharded checkpoint."""
    if (source / INDEX).exists():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    else:
        index, files = None, ["model.safetensors"]
    missing = [file for file in files if not (source / file).exists()]
    if missing:
        raise CheckpointError(
            f"{source} lacks {', '.join(missing)}; the LLM's weights must be there as safetensors "
            "(save_pretrained writes them)"
        )
    return files, index


def _beside_weights(source: Path) -> list[str]:
    return sorted(
        path.name
        for path in source.iterdir()
        if path.is_file() and path.suffix in _LINKED and path.name not in _OURS and not path.name.endswith("index.json")
    )


def _write_templates(source: Path, out: Path) -> None:
    """The tokenizer's chat templates, each with the user's memory in front."""
    try:
        templates = AutoTokenizer.from_pretrained(source).chat_template or PLAIN_TEMPLATE
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the LLM's tokenizer in {source} cannot be loaded: {error}") from error
    named = dict(templates) if isinstance(templates, dict) else {"default": templates}
    for name, template in named.items():
        path = out / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(memory_template(template), encoding="utf-8")


def _write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """The same file in another place: by symbolic link, else by hard link, else by copy."""
    source = source.resolve()
    for how in (os.symlink, os.link, shutil.copyfile):
        try:
            how(source, target)
            return
        except (OSError, NotImplementedError) as error:
            failed = error
    raise CheckpointError(f"{source} can neither be linked nor copied to {target}: {failed}") from failed


def _replace(out: Path, new: Path) -> None:
    """Puts a folder in the place of another, which is only removed once the new one stands there.

    One of the same content stays, since a server may be reading it, or another process may just have written it.
    """
    if out.exists() and _same(out, new):
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    try:
        if out.exists():
            out.rename(old / "export")
        new.rename(out)
    except OSError:
        if not (out.exists() and _same(out, new)):
            if (old / "export").exists() and not out.exists():
                (old / "export").rename(out)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _same(one: Path, other: Path) -> bool:
    """Whether two folders have the same links and the same files."""
    names = {path.relative_to(one) for path in one.rglob("*")}
    if names != {path.relative_to(other) for path in other.rglob("*")}:
        return False
    return all(
        os.path.samefile(one / name, other / name)
        or ((one / name).is_dir() and (other / name).is_dir())
        or ((one / name).is_file() and filecmp.cmp(one / name, other / name, shallow=False))
        for name in names
    )
