"""Cross-attention in a real vLLM behind our middleware: chats and completions, many at once, equal Hugging Face."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from persona import Persona
from persona.injection import PersonalizedLM, load_llm

from .conftest import ADAPTER, FLAGS, LLM, serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SYSTEM = {"role": "system", "content": "You answer questions about the users of a shop in one word."}
QUESTIONS = ["What does this user buy most?", "What did this user buy most lately?"]


@pytest.fixture(scope="module", params=["cross_attention", "both"])
def adapter(request, tmp_path_factory):
    """The demo's encoder with layers that nobody trained, so that users are answered differently."""
    soft = PersonalizedLM.from_pretrained(ADAPTER)
    torch.manual_seed(0)
    llm, tokenizer = load_llm(LLM)
    model = PersonalizedLM(
        llm, tokenizer, soft.encoder, base_model=LLM, domain="shop", injection=request.param, cross_every=2
    )
    model.projector.load_state_dict(soft.projector.state_dict())
    with torch.no_grad():
        for layer in model.cross_attention.layers.values():
            layer.gate.fill_(2.0)
            layer.to_k.weight.mul_(4)
            layer.to_o.weight.mul_(6)
    return model.save_pretrained(tmp_path_factory.mktemp(request.param) / "adapter")


@pytest.fixture(scope="module")
def reference(adapter, database):
    return Persona.from_pretrained(adapter, store=f"sqlite:///{database}")


@pytest.fixture(scope="module")
def expected(reference, histories):
    """Answers to (user, messages), each computed alone; the last users are nobody."""
    cases = [
        (user, [SYSTEM, {"role": "user", "content": q}] if n % 2 else [{"role": "user", "content": q}])
        for n, q in enumerate(QUESTIONS)
        for user in [*list(histories)[:9], None]
    ]
    answers = [reference.generate(user, messages, max_new_tokens=8).text for user, messages in cases]
    assert len(set(answers)) > 5, "answers tell users apart"
    return cases, answers


@pytest.fixture(scope="module")
def server(adapter, database, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    command = ["-m", "persona.cli", "serve", "--adapter", str(adapter), "--injection", expected_kind(adapter)]
    arguments = ["--store", f"sqlite:///{database}", "--budget-ms", "30000", *FLAGS]
    with serving([*command, *arguments], folder / "log", environment={"XDG_CACHE_HOME": str(folder)}) as server:
        yield server


def expected_kind(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())["injection"]


def test_twenty_at_once_chats_and_completions(server, reference, expected):
    cases, answers = expected
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    assert name == LLM  # callers know it by its own name, not by where it was exported to
    template = reference.model.template
    common = {"model": name, "temperature": 0, "max_tokens": 8}

    def chat(user, messages):
        return client.chat.completions.create(messages=messages, user=user or openai.NOT_GIVEN, **common)

    def completion(user, messages):
        text = template.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return client.completions.create(
            prompt=text, user=user or openai.NOT_GIVEN, extra_body={"add_special_tokens": False}, **common
        )

    for _ in range(2):  # the second time from the prefix cache
        with ThreadPoolExecutor(20) as pool:
            chats = [pool.submit(chat, *case) for case in cases]
            completions = [pool.submit(completion, *case) for case in cases]
            assert [c.result().choices[0].message.content.strip() for c in chats] == answers
            assert [c.result().choices[0].text.strip() for c in completions] == answers


def test_a_stream_and_what_is_refused(server, expected):
    cases, answers = expected
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    user, messages = cases[0]
    common = {"model": LLM, "temperature": 0, "max_tokens": 8, "user": user}
    stream = client.chat.completions.create(messages=messages, stream=True, **common)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream if piece.choices).strip() == answers[0]
    with pytest.raises(openai.BadRequestError, match="truncate_prompt_tokens"):
        client.chat.completions.create(messages=messages, extra_body={"truncate_prompt_tokens": 4}, **common)
    with pytest.raises(openai.BadRequestError, match="persona_memory"):
        client.chat.completions.create(messages=[{"role": "persona_memory", "content": "x"}], **common)


def test_the_command_line_refuses_another_kind_and_a_gateway(adapter):
    for arguments, said in (
        (["--injection", "soft_prompt"], "was trained for the injection"),
        (["--upstream", "http://127.0.0.1:1"], "a gateway cannot see"),
    ):
        command = [sys.executable, "-m", "persona.cli", "serve", "--adapter", str(adapter), *arguments]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 1 and said in run.stderr


def test_in_process(adapter, database, expected, tmp_path, monkeypatch):
    """`Persona` and `wrap` on the offline engine, in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from persona import wrap
    from persona.errors import PersonaError

    cases, answers = expected
    persona = Persona.from_pretrained(
        adapter, store=f"sqlite:///{database}", engine="vllm", max_model_len=512, kv_cache_memory_bytes=64 * 2**20
    )
    assert [a.text for a in persona.generate_batch(cases, max_new_tokens=8)] == answers
    llm = wrap(persona.engine.engine, persona)
    sampling = persona.engine._sampling(temperature=0.0, max_tokens=8)
    for user_id in ([user for user, _ in cases], None):
        outputs = llm.chat([messages for _, messages in cases], sampling, user_id=user_id, use_tqdm=False)
        found = [out.outputs[0].text.strip() for out in outputs]
        nobody = [answers[9]] * 10 + [answers[19]] * 10
        assert found == (nobody if user_id is None else answers)
    with pytest.raises(PersonaError, match="text or token ids only"):
        llm.generate({"prompt_embeds": torch.ones(3, 128)}, sampling)
    for name in ("enqueue", "enqueue_chat", "beam_search"):
        with pytest.raises(PersonaError, match=rf"{name}\(\) brings no user tokens"):
            getattr(llm, name)(["a prompt"], sampling)
    for argument in ("tokenization_kwargs", "chat_template_kwargs", "chat_template"):
        with pytest.raises(PersonaError, match=f"{argument} could move the user tokens"):
            llm.chat(cases[0][1], sampling, user_id=cases[0][0], **{argument: {"padding": "max_length"}})
    with pytest.raises(PersonaError, match="the role persona_memory is persona's own"):
        llm.chat([{"role": "persona_memory", "content": "me"}], sampling)
    with pytest.raises(PersonaError, match="what `persona export` writes"):
        wrap(persona.engine.engine, Persona.from_pretrained(ADAPTER, engine=None, store=f"sqlite:///{database}"))
    shutil.rmtree(tmp_path / "persona")
