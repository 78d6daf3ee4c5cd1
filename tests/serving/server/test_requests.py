"""What a caller may not send, in every shape, and bodies that are none."""

import asyncio

import pytest

from persona.serving.server import requests
from persona.serving.server.errors import Refused

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
DATA = "AAAA"


def chat(content, **more):
    return {"messages": [{"role": "user", "content": "before"}, {"role": "user", "content": content}], **more}


EMBEDDINGS = [
    chat([{"type": "prompt_embeds", "data": DATA}]),
    chat([{"type": "prompt_embeds", "data": None}]),
    chat([{"type": "text", "text": "a"}, {"type": "prompt_embeds", "data": DATA}]),
    chat([{"prompt_embeds": DATA}]),
    chat([{"prompt_embeds": {"data": DATA}, "type": "text", "text": "a"}]),
    chat([{"type": "image_embeds", "image_embeds": DATA}]),
    chat([{"audio_embeds": DATA}]),
    chat({"type": "prompt_embeds", "data": DATA}),
    {"messages": [{"role": "tool", "content": [{"type": "prompt_embeds", "data": DATA}]}]},
    {"messages": [{"role": "system", "content": [{"type": "prompt_embeds", "data": DATA}]}, 3, None, {"content": 5}]},
    chat("x", prompt_embeds=DATA),
    chat("x", prompt_embeds=[DATA]),
    chat("x", prompt_embeds=""),
]


@pytest.mark.parametrize("body", EMBEDDINGS)
@pytest.mark.parametrize("path", [CHAT, COMPLETION, "/tokenize"])
@pytest.mark.parametrize("user", ["ana", None])
def test_a_callers_own_embeddings_are_refused(make, call, vllm, ana, path, body, user):
    reply = call(make(), "POST", path, {**body, "user": user})
    assert (reply.status, reply.json["error"]["param"]) == (400, "prompt_embeds")
    assert "embeddings are made by this server" in reply.json["error"]["message"] and not vllm.requests


@pytest.mark.parametrize(
    "path, more, param",
    [
        (CHAT, {"cache_salt": "theirs"}, "cache_salt"),
        (CHAT, {"cache_salt": ""}, "cache_salt"),
        (COMPLETION, {"cache_salt": 0}, "cache_salt"),
        ("/tokenize", {"cache_salt": "theirs"}, "cache_salt"),
        (CHAT, {"prompt_logprobs": 0}, "prompt_logprobs"),
        (COMPLETION, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (COMPLETION, {"echo": True, "logprobs": 0}, "echo"),
        (COMPLETION, {"echo": 1, "logprobs": 3}, "echo"),
        (CHAT, {"echo": True, "logprobs": True}, "echo"),
        (CHAT, {"echo": True, "top_logprobs": 0}, "echo"),
    ],
)
def test_fields_that_are_the_servers_or_would_stop_the_engine(make, call, vllm, counted, path, more, param):
    app = make()
    reply = call(app, "POST", path, {"prompt": "x", "messages": [], **more})
    error = reply.json["error"]
    assert (reply.status, error["param"], error["code"], error["type"]) == (
        400, param, "not_allowed", "invalid_request_error"
    )  # fmt: skip
    assert len(error["message"]) > 20 and not vllm.requests
    if path != "/tokenize":
        assert counted(app, "persona_requests_total", route=path, outcome="refused", reason="not_allowed") == 1


@pytest.mark.parametrize(
    "path, more",
    [
        (CHAT, {"cache_salt": None, "prompt_logprobs": None, "prompt_embeds": None}),
        (CHAT, {"logprobs": True, "top_logprobs": 2}),
        (COMPLETION, {"logprobs": 2, "echo": False}),
        (COMPLETION, {"echo": True}),
        (COMPLETION, {"echo": True, "logprobs": None}),
    ],
)
def test_what_does_no_harm_is_let_through(make, call, vllm, path, more):
    assert call(make(), "POST", path, {"prompt": "x", "messages": [], **more}).status == 200
    for name in ("logprobs", "echo"):
        assert vllm.last.get(name) == more.get(name)


NO_JSON = [
    b"",
    b"{",
    b'{"model": "m", "messages": [{"role": "user", "con',
    b"[1, 2]",
    b'"text"',
    b"null",
    b"{} {}",
    b'{"temperature": NaN}',
    b'{"temperature": -Infinity}',
    b'{"user": "\xff\xfe"}',
    b"\x00\x01\x02",
    b'{"a": "\x00"}',
    b'{"max_tokens": ' + b"9" * 5000 + b"}",
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"a": ' + b"[" * 100_000,
]


@pytest.mark.parametrize("body", NO_JSON, ids=lambda b: repr(b[:25]))
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_what_is_no_json_is_refused(make, call, vllm, path, body):
    if path == "/tokenize" and not body:
        return
    reply = call(make(), "POST", path, body)
    assert (reply.status, reply.json["error"]["code"]) == (400, "invalid_json") and not vllm.requests


@pytest.mark.parametrize("user", ["ana", ""])
def test_any_depth_is_refused_or_passed_on(make, acall, user):
    reached = []

    async def inner(scope, receive, send):
        reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def every():
        app, start = make(inner), b'{"user": "%s", "a":' % user.encode()
        return [
            (await acall(app, "POST", CHAT, start + b"[" * depth + b"]" * depth + b"}")).status
            for depth in range(880, 1000)
        ]

    statuses = asyncio.run(every())
    assert set(statuses) == {200, 400} and statuses == sorted(statuses) and len(reached) == statuses.count(200)


@pytest.mark.parametrize("user", [5, True, ["ana"], {"a": 1}, "x" * 257, "\ud83d"])
def test_what_cannot_be_a_user_is_refused(make, call, vllm, user):
    reply = call(make(), "POST", CHAT, {"messages": [], "user": user})
    assert (reply.status, reply.json["error"]["code"]) == (400, "invalid_user") and not vllm.requests


def test_lone_surrogates_in_texts_do_no_harm(make, call, vllm, ana):
    body = {"messages": [{"role": "user", "content": "half an emoji \ud83d"}], "user": "ana"}
    assert call(make(), "POST", CHAT, body).status == 200
    assert vllm.last["messages"][0]["content"] == body["messages"][0]["content"]


SHAPELESS = [5, True, "text", {"role": "user"}, [5, None, "x"], [[{"role": "user"}]], [{"role": ["user"]}]]


@pytest.mark.parametrize("messages", SHAPELESS)
def test_messages_of_any_shape_are_left_to_vllm(make, call, vllm, ana, messages, caplog):
    reply = call(make(), "POST", CHAT, {"messages": messages, "user": "ana"})
    assert reply.status == 200 and reply.outcome == ("plain", "no-user-turn") and vllm.last["messages"] == messages
    assert not caplog.records


@pytest.mark.parametrize("messages", SHAPELESS)
def test_where_personalisation_is_required_messages_of_any_shape_are_the_callers_fault(make, call, vllm, ana, messages):
    reply = call(make(require_personalization=True), "POST", CHAT, {"messages": messages, "user": "ana"})
    assert (reply.status, reply.json["error"]["code"]) == (400, "no-user-turn") and not vllm.requests


@pytest.mark.parametrize("text", ["%ff", "%ED%A0%80", "%E2%82"])
def test_instructions_that_are_not_utf8(make, call, ana, text):
    reply = call(make(), "POST", CHAT, {"messages": [], "user": "ana"}, {"x-persona-instruction": text})
    assert (reply.status, reply.json["error"]["param"]) == (400, "x-persona-instruction")


@pytest.mark.parametrize("count", ["0", "5", "-1", "1.5", "", "x", "²", "00000000199", "1" * 5000])
def test_counts_that_the_adapter_does_not_make(make, call, ana, count):
    reply = call(make(), "POST", CHAT, {"messages": [], "user": "ana"}, {"x-persona-tokens": count})
    assert (reply.status, reply.json["error"]["param"]) == (400, "x-persona-tokens")


def test_headers_by_themselves():
    assert requests.instruction_of({}) is None and requests.count_of({}, 4) is None
    assert requests.count_of({"x-persona-tokens": "004"}, 4) == 4
    with pytest.raises(Refused, match="1 to 4"):
        requests.count_of({"x-persona-tokens": "5"}, 4)
