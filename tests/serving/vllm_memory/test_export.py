"""The exported folder: links, weights, index, config, and a chat template that changes nothing but the memory."""

import json
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from persona.errors import CheckpointError, PersonaError
from persona.injection.soft_prompt import PLACEHOLDER, PLAIN_TEMPLATE
from persona.serving.vllm_memory import ARCHITECTURES, ROLE, export_checkpoint
from persona.serving.vllm_memory.export import memory_template
from persona.serving.vllm_offline import import_vllm

CHAT = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "What now?"},
    {"role": "assistant", "content": "This."},
    {"role": "user", "content": "And then?"},
]
PARTS = (
    "{{- bos_token }}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {
    "plain": PLAIN_TEMPLATE,
    "parts": PARTS,
    "begins with a line": "\n  {% if true %}\n{{ bos_token }}{% endif %}\n" + PARTS,
    "first message apart": (
        "{%- if messages[0]['role'] == 'system' %}{{ '<<' + messages[0]['content'] + '>>' }}"
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
        "{%- for message in loop_messages %}{{ loop.index0 }}{{ message['content'] }}{%- endfor %}"
        "{{ messages | length }}"
    ),
    "macros": (
        "{%- macro write(content) %}{% for item in content %}{{ item.text }}{% endfor %}{{ messages | length }}"
        "{% endmacro %}{% for m in messages %}{{ write(m.content) }}{% endfor %}"
    ),
    "in a namespace": (
        "{%- set ns = namespace(last=messages|length - 1) %}{%- for m in messages[::-1] %}"
        "{{ (messages|length - 1) - loop.index0 }}{{ m.content }}{%- endfor %}{{ ns.last }}"
    ),
}


@pytest.fixture
def exported(deploy):
    return deploy(tokens=40, every=2)


def render(tokenizer, template, messages):
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, bos_token="<s>"
    )


def in_form(messages, form):
    """The messages as vLLM hands them to a template."""
    if form == "string":
        return messages
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


@pytest.mark.vllm
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_is_as_before_after_the_memory(tokenizer, template):
    import_vllm()
    from vllm.renderers.hf import _detect_content_format

    made = memory_template(template)
    form = _detect_content_format(template, default="string")
    assert _detect_content_format(made, default="string") == form
    memory = {"role": ROLE, "content": PLACEHOLDER}
    for chat in (CHAT, CHAT[1:], CHAT[1:2]):
        expected = render(tokenizer, template, in_form(chat, form))
        assert expected and PLACEHOLDER not in expected
        assert render(tokenizer, made, in_form(chat, form)) == expected
        assert render(tokenizer, made, in_form([memory, *chat], form)) == PLACEHOLDER + expected
        # vLLM puts a system message first where it was asked as a developer's.
        assert render(tokenizer, made, in_form([chat[0], memory, *chat[1:]], form)) == PLACEHOLDER + expected


def test_the_test_templates_are_of_both_forms():
    import_vllm()
    from vllm.renderers.hf import _detect_content_format

    assert {_detect_content_format(t, default="string") for t in TEMPLATES.values()} == {"string", "openai"}


def test_the_exported_tokenizer_writes_the_memory_as_one_token(exported):
    base, served = (AutoTokenizer.from_pretrained(exported.folder / name) for name in ("base", "served"))
    assert base.chat_template in served.chat_template
    served.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
    chat = [{"role": ROLE, "content": PLACEHOLDER}, *CHAT]
    ids = served.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    expected = base.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids == [served.convert_tokens_to_ids(PLACEHOLDER), *expected]


def test_a_tokenizer_without_template_and_one_with_several(exported, tmp_path):
    base, out = exported.folder / "base", tmp_path / "other"
    (base / "chat_template.jinja").unlink()
    export_checkpoint(base, out, exported.state, tokens=4, every=2)
    assert AutoTokenizer.from_pretrained(out).chat_template == memory_template(PLAIN_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": PARTS, "tool_use": PLAIN_TEMPLATE}
    tokenizer.save_pretrained(base)
    export_checkpoint(base, out, exported.state, tokens=4, every=2)
    assert AutoTokenizer.from_pretrained(out).chat_template == {
        "default": memory_template(PARTS),
        "tool_use": memory_template(PLAIN_TEMPLATE),
    }


def test_the_llms_files_are_links_and_ours_are_files(exported):
    base, served = exported.folder / "base", exported.folder / "served"
    linked = {path.name for path in served.iterdir() if path.is_symlink()}
    assert linked >= {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert all((served / name).resolve() == (base / name).resolve() for name in linked)
    own = {path.name for path in served.iterdir()} - linked
    assert own == {"config.json", "persona.safetensors", "chat_template.jinja"}
    assert stat.S_IMODE(served.stat().st_mode) == 0o755


def test_config_and_weights(exported):
    base, served = (json.loads((exported.folder / n / "config.json").read_text()) for n in ("base", "served"))
    assert served["architectures"] == ["PersonaLlamaForCausalLM"] == [ARCHITECTURES[base["architectures"][0]]]
    assert served["persona_memory"] == {"tokens": 40, "slots": 64, "every": 2}
    assert served["persona_layers"] == ""  # not said
    assert {k: v for k, v in served.items() if k != "architectures" and not k.startswith("persona_")} == {
        k: v for k, v in base.items() if k != "architectures"
    }
    weights = load_file(exported.folder / "served" / "persona.safetensors")
    assert len(weights) == 14
    assert torch.equal(weights["model.layers.2.user_attn.to_q.weight"], exported.state["2.to_q.weight"])
    assert torch.equal(weights["model.layers.0.user_attn.gate"], exported.state["0.gate"])


def test_a_sharded_llm_keeps_its_index(exported, tmp_path):
    base, out = tmp_path / "sharded", tmp_path / "out"
    exported.llm.save_pretrained(base, max_shard_size="100KB")
    exported.tokenizer.save_pretrained(base)
    export_checkpoint(base, out, exported.state, tokens=4, every=2)
    before, index = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (base, out))
    assert len(set(before["weight_map"].values())) > 1
    assert before["weight_map"].items() <= index["weight_map"].items()
    added = {k: v for k, v in index["weight_map"].items() if k not in before["weight_map"]}
    assert set(added) == set(load_file(out / "persona.safetensors")) and set(added.values()) == {"persona.safetensors"}
    assert all((out / file).exists() for file in index["weight_map"].values())
    # Hugging Face still finds the LLM in it.
    again = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), exported.llm.parameters()))


def test_a_second_export_replaces_the_first(exported):
    served = exported.folder / "served"
    (served / "stale.json").write_text("{}")
    state = {name: tensor + 1 for name, tensor in exported.state.items()}
    assert export_checkpoint(exported.folder / "base", served, state, tokens=4, every=2) == served
    assert json.loads((served / "config.json").read_text())["persona_memory"]["slots"] == 32
    assert torch.equal(load_file(served / "persona.safetensors")["model.layers.0.user_attn.gate"], state["0.gate"])
    assert not (served / "stale.json").exists()
    assert {path.name for path in exported.folder.iterdir()} == {"base", "served"}  # nothing is left beside it


def test_the_same_export_again_touches_nothing(exported):
    served = exported.folder / "served"

    def written():
        return {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in (served, *served.iterdir())}

    before = written()
    export_checkpoint(exported.folder / "base", served, exported.state, tokens=40, every=2)
    assert written() == before
    assert {path.name for path in exported.folder.iterdir()} == {"base", "served"}


def test_several_at_once_write_one(exported, tmp_path):
    def export(_):
        return export_checkpoint(exported.folder / "base", tmp_path / "out", exported.state, tokens=4, every=2)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(export, range(16))) == {tmp_path / "out"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert len(load_file(tmp_path / "out" / "persona.safetensors")) == 14


def test_a_failed_export_leaves_the_first(exported):
    served = exported.folder / "served"
    before = {path.name: path.read_bytes() for path in served.iterdir()}
    (exported.folder / "base" / "tokenizer.json").write_text("no json")
    with pytest.raises(CheckpointError, match="tokenizer"):
        export_checkpoint(exported.folder / "base", served, exported.state, tokens=4, every=2)
    found = {path.name: path.read_bytes() for path in served.iterdir() if path.name != "tokenizer.json"}
    assert found == {name: content for name, content in before.items() if name != "tokenizer.json"}
    assert {path.name for path in exported.folder.iterdir()} == {"base", "served"}


@pytest.mark.parametrize("kind", ["hard link", "copy"])
def test_where_links_do_not_work(exported, tmp_path, monkeypatch, kind):
    def refuse(*args):
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "symlink", refuse)
    if kind == "copy":
        monkeypatch.setattr(os, "link", refuse)
    out = export_checkpoint(exported.folder / "base", tmp_path / "out", exported.state, tokens=4, every=2)
    base_file, out_file = exported.folder / "base" / "model.safetensors", out / "model.safetensors"
    assert not out_file.is_symlink() and out_file.read_bytes() == base_file.read_bytes()
    assert (out_file.stat().st_ino == base_file.stat().st_ino) == (kind == "hard link")


def test_refuses_what_is_not_there(exported, tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder nor"):
        export_checkpoint("nobody/nothing", tmp_path / "out", exported.state, tokens=4, every=2)
    base = tmp_path / "bare"
    shutil.copytree(exported.folder / "base", base)
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        export_checkpoint(base, tmp_path / "out", exported.state, tokens=4, every=2)
    (base / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        export_checkpoint(base, tmp_path / "out", exported.state, tokens=4, every=2)
    assert not (tmp_path / "out").exists()


def test_refuses_layers_of_another_llm(exported, tmp_path):
    base, out = exported.folder / "base", tmp_path / "out"
    with pytest.raises(PersonaError, match=r"1\.gate should be \(1,\), but is absent"):
        export_checkpoint(base, out, exported.state, tokens=4, every=1)
    with pytest.raises(PersonaError, match=r"2\.gate should be absent"):
        export_checkpoint(base, out, exported.state, tokens=4, every=3)
    wrong = {**exported.state, "0.to_k.weight": torch.zeros(32, 64)}
    with pytest.raises(PersonaError, match=r"0\.to_k\.weight"):
        export_checkpoint(base, out, wrong, tokens=4, every=2)


def test_refuses_numbers_and_folders_that_cannot_be(exported, tmp_path):
    base = exported.folder / "base"
    with pytest.raises(PersonaError, match="do not fit"):
        export_checkpoint(base, tmp_path / "out", exported.state, tokens=33, every=2, slots=32)
    with pytest.raises(PersonaError, match="the LLM itself"):
        export_checkpoint(base, base, exported.state, tokens=4, every=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(PersonaError, match="something else"):
        export_checkpoint(base, tmp_path / "mine", exported.state, tokens=4, every=2)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_refuses_other_families(exported, tmp_path):
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=600)).save_pretrained(base)
    with pytest.raises(PersonaError, match="not for GPT2LMHeadModel"):
        export_checkpoint(base, tmp_path / "out", exported.state, tokens=4, every=2)


@pytest.mark.parametrize("family", ["mistral", "gemma3"], indirect=True)
def test_refuses_a_sliding_window(family, family_llm, exported, tmp_path):
    family_llm.save_pretrained(tmp_path / "sliding")
    said = "sliding window" if family == "mistral" else "not for Gemma3ForCausalLM"
    with pytest.raises(PersonaError, match=said):
        export_checkpoint(tmp_path / "sliding", tmp_path / "out", exported.state, tokens=4, every=2)
