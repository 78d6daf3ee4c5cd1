"""Saving, loading and pushing in the manner of transformers: config.json, model.safetensors and a model card."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from persona.encoders.config import EncoderConfig
from persona.encoders.vocabulary import Vocabulary
from persona.errors import CheckpointError, RecipeError
from persona.history.config import parse_config

T = TypeVar("T")

CARD = """---
library_name: persona
tags: [personalization, user-embedding, soft-prompt]
---
# User encoder

Makes {tokens} instruction-aware user tokens of width {width} from a user's events ({sources}).
Load it with `persona.UserEncoder.from_pretrained(...)`.
"""


class HubMixin:
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for `UserEncoder`."""

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes config.json, vocabulary.json, model.safetensors and README.md."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        saved = asdict(self.config)
        if saved["llm"] and Path(saved["llm"]).is_dir():  # relative to the encoder, so that both can be moved together
            saved["llm"] = Path(os.path.relpath(saved["llm"], folder)).as_posix()
        (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n")
        vocabulary = json.dumps(self.vocabulary.to_dict(), ensure_ascii=False)
        (folder / "vocabulary.json").write_text(vocabulary + "\n", encoding="utf-8")
        save_file(self.state_dict(), folder / "model.safetensors")
        sources = ", ".join(self.vocabulary.sources)
        card = CARD.format(tokens=self.config.tokens, width=self.config.width, sources=sources)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return folder

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, text_encoder=None, llm: str | Path | None = None):
        """Loads from a folder or a hub name, in evaluation mode. Raises `CheckpointError` for anything damaged.

        What is loaded is an `LLMUserEncoder` where the checkpoint is one's; `llm` stands for the LM that it names.
        """
        from persona.encoders.factory import make_encoder

        folder = resolve(name_or_path)
        config = read_config(EncoderConfig, folder / "config.json")
        vocabulary = read_config(Vocabulary, folder / "vocabulary.json")
        if config.llm:
            config = replace(config, llm=str(llm) if llm else llm_path(folder, config.llm))
        try:
            model = make_encoder(config, vocabulary, text_encoder)
        except RecipeError as error:
            raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
        load_weights(model, folder / "model.safetensors")
        return model.eval()

    def load_pretrained(self, folder: str | Path) -> None:
        """Takes all weights but the head's from a pre-trained encoder of the same shape and vocabulary.

        Raises `CheckpointError` when they do not fit.
        """
        folder = resolve(folder)
        if read_config(Vocabulary, folder / "vocabulary.json") != self.vocabulary:
            raise CheckpointError(f"{folder} was pre-trained on other records: its vocabulary differs")
        load_weights(self, folder / "model.safetensors", without="head.")

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Uploads what `save_pretrained` writes; further arguments go to `HfApi.create_repo`. Returns the URL.

        Raises `CheckpointError` for an encoder whose LM is a folder, which nobody else would have.
        """
        self.check_public()
        return push(self, repo_id, **kwargs)

    def check_public(self) -> None:
        """Raises `CheckpointError` for an encoder whose LM is a folder of this machine."""
        if self.config.llm and Path(self.config.llm).is_dir():
            raise CheckpointError(
                f"this encoder needs the LM in {self.config.llm}: upload that first, and train with its hub name"
            )


def llm_path(folder: Path, llm: str) -> str:
    """The LM that an encoder in `folder` names: a folder relative to that one, or a hub name.

    Raises `CheckpointError` for a folder that is not there.
    """
    beside = folder / llm
    if beside.is_dir():
        return str(beside.resolve())
    if llm.startswith((".", "/")):
        raise CheckpointError(
            f"the encoder in {folder} was trained with the LM at {llm}, which is not there: name it as `llm`"
        )
    return llm


def push(model, repo_id: str, **kwargs) -> str:
    """Saves `model` to a temporary folder and uploads that folder."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, exist_ok=True, **kwargs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    return str(url)


def resolve(name_or_path: str | Path) -> Path:
    """The folder itself, or a snapshot of that name from the Hugging Face hub."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name_or_path)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name_or_path} is neither a folder nor a repository that can be reached: {error}"
        ) from error


def read_json(path: Path) -> dict:
    """A JSON file of a checkpoint; raises `CheckpointError` when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problem = foreign(path.parent) or f"{path} is missing; is {path.parent} a folder made by save_pretrained?"
        raise CheckpointError(problem) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save the checkpoint again") from None


def read_config(cls: type[T], path: Path) -> T:
    """A JSON file of a checkpoint as the dataclass `cls`; raises `CheckpointError` naming the file and the field."""
    try:
        return parse_config(cls, read_json(path), str(path))
    except RecipeError as error:
        raise CheckpointError(foreign(path.parent) or str(error)) from None


def foreign(folder: Path) -> str:
    """What is wrong with a folder that holds a transformers model or a peft adapter in place of ours; else empty."""
    for name, key in (("config.json", "model_type"), ("adapter_config.json", "peft_type")):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and key in found:
            kind = f"{found[key]} model" if key == "model_type" else f"peft {found[key]} adapter"
            return f"{folder} holds no persona encoder or adapter (its {name} is of a {kind})"
    return ""


def load_weights(model, path: Path, *, without: str | None = None) -> None:
    """Loads all weights, or all whose name does not begin with `without`.

    Strict: raises `CheckpointError` for a missing or corrupt file and for tensors that do not fit.
    """
    if not path.exists():
        raise CheckpointError(f"{path} is missing; is {path.parent} a folder made by save_pretrained?")
    try:
        weights = load_file(path)
        if without:
            own = {name: value for name, value in model.state_dict().items() if name.startswith(without)}
            weights = {name: value for name, value in weights.items() if not name.startswith(without)} | own
        model.load_state_dict(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is corrupt ({error}); copy or save it again") from None
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its config.json: {error}") from None
