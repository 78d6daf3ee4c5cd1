"""Saving and loading an encoder; whatever is damaged is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona.encoders import EncoderConfig, UserEncoder
from persona.errors import CheckpointError

ASK = "What does this user buy most?"


@pytest.fixture
def saved(encoder, tmp_path):
    return encoder.save_pretrained(tmp_path / "new" / "encoder")


def load(folder, text_encoder):
    return UserEncoder.from_pretrained(folder, text_encoder)


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def test_round_trip_gives_the_same_tokens(encoder, saved, text_encoder, strange_history):
    loaded = load(str(saved), text_encoder)
    assert not loaded.training and loaded.config == encoder.config and loaded.vocabulary == encoder.vocabulary
    a = encoder.tokens(encoder.read([strange_history]), [ASK])[0]
    b = loaded.tokens(loaded.read([strange_history]), [ASK])[0]
    assert torch.equal(a.tokens, b.tokens)
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "4 instruction-aware user tokens of width 32" in card and "purchase" in card


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors"])
def test_missing_file(saved, text_encoder, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing; is .* a folder made by save_pretrained"):
        load(saved, text_encoder)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json"])
@pytest.mark.parametrize("content", [b"{broken", b"\xff\xfe\x00", b"", b"[1, 2]", b"null", b'{"width": []}'])
def test_broken_json(saved, text_encoder, name, content):
    (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load(saved, text_encoder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_corrupt_weights(saved, text_encoder, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt"):
        load(saved, text_encoder)


def test_missing_and_extra_tensors(saved, text_encoder):
    path = saved / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if k != "start"}, path)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit its config\.json.*start"):
        load(saved, text_encoder)
    save_file({**weights, "surplus": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit its config\.json.*surplus"):
        load(saved, text_encoder)


def test_config_of_another_model(saved, text_encoder):
    change(saved / "config.json", width=64)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit its config\.json.*size mismatch"):
        load(saved, text_encoder)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("width", 30, "width 30 must be an even multiple of heads 4"),
        ("tokens", 0, "tokens must be at least 1"),
        ("dropout", 1.0, "dropout must be in"),
        ("tokens", "four", "tokens .*four"),
        ("colour", "red", "colour is not a known key"),
        ("backbone", "abacus", "abacus"),
    ],
)
def test_bad_config_value(saved, text_encoder, field, value, message):
    change(saved / "config.json", **{"heads": 4, field: value})
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        load(saved, text_encoder)


def test_a_folder_of_something_else(llm_path, tmp_path):
    for path in (llm_path, str(llm_path)):
        with pytest.raises(CheckpointError) as refused:
            UserEncoder.from_pretrained(path)
        said = f"{llm_path} holds no persona encoder or adapter (its config.json is of a llama model)"
        assert str(refused.value) == said
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(CheckpointError, match=r"no persona encoder or adapter \(its adapter_config.json is of a peft"):
        UserEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "nobody/no-such-encoder", "not a name!"])
def test_nothing_there(name):
    with pytest.raises(CheckpointError, match="neither a folder nor a repository"):
        UserEncoder.from_pretrained(name)


@pytest.mark.parametrize(
    "bad",
    [{"width": 30, "heads": 4}, {"width": 12, "heads": 4}, {"heads": 0}, {"tokens": 0}, {"layers": -1}, {"dropout": 1}],
)
def test_config_checks_itself(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EncoderConfig(**bad)
