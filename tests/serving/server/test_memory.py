"""A server whose LLM reads user tokens by cross-attention: nothing reaches it without them, whatever goes wrong."""

from argparse import Namespace

import pytest
import torch
from starlette.applications import Starlette

from persona.errors import PersonaError
from persona.injection import PersonalizedLM, load_llm
from persona.serving.export import export_adapter
from persona.serving.memory import check_served
from persona.serving.server.middleware import PersonaMiddleware

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PLAIN = [{"role": "user", "content": "What next?"}]


@pytest.fixture(scope="module", params=["cross_attention", "both"])
def model(request, llm_path, model):
    """The adapter of the other tests, with cross-attention."""
    torch.manual_seed(2)
    llm, tokenizer = load_llm(llm_path)
    encoder = model.encoder
    return PersonalizedLM(
        llm, tokenizer, encoder, base_model=str(llm_path), domain="shop", injection=request.param, cross_every=1
    ).eval()


@pytest.fixture
def app(make, ana):
    return make()


@pytest.fixture
def ours(app):
    return app.service.encoding.states


def asked(user="ana", **more):
    return {"model": "m", "messages": PLAIN, "user": user, **more}


def memory(request, rows_of):
    """The rows of the message in front, and the other messages."""
    first, *rest = request["messages"]
    assert first["role"] == "persona_memory" and [p["type"] for p in first["content"]] == ["prompt_embeds"]
    return rows_of(first["content"][0]["data"]), rest


def test_a_chat_brings_its_user_in_front(app, call, vllm, rows_of, model, ours):
    chat = [{"role": "system", "content": "Be brief."}, *PLAIN]
    assert call(app, "POST", CHAT, asked(messages=chat)).outcome == ("personalized", None)
    rows, rest = memory(vllm.last, rows_of)
    expected = model.soft_rows([ours.get("ana")], ["What next?"])[0]
    assert rows.shape == (32, 64) and (rows[4:] == 1).all()
    torch.testing.assert_close(rows[:4], expected, atol=1e-5, rtol=0)
    assert rest[0] == chat[0]
    if model.adapter.injection == "both":
        torch.testing.assert_close(rows_of(rest[1]["content"][0]["data"]), expected, atol=1e-5, rtol=0)
        assert rest[1]["content"][1:] == [{"type": "text", "text": "What next?"}]
    else:
        assert rest == chat


def test_a_completion_brings_them_before_its_text(app, call, vllm, rows_of, model, ours):
    reply = call(app, "POST", COMPLETION, {"model": "m", "prompt": ["one", [5, 6, 7]], "user": "ana"})
    assert reply.outcome == ("personalized", None) and "prompt" not in vllm.last
    for prompt, data in zip(["one", [5, 6, 7]], vllm.last["prompt_embeds"]):
        expected = model.soft_rows([ours.get("ana")], [model.template.instruction(prompt)])[0]
        rows = rows_of(data)
        torch.testing.assert_close(rows[:4], expected, atol=1e-5, rtol=0)
        placed = model.template.place(prompt, 4)
        assert placed.memory == 4 and len(rows) == 32 + len(placed.ids)
        torch.testing.assert_close(rows[32:], model.prompt_rows(placed, expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("user", [None, "a stranger"])
def test_who_is_not_known_brings_zeros(app, call, vllm, rows_of, user, model):
    outcome = ("plain", "unknown-user" if user else "no-user")
    assert call(app, "POST", CHAT, asked(user)).outcome == outcome
    rows, rest = memory(vllm.last, rows_of)
    assert rest == PLAIN and (rows[:4] == 0).all() and (rows[4:] == 1).all()
    assert call(app, "POST", COMPLETION, {"model": "m", "prompt": "one", "user": user}).outcome == outcome
    rows = rows_of(vllm.last["prompt_embeds"])
    assert (rows[:4] == 0).all() and torch.equal(rows[32:], model.prompt_rows(model.template.place("one", 0), None))


def test_a_chat_without_a_user_turn_brings_zeros(app, call, vllm, rows_of):
    chat = [{"role": "system", "content": "Be brief."}]
    assert call(app, "POST", CHAT, asked(messages=chat)).outcome == ("plain", "no-user-turn")
    rows, rest = memory(vllm.last, rows_of)
    assert rest == chat and (rows[:4] == 0).all()


def test_what_fails_or_is_slow_brings_zeros_or_is_refused(make, ana, call, vllm, rows_of, faulty, monkeypatch):
    app = make(budget_ms=300)
    faulty.fault = lambda: (_ for _ in ()).throw(RuntimeError("out of memory"))
    assert call(app, "POST", CHAT, asked()).outcome[0] == "plain"
    assert (memory(vllm.last, rows_of)[0][:4] == 0).all()
    assert call(app, "POST", COMPLETION, {"model": "m", "prompt": "one", "user": "ana"}).outcome[0] == "plain"
    assert (rows_of(vllm.last["prompt_embeds"])[:4] == 0).all()
    seen = len(vllm.requests)
    app.service._pending = app.service.config.max_pending  # nobody is there to embed the text
    reply = call(app, "POST", COMPLETION, {"model": "m", "prompt": "one"})
    assert (reply.status, reply.json["error"]["code"]) == (503, "busy")
    assert call(app, "POST", CHAT, asked()).outcome == ("plain", "busy")
    assert (memory(vllm.last, rows_of)[0][:4] == 0).all()
    app.service._pending = 0
    monkeypatch.setattr(app.service.encoding.model, "prompt_rows", lambda *_: 1 / 0)
    reply = call(app, "POST", COMPLETION, {"model": "m", "prompt": "one"})
    assert (reply.status, reply.json["error"]["code"]) == (503, "failed")
    assert len(vllm.requests) == seen + 1


@pytest.mark.parametrize(
    ("path", "field"),
    [
        (CHAT, {"truncate_prompt_tokens": 8}),
        (CHAT, {"truncate_prompt_tokens": 0}),
        (CHAT, {"echo": True}),
        (CHAT, {"use_beam_search": True}),
        (COMPLETION, {"echo": True}),
        (COMPLETION, {"suffix": "."}),
        (COMPLETION, {"truncate_prompt_tokens": 8}),
        (CHAT, {"messages": [{"role": "persona_memory", "content": "me"}, *PLAIN]}),
        (CHAT, {"chat_template_kwargs": {"padding": "max_length", "max_length": 64}}),
        (CHAT, {"chat_template_kwargs": {"tokenizer_kwargs": {"padding_side": "left"}}}),
        (CHAT, {"chat_template_kwargs": {"messages": []}}),
    ],
)
def test_what_would_cut_the_user_off_is_refused(app, call, vllm, path, field):
    reply = call(app, "POST", path, {"prompt": "one", **asked(), **field})
    assert reply.status == 400 and next(iter(field)) in (reply.json["error"]["param"], "messages")
    assert not vllm.requests


def test_what_a_template_reads_itself_is_let_through(app, call):
    assert call(app, "POST", CHAT, asked(chat_template_kwargs={"enable_thinking": False})).status == 200


@pytest.mark.parametrize("prompt", [[5, 10**6], [-1], [1.5], {"text": "one"}, [], None, "before <prompt_embeds> after"])
@pytest.mark.parametrize("user", ["ana", None])
def test_a_prompt_that_cannot_be_read_is_the_callers_fault(app, call, vllm, prompt, user):
    reply = call(app, "POST", COMPLETION, {"model": "m", "prompt": prompt, "user": user})
    assert (reply.status, reply.json["error"]["code"]) == (400, "bad-prompt") and not vllm.requests


def test_too_many_prompts_are_refused(app, call, vllm):
    reply = call(app, "POST", COMPLETION, {"model": "m", "prompt": ["one"] * 65, "user": "ana"})
    assert (reply.status, reply.json["error"]["code"]) == (400, "too-long") and not vllm.requests


def test_fewer_tokens_divide_those_that_the_llm_reads(app, call, vllm, rows_of, model, ours):
    reply = call(app, "POST", CHAT, asked(), {"x-persona-tokens": "2"})
    assert reply.outcome == ("personalized", None)
    rows, _ = memory(vllm.last, rows_of)
    expected = model.soft_rows([ours.get("ana")], ["What next?"], 2)[0]
    torch.testing.assert_close(rows[:4], expected.repeat_interleave(2, 0), atol=1e-5, rtol=0)
    reply = call(app, "POST", CHAT, asked(), {"x-persona-tokens": "3"})
    assert reply.status == 400 and "divides 4" in reply.json["error"]["message"]


def test_it_starts_only_in_front_of_its_own_checkpoint(app, model, llm_path, tmp_path):
    served = export_adapter(model.save_pretrained(tmp_path / "adapter"), tmp_path / "served")
    check_served(app.service.memory, str(served))
    check_served(None, str(llm_path))
    for memory, other in ((app.service.memory, str(llm_path)), (app.service.memory, "hub/name"), (None, str(served))):
        with pytest.raises(PersonaError, match=r"user tokens are for .*, but .* has .*persona export"):
            check_served(memory, other)
    inner = Starlette()
    inner.state.args = Namespace(enable_prompt_embeds=True, model=str(llm_path), api_key=None)
    said = starting(PersonaMiddleware(inner, app.service), inner)
    assert said["type"] == "lifespan.startup.failed" and "persona export" in said["message"]


def starting(app, inner):
    """What the application says first when a server starts."""
    import asyncio

    said = []

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        said.append(message)

    asyncio.run(app({"type": "lifespan", "asgi": {"version": "3.0"}, "app": inner}, receive, send))
    return said[0]
