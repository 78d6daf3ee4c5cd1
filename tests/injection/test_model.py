"""`PersonalizedLM`: files, batches that do not fit, LoRA."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from persona.encoders import EncoderConfig, UserEncoder
from persona.errors import CheckpointError, EventError, PersonaError
from persona.history import History
from persona.injection import PersonalizedLM, Projector, load_llm
from persona.injection.llm import llm_revision
from persona.training.data import Collator, Example
from persona.training.questions import Question

ASK = "What does this user buy most?"


@pytest.fixture
def saved(model, tmp_path):
    return model.save_pretrained(tmp_path / "adapter")


def test_round_trip_gives_the_same_answers_and_rows(model, saved, shop_histories):
    loaded = PersonalizedLM.from_pretrained(str(saved))
    assert loaded.adapter == model.adapter and not loaded.training
    states, again = model.encoder.read(shop_histories), loaded.encoder.read(shop_histories)
    assert torch.allclose(model.soft_rows(states, [ASK] * 3), loaded.soft_rows(again, [ASK] * 3), atol=1e-5)
    answers = model.generate([ASK] * 3, states)
    assert answers == loaded.generate([ASK] * 3, again) and len(set(answers)) == 3


def test_the_llm_may_lie_beside_the_adapter_or_be_named_again(model, saved, llm_path, tmp_path):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "base_model": "lm"}))
    with pytest.raises(CheckpointError, match="the LLM 'lm' cannot be loaded"):
        PersonalizedLM.from_pretrained(saved)
    assert PersonalizedLM.from_pretrained(saved, llm_path).llm.config.hidden_size == 64
    shutil.copytree(llm_path, saved / "lm")
    assert PersonalizedLM.from_pretrained(saved).llm.config.hidden_size == 64


def test_an_llm_of_another_width_is_refused_with_both_widths(saved, tokenizer, tmp_path):
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"width 64 .*is 32 wide"):
        PersonalizedLM.from_pretrained(saved, tmp_path / "other")


@pytest.mark.parametrize("name", ["adapter_config.json", "projector.safetensors", "encoder/config.json"])
def test_missing_and_damaged_files_are_named(saved, name):
    (saved / name).write_bytes(b"\x01{")
    with pytest.raises(CheckpointError, match=name):
        PersonalizedLM.from_pretrained(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        PersonalizedLM.from_pretrained(saved)


def test_an_encoder_of_another_width_does_not_fit_the_projector(saved, vocabulary, text_encoder):
    UserEncoder(EncoderConfig(width=64, heads=2), vocabulary, text_encoder).save_pretrained(saved / "encoder")
    with pytest.raises(CheckpointError, match=r"projector\.safetensors does not fit"):
        PersonalizedLM.from_pretrained(saved)


def test_an_adapter_config_with_an_unknown_field(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "llm_with": 64}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*llm_with is not a known key"):
        PersonalizedLM.from_pretrained(saved)


def test_an_llm_or_a_lora_in_place_of_an_adapter(llm_path, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no persona encoder or adapter \(its config.json is of a llama"):
        PersonalizedLM.from_pretrained(llm_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(CheckpointError, match=r"no persona encoder or adapter \(its adapter_config.json is of a peft"):
        PersonalizedLM.from_pretrained(tmp_path)


def test_an_llm_that_cannot_be_read(llm_path, tmp_path):
    with pytest.raises(CheckpointError, match="no/such/llm"):
        load_llm("no/such/llm")
    shutil.copytree(llm_path, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_llm(tmp_path / "cut")


def test_a_revision_is_that_of_the_tokenizer_too(llm_path, tmp_path, monkeypatch):
    """A cache of the hub's shape with two revisions, of which `main` has another chat template."""
    commits = {"main": "a" * 40, "old": "b" * 40}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--team--llm" / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        folder = shutil.copytree(llm_path, tmp_path / "models--team--llm" / "snapshots" / commit)
        (folder / "chat_template.jinja").write_text(name)
        (tmp_path / "models--team--llm" / "refs" / name).write_text(commit)
    for options in ({}, {"weights": False}):
        assert load_llm("team/llm", **options)[1].chat_template == "main"
        assert load_llm("team/llm", revision="old", **options)[1].chat_template == "old"
    with pytest.raises(PersonaError, match="device_map: an LLM that is loaded without weights has no use for it"):
        load_llm("team/llm", weights=False, device_map="auto")


def test_the_revision_of_an_llm_is_that_of_its_weights_wherever_they_lie(llm_path, tmp_path):
    shutil.copytree(llm_path, tmp_path / "llm")
    found = [llm_revision(llm_path), llm_revision(tmp_path / "llm")]
    assert found[0] == found[1]
    for name in ("model.safetensors", "chat_template.jinja", "tokenizer.json", "config.json"):
        file = tmp_path / "llm" / name
        file.write_bytes(file.read_bytes() + b" ")
        found.append(llm_revision(tmp_path / "llm"))
    assert len(set(found)) == 5
    with pytest.raises(CheckpointError, match="no/such/llm"):
        llm_revision("no/such/llm")


def test_the_revision_of_an_llm_of_the_hub_is_its_commit(llm_path, tmp_path, monkeypatch):
    """A cache of the hub's shape, read as one without a network is."""
    commit = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(llm_path, tmp_path / "models--team--llm" / "snapshots" / commit)
    (tmp_path / "models--team--llm" / "refs").mkdir()
    (tmp_path / "models--team--llm" / "refs" / "main").write_text(commit)
    assert llm_revision("team/llm") == commit


@pytest.mark.parametrize(
    ("messages", "options", "said"),
    [
        ("What?", {}, "messages is a list of prompts"),
        ({"role": "user", "content": "What?"}, {}, "messages is a list of prompts"),
        ([{"role": "user", "content": "What?"}], {}, "messages is a list of prompts"),
        (["What?", "Why?"], {"states": [None]}, "states is a list with one for each of the 2 messages"),
        (["What?"], {"states": [None], "instructions": ["a", "b"]}, "instructions is a list with one for each"),
        (["What?"], {"instructions": "W"}, "instructions is a list with one for each of the 1 messages"),
    ],
    ids=str,
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_refused(model, messages, options, said):
    with pytest.raises(PersonaError, match=said):
        model.generate(messages, **options)


@pytest.mark.parametrize("instructions", [["a", "b"], [], "a"], ids=str)
def test_states_need_an_instruction_each(model, instructions):
    states = model.encoder.read([History("u"), History("v"), History("w")])
    with pytest.raises(EventError, match=r"instructions is a list with one for each of the 3 states$"):
        model.encoder.tokens(states, instructions)


def test_rows_that_do_not_fit_the_prompts_are_refused(model):
    batch = model.collate([model.template.prompt(ASK, 3)])
    for rows in (torch.ones(2, 64), torch.ones(4, 64), torch.ones(1, 2, 64)):
        with pytest.raises(PersonaError, match="room for 3 user tokens, but there are"):
            model.embed(rows, batch)


def test_a_prompt_with_room_and_no_rows_is_refused(model):
    with pytest.raises(PersonaError, match="room for 3 user tokens, but there are 0"):
        model.complete([model.template.prompt(ASK, 3)], None)


def test_nothing_to_generate(model):
    assert model.generate([]) == []


def test_the_instruction_can_differ_from_the_question(model, shop_histories):
    states = model.encoder.read(shop_histories[:1])
    usual = model.generate([ASK], states)
    assert usual == model.generate([ASK], states, instructions=[ASK])
    others = {model.generate([ASK], states, instructions=[f"number {n}"])[0] for n in range(4)}
    assert len(others | set(usual)) > 1


def test_fewer_tokens_give_the_first_rows(model, shop_histories):
    states = model.encoder.read(shop_histories)
    rows = model.soft_rows(states, [ASK] * 3)
    torch.testing.assert_close(model.soft_rows(states, [ASK] * 3, 2), rows[:, :2])
    assert len(model.generate([ASK], states[:1], count=1)) == 1


def test_the_gain_scales_rows(model):
    projector = Projector(8, 16, 2.5)
    tokens = torch.randn(3, 8)
    with torch.no_grad():
        assert torch.allclose(projector(tokens).norm(dim=1), torch.full((3,), 2.5))
        projector.log_gain.fill_(1.0)
        assert torch.allclose(projector(tokens).norm(dim=1), torch.full((3,), 2.5 * 2.71828), rtol=1e-4)


def test_lora_trains_saves_and_loads(model, shop_histories, tmp_path):
    states = model.encoder.read(shop_histories)
    before = model.generate([ASK] * 3, states)
    torch.manual_seed(0)
    model.add_lora(4)
    assert model.generate([ASK] * 3, states) == before  # LoRA's B starts at zero
    examples = [Example(h, (Question("t", ASK, "garden", ("garden",)),)) for h in shop_histories]
    trained = [p for p in model.parameters() if p.requires_grad]
    names = {name for name, p in model.llm.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    optimizer = torch.optim.Adam(trained, lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        model(**Collator(model)(examples))["loss"].backward()
        optimizer.step()
    model.eval()
    states = model.encoder.read(shop_histories)
    after = model.generate([ASK] * 3, states)
    loaded = PersonalizedLM.from_pretrained(model.save_pretrained(tmp_path / "lora"))
    assert loaded.generate([ASK] * 3, loaded.encoder.read(shop_histories)) == after
    with model.llm.disable_adapter():
        assert model.generate([ASK] * 3, states) != after
