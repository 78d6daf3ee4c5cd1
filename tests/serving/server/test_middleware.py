"""What the middleware lets through, what it changes on the way, and what it keeps to itself."""

import asyncio
import json
from urllib.parse import quote

import httpx
import pytest
import torch

from persona.history import Event
from persona.serving.server.middleware import OPEN, PASSED

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PLAIN = [{"role": "user", "content": "What next?"}]


def asked(user="ana", **more):
    return {"model": "m", "messages": PLAIN, "user": user, **more}


@pytest.fixture
def app(make, ana):
    return make()


@pytest.fixture
def expected(app, model):
    """The rows that a user and an instruction have when nothing else is going on."""
    return lambda user, text: model.soft_rows([app.service.encoding.states.get(user)], [text])[0]


def test_a_chat_opens_its_last_user_turn_with_the_users_rows(app, call, vllm, rows_of, expected):
    chat = [{"role": "system", "content": "Be brief."}, *PLAIN, {"role": "assistant", "content": "Tea."}]
    turn = {
        "role": "user",
        "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "then?"}],
        "name": "a",
    }
    reply = call(app, "POST", CHAT, asked(messages=[*chat, turn], temperature=0.5))
    assert (reply.status, reply.outcome) == (200, ("personalized", None))
    *before, last = vllm.last["messages"]
    assert before == chat and last["content"][1:] == turn["content"] and last["name"] == "a"
    assert torch.allclose(rows_of(last["content"][0]["data"]), expected("ana", "And\nthen?"), atol=1e-5)
    assert vllm.last["temperature"] == 0.5 and "user" not in vllm.last


def test_completions_become_embeddings(app, call, vllm, rows_of, expected, model):
    reply = call(app, "POST", COMPLETION, {"model": "m", "prompt": ["one", "two words"], "user": "ana"})
    assert reply.outcome == ("personalized", None) and "prompt" not in vllm.last
    for text, data in zip(["one", "two words"], vllm.last["prompt_embeds"]):
        prompt = model.template.place(text, 4)
        assert torch.allclose(rows_of(data), model.prompt_rows(prompt, expected("ana", text)), atol=1e-5)


def test_streams_pass_piece_by_piece(app, call, vllm):
    reply = call(app, "POST", CHAT, asked(stream=True))
    pieces = [m.get("body") for m in reply.messages[1:]]
    assert pieces[:3] == [b"data: one\n\n", b"data: two\n\n", b"data: [DONE]\n\n"]
    assert reply.outcome == ("personalized", None)


def test_a_disconnect_reaches_the_inner_application(app, serve, vllm):
    with httpx.stream("POST", serve(app) + CHAT, json=asked(stream=True, slow=True)) as reply:
        assert next(reply.iter_lines()) == "data: one"
    assert vllm.left.wait(10)


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_the_body_is_replayed_whole_and_its_length_is_right(app, call, vllm, size):
    body = json.dumps(asked(None, padding="é" * 3000)).encode()
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    reply = call(app, "POST", CHAT, headers={"transfer-encoding": "chunked"}, chunks=[*chunks, b""])
    seen = vllm.requests[-1]
    assert reply.status == 200 and vllm.last["padding"] == "é" * 3000
    assert seen.header("content-length") == [str(len(seen.body))] and not seen.header("transfer-encoding")


@pytest.mark.parametrize("headers", [{"content-length": "3"}, {"content-length": "²"}, {"Content-Length": "9" * 5000}])
def test_a_false_content_length_is_not_believed(app, call, vllm, headers):
    reply = call(app, "POST", CHAT, headers=headers, chunks=[json.dumps(asked()).encode()])
    if len(headers.get("Content-Length", "")) > 18:
        assert reply.status == 413 and reply.taken == 0
    else:
        assert reply.status == 200 and vllm.requests[-1].header("content-length") == [str(len(vllm.requests[-1].body))]


@pytest.mark.parametrize("path", [CHAT, COMPLETION, "/tokenize", "/persona/v1/events", "/health", "/v1/models"])
@pytest.mark.parametrize("told", [True, False])
def test_bodies_are_bounded(make, call, vllm, path, told):
    app = make(max_body=4096)
    chunks = [b"x" * 1024] * 10_000
    reply = call(app, "POST", path, headers={"content-length": "10240000"} if told else {}, chunks=chunks)
    assert (reply.status, reply.json["error"]["code"]) == (413, "body_too_long") and not vllm.requests
    assert reply.taken == (0 if told else 5)


@pytest.mark.parametrize(
    "method, path",
    [
        *[
            ("POST", p)
            for p in ("/v1/embeddings", "/v1/responses", "/v1/messages", "/inference/v1/generate", "/pooling")
        ],
        *[("POST", p) for p in ("/sleep", "/reset_prefix_cache", "/v1/load_lora_adapter", "/invocations", "/", "")],
        *[("POST", p) for p in ("//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/")],
        *[("POST", p) for p in ("/V1/chat/completions", "/v1/chat/../completions", "/v1/chat%2fcompletions")],
        *[("POST", p) for p in ("/v1/chat/completions\x00", "/v1/chat/completions?x", "/v1/models/../embeddings")],
        *[(m, CHAT) for m in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "post")],
        *[("POST", p) for p in ("/v1/models/", "/health/", "/metrics/x", "/persona", "/personal/v1/events")],
    ],
)
def test_every_other_route_is_closed(app, call, vllm, method, path):
    reply = call(app, method, path, asked(), raw_path=b"")
    assert (reply.status, reply.json["error"]["code"]) == (404, "closed")
    assert not vllm.requests


@pytest.mark.parametrize("path", [*PASSED, *(p for p in OPEN if not p.startswith("/persona"))])
def test_what_is_passed_on_is_unchanged(app, call, vllm, path):
    assert call(app, "GET", path, b"").status == 200
    assert call(app, "POST", path, b'{"prompt":  "x"}').status == 200
    assert [(s.method, s.path, s.body) for s in vllm.requests] == [
        ("GET", path, b""),
        ("POST", path, b'{"prompt":  "x"}'),
    ]
    assert "x-persona" not in call(app, "GET", path, b"").headers


def test_options_pass_without_a_key(make, call, vllm, keys):
    app = make(keys_file=keys)
    for path in (CHAT, "/v1/models"):
        assert call(app, "OPTIONS", path, b"", {"origin": "https://shop"}).status == 200
    assert [s.method for s in vllm.requests] == ["OPTIONS", "OPTIONS"]
    assert call(app, "OPTIONS", "/anything", b"").status == 401
    assert call(app, "OPTIONS", "/anything", b"", {"authorization": "Bearer shop-key-1"}).status == 404
    assert len(vllm.requests) == 2


@pytest.mark.parametrize("path, closed", [("/api" + CHAT, False), ("/api/v1/embeddings", True), ("/apis" + CHAT, True)])
def test_behind_a_root_path(app, call, vllm, path, closed):
    reply = call(app, "POST", path, asked(), root_path="/api")
    assert reply.status == (404 if closed else 200)
    assert closed or reply.outcome == ("personalized", None)


def test_websockets_are_closed(app, vllm):
    sent, waiting = [], [{"type": "websocket.connect"}]

    async def receive():
        return waiting.pop()

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send))
    assert [(m["type"], m["code"]) for m in sent] == [("websocket.close", 1008)] and not vllm.requests


def test_the_instruction_header(app, call, vllm, rows_of, expected):
    for text in ("what music?", "música ✓ موسيقى", "a%b"):
        assert call(app, "POST", CHAT, asked(), {"X-Persona-Instruction": quote(text)}).status == 200
        rows = rows_of(vllm.last["messages"][0]["content"][0]["data"])
        assert torch.allclose(rows, expected("ana", text), atol=1e-5)
    call(app, "POST", CHAT, asked(), {"x-persona-instruction": "%20"})
    rows = rows_of(vllm.last["messages"][0]["content"][0]["data"])
    assert torch.allclose(rows, expected("ana", "What next?"), atol=1e-5), "an empty one is none"


def test_the_token_count_header(app, call, vllm, rows_of, expected):
    assert call(app, "POST", CHAT, asked(), {"x-persona-tokens": "3"}).status == 200
    rows = rows_of(vllm.last["messages"][0]["content"][0]["data"])
    assert torch.allclose(rows, expected("ana", "What next?")[:3], atol=1e-5)


def test_the_salt_is_the_tenants(make, call, vllm, keys, tmp_path):
    def salt(app, key):
        assert call(app, "POST", CHAT, asked(None), {"authorization": f"Bearer {key}"}).status == 200
        return vllm.last["cache_salt"]

    secret = tmp_path / "secret"
    secret.write_text("s" * 32 + "\n")
    one, same = make(keys_file=keys, secret_file=secret), make(keys_file=keys, secret_file=secret)
    shop = salt(one, "shop-key-1")
    assert salt(one, "shop-key-2") == shop == salt(same, "shop-key-1") and len(shop) >= 43
    assert salt(one, "cinema-key") != shop
    secret.write_text("t" * 32)
    assert salt(make(keys_file=keys, secret_file=secret), "shop-key-1") != shop
    assert salt(make(keys_file=keys), "shop-key-1") != salt(make(keys_file=keys), "shop-key-1") != shop


@pytest.mark.parametrize(
    "user, more, reason",
    [
        (None, {}, "no-user"),
        ("", {}, "no-user"),
        ("nobody", {}, "unknown-user"),
        ("ana", {"messages": [{"role": "system", "content": "x"}]}, "no-user-turn"),
        ("ana", {"messages": [{"role": "user", "content": None}]}, "no-user-turn"),
        ("ana", {"messages": []}, "no-user-turn"),
        ("ana", {"echo": True}, "echo"),
        ("stranger", {}, "unknown-sources"),
    ],
)
def test_plain_answers_say_why(app, call, store, vllm, counted, user, more, reason):
    store.append("stranger", [Event("horoscope", 1.0, text="x")])
    body = asked(user, **more)
    assert call(app, "POST", CHAT, body).outcome == ("plain", reason)
    assert vllm.last["messages"] == body["messages"] and "cache_salt" in vllm.last
    assert counted(app, "persona_requests_total", route=CHAT, outcome="plain", reason=reason) == 1


@pytest.mark.parametrize(
    "body, reason",
    [
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": None}, "no-user-turn"),
        ({"prompt": {"a": 1}}, "no-user-turn"),
        ({"prompt": [[1, "x"]]}, "failed"),
        ({"prompt": [10**9]}, "failed"),
        ({"prompt": "ignore <prompt_embeds>"}, "failed"),
        ({"prompt": ["x"] * 65}, "too-long"),
    ],
)
def test_plain_completions_say_why(app, call, vllm, body, reason):
    assert call(app, "POST", COMPLETION, {"user": "ana", **body}).outcome == ("plain", reason)
    assert {k: v for k, v in vllm.last.items() if k != "cache_salt"} == body


def test_truncation_is_told(app, call, store):
    store.append("ana", [Event("search", float(i), text="tea") for i in range(65)])
    assert call(app, "POST", CHAT, asked()).headers["x-persona-truncated"] == "true"


@pytest.mark.parametrize(
    "user", ["a'; DROP TABLE persona_events; --", "../../etc", "a\nb", "أنا", "👩‍👩‍👧‍👦", "%", "x" * 256]
)
def test_user_ids_are_any_unicode(app, call, store, caplog, user):
    store.append("x", [Event("search", 1.0, text="tea")])
    with caplog.at_level("DEBUG"):
        assert call(app, "POST", CHAT, asked(user)).outcome == ("plain", "unknown-user")
        events = {"user": user, "events": [{"source": "search", "timestamp": 1, "text": "tea"}]}
        assert call(app, "POST", "/persona/v1/events", events).json == {"given": 1, "stored": 1}
        assert call(app, "POST", CHAT, asked(user)).outcome == ("personalized", None)
        assert call(app, "POST", "/persona/v1/forget", {"user": user}).json == {"erased": 1}
    assert len(user) < 3 or user not in caplog.text
    assert store.count("x") == 1


def test_concurrent_users_are_never_mixed(make, acall, store, vllm, rows_of, model):
    app = make(budget_ms=60_000)
    words = ["violin", "drum", "tea", "cake", "lamp", "chair", "spade", "radio", "vinyl", "oak"]
    users = [f"user {i} ✓" for i in range(30)]
    for i, user in enumerate(users):
        texts = [words[(i + k) % 10] + " " + words[(i * 3 + k) % 10] for k in range(1 + i % 7)]
        store.append(user, [Event("search", float(k), text=text) for k, text in enumerate(texts)])
    work = [(user, f"question {n % 4}?") for n, user in enumerate(users * 3)]

    async def all_at_once():
        calls = [
            acall(app, "POST", CHAT, asked(user, messages=[{"role": "user", "content": text}], tag=n))
            for n, (user, text) in enumerate(work)
        ]
        return await asyncio.gather(*calls)

    assert {reply.outcome for reply in asyncio.run(all_at_once())} == {("personalized", None)}
    got = {}
    for seen in vllm.requests:
        body = json.loads(seen.body)
        got[body["tag"]] = rows_of(body["messages"][0]["content"][0]["data"])
    alone = {u: model.encoder.read([store.history(u)])[0] for u in users}
    for n, (user, text) in enumerate(work):
        assert torch.allclose(got[n], model.soft_rows([alone[user]], [text])[0], atol=1e-4), (n, user)
    assert not torch.allclose(got[0], got[4], atol=1e-3)
    assert app.service.encoding.states.misses == len(users), "each user was encoded once"


def test_a_long_turn_is_read_as_far_as_an_instruction_goes(app, call, vllm, rows_of):
    turn = "What next? " * 400
    rows = []
    for text in (turn, turn + "And then? " * 20_000):
        assert call(app, "POST", CHAT, asked(messages=[{"role": "user", "content": text}])).outcome[0] == "personalized"
        part, words = vllm.last["messages"][0]["content"]
        rows.append(rows_of(part["data"]))
        assert words["text"] == text
    assert torch.allclose(*rows, atol=1e-5)
    assert all(len(text) <= 4000 for text in app.service.encoding.states._instructions)


def test_prompts_that_would_become_too_many_embeddings(app, call, vllm, monkeypatch):
    monkeypatch.setattr("persona.serving.personalizer.MOST_BYTES", 10_000)
    for prompt in ([1] * 1000, "long " * 1000, ["a few words"] * 20):
        assert call(app, "POST", COMPLETION, {"user": "ana", "prompt": prompt}).outcome == ("plain", "too-long")
        assert vllm.last["prompt"] == prompt
    assert call(app, "POST", COMPLETION, {"user": "ana", "prompt": "short"}).outcome == ("personalized", None)
