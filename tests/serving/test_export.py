"""What an adapter with cross-attention is exported to, and who refuses it."""

import json
from itertools import pairwise

import openai
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from persona import Persona, wrap
from persona.cli import app
from persona.errors import CheckpointError, PersonaError
from persona.injection import PersonalizedLM, Prompt, load_llm
from persona.serving.export import export_adapter
from persona.serving.memory import Memory, check_served
from persona.serving.server.config import ServerConfig
from persona.serving.server.launch import command


@pytest.fixture
def adapter(llm_path, encoder, tmp_path):
    """An adapter with cross-attention on the tiny Llama."""
    torch.manual_seed(2)
    llm, tokenizer = load_llm(llm_path)
    model = PersonalizedLM(
        llm, tokenizer, encoder, base_model=str(llm_path), injection="cross_attention", cross_every=1, domain="shop"
    )
    return model.save_pretrained(tmp_path / "adapter")


def test_the_command_writes_a_checkpoint_that_links_to_the_llm(adapter, llm_path, tmp_path):
    out = tmp_path / "served"
    run = CliRunner().invoke(app, ["export", str(adapter), "--out", str(out)])
    assert run.exit_code == 0 and f"wrote {out}" in run.output
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["PersonaLlamaForCausalLM"]
    assert config["persona_memory"] == {"tokens": 4, "slots": 32, "every": 1}
    assert (out / "model.safetensors").resolve() == (llm_path / "model.safetensors").resolve()
    trained = load_file(adapter / "cross_attention.safetensors")
    served = load_file(out / "persona.safetensors")
    assert len(served) == len(trained) == 14
    assert torch.equal(served["model.layers.1.user_attn.to_q.weight"], trained["1.to_q.weight"])


def test_without_a_folder_it_goes_to_the_cache_and_each_training_to_its_own(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = export_adapter(adapter)
    assert first.parent == tmp_path / "cache" / "persona" and first.name.startswith("shop-")
    assert export_adapter(adapter) == first
    model = PersonalizedLM.from_pretrained(adapter)
    with torch.no_grad():
        model.cross_attention.layers["0"].gate.fill_(1)
    model.save_pretrained(adapter)
    again = export_adapter(adapter)
    assert again != first
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (first, again))
    assert old["persona_memory"] == new["persona_memory"] and old["persona_layers"] != new["persona_layers"]
    memory = Memory.of(model.adapter)
    check_served(memory, str(again))
    with pytest.raises(PersonaError, match="has other cross-attention layers"):
        check_served(memory, str(first))


def test_what_cannot_be_exported(adapter, model, tmp_path):
    with pytest.raises(PersonaError, match="no cross-attention layers: vLLM serves its LLM as it is"):
        export_adapter(model.save_pretrained(tmp_path / "soft"), tmp_path / "out")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora": True}))
    with pytest.raises(PersonaError, match="has a LoRA, which the export would leave out"):
        export_adapter(adapter, tmp_path / "out")
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "layers_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"is not the file that adapter_config\.json was written with"):
        export_adapter(adapter, tmp_path / "out")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "cross_attention.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"cross_attention\.safetensors cannot be read"):
        export_adapter(adapter, tmp_path / "out")
    (adapter / "cross_attention.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cross_attention\.safetensors cannot be read"):
        export_adapter(adapter, tmp_path / "out")


def test_serve_picks_the_export_the_block_size_and_the_name(adapter, llm_path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    argv, environment = command(ServerConfig(adapter=str(adapter)), [], {}, cuda=False)
    flags = dict(pairwise(argv))
    assert flags["--model"] == str(export_adapter(adapter)) and flags["--served-model-name"] == str(llm_path.resolve())
    assert flags["--block-size"] == "32" and environment["PERSONA_LLM"] == str(llm_path.resolve())
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    with pytest.raises(PersonaError, match=r"--chat-template does not go with user tokens: the exported one"):
        command(ServerConfig(adapter=str(adapter)), ["--chat-template", str(llm_path / "chat_template.jinja")], {})
    argv, _ = command(ServerConfig(adapter=str(adapter)), ["--served-model-name", "mine"], {}, cuda=True)
    assert argv.index("mine") > argv.index("--served-model-name")


def test_a_plain_endpoint_and_a_plain_model_are_refused(adapter, llm_path, tmp_path):
    persona = Persona.from_pretrained(adapter, engine=None, store=f"sqlite:///{tmp_path / 'events.db'}")
    client = openai.OpenAI(base_url="http://127.0.0.1:1/v1", api_key="none")
    with pytest.raises(PersonaError, match="a plain endpoint has none: run `persona serve`"):
        wrap(client, persona, mode="embeds")
    modes = wrap(client, persona)._persona_modes
    assert modes.decide("http://plain", None, {"data": [{"owned_by": "vllm"}]}) == "text"  # the layers are not there
    llm, _ = load_llm(llm_path)
    assert wrap(client, persona, tokens=2) is not client
    with pytest.raises(PersonaError, match="divides 4: not 3"):
        wrap(client, persona, tokens=3)
    with pytest.raises(PersonaError, match="which this model does not have"):
        wrap(llm, persona)


@pytest.mark.vllm
def test_a_stock_engine_takes_no_memory(engine):
    with pytest.raises(PersonaError, match="serve what `persona export` writes"):
        engine.inputs([Prompt([5, 6], 0, 0, memory=4)], torch.ones(4, 64))
