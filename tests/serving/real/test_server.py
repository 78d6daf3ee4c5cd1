"""The plug-in inside a real vLLM: what is open, what is refused, what stays of a user, what a kill loses."""

import io
import re
import time
from contextlib import redirect_stdout

import httpx
import openai
import pytest

from persona import Event, wrap
from persona.serving.server.middleware import OPEN, PASSED, PERSONALIZED

from .conftest import FLAGS, ROOT, serve_command, serving

pytestmark = pytest.mark.vllm

HTTP = httpx.Client(timeout=60)
CHAT, EVENTS = "/v1/chat/completions", "/persona/v1/events"


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def model(client):
    return client.models.list().data[0].id


def asked(model, user, **more):
    messages = [{"role": "user", "content": "What does this user buy most?"}]
    return {"model": model, "messages": messages, "max_tokens": 4, "temperature": 0, "user": user, **more}


def running(url):
    lines = HTTP.get(url + "/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def test_the_readmes_server_lines(served):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"<!-- server -->\n```python\n(.*?)```\n<!-- server -->", text, re.S)[1]
    assert "http://127.0.0.1:8000" in code
    code = code.replace("http://127.0.0.1:8000", served.url)
    with redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    assert said.getvalue().split() == ["music", "True"]


def test_every_other_route_of_vllms_is_closed(served):
    document = HTTP.get(served.url + "/openapi.json").json()
    routes = [(method, path) for path, methods in document["paths"].items() for method in methods]
    assert ("post", "/v1/responses") in routes and ("post", CHAT) in routes
    for method, path in routes:
        if path in (*OPEN, *PASSED, *PERSONALIZED):
            continue
        reply = HTTP.request(method, served.url + re.sub(r"\{\w+\}", "x", path), json={})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "closed"), path
    closed = re.search(r"closed: (.*)", served.log.read_text())
    assert closed is None or "/v1/responses" in closed[1]


def test_what_would_stop_the_engine_is_refused_and_it_goes_on(served, model, histories):
    user = next(iter(histories))
    own = [{"role": "user", "content": [{"type": "prompt_embeds", "data": "AAAA"}]}]
    for more in ({"prompt_logprobs": 1}, {"echo": True, "logprobs": True}, {"messages": own}, {"cache_salt": "x"}):
        assert HTTP.post(served.url + CHAT, json=asked(model, user, **more)).status_code == 400
    for more in ({"logprobs": True, "top_logprobs": 3}, {"n": 2, "temperature": 1}, {"presence_penalty": 0.5}):
        reply = HTTP.post(served.url + CHAT, json=asked(model, user, **more))
        assert reply.status_code == 200 and reply.headers["x-persona"] == "personalized", more
    assert running(served.url) == 0


def test_vllms_own_errors_pass_and_are_not_called_personal(served, model, histories):
    user = next(iter(histories))
    for more in ({"max_tokens": -1}, {"model": "no-such-model"}, {"temperature": "hot"}):
        reply = HTTP.post(served.url + CHAT, json=asked(model, user) | more)
        assert reply.status_code in (400, 404, 422) and reply.json()["error"]["message"]
        assert "x-persona" not in reply.headers


def test_a_client_that_leaves_its_stream_ends_the_work(served, model, histories):
    long = asked(model, next(iter(histories)), stream=True, max_tokens=450, ignore_eos=True)
    with HTTP.stream("POST", served.url + CHAT, json=long) as reply:
        lines = reply.iter_lines()
        while not running(served.url):
            next(lines)
    end = time.monotonic() + 10
    while running(served.url):
        assert time.monotonic() < end
        time.sleep(0.02)


MARK = "Xanadu-Street-77"


def test_no_byte_of_a_forgotten_user_stays_in_files_or_logs(served, client, model, database):
    user = f"person of {MARK}"
    twin = wrap(client)
    twin.persona.observe(user, [Event("search", float(i), text=f"{MARK} violin {i}") for i in range(300)])
    answer = twin.chat.completions.create(**asked(model, user))
    assert answer.persona == {"mode": "server", "personalized": True, "reason": None}
    wrong = {"user": user, "events": [{"source": "search", "text": MARK, "value": MARK}]}
    assert HTTP.post(served.url + EVENTS, json=wrong).status_code == 422
    assert HTTP.post(served.url + CHAT, json=asked(model, user, cache_salt=MARK)).status_code == 400
    long = [{"role": "user", "content": f"{MARK} " * 2000}]
    assert HTTP.post(served.url + CHAT, json=asked(model, user, messages=long)).status_code == 400
    files = sorted(database.parent.glob(database.name + "*"))
    assert any(MARK.encode() in file.read_bytes() for file in files), "the search would have found it"
    assert twin.persona.forget(user) == 300
    left = [f.name for f in [*database.parent.glob(database.name + "*"), served.log] if MARK.encode() in f.read_bytes()]
    assert left == []
    answer = twin.chat.completions.create(**asked(model, user))
    assert answer.persona == {"mode": "server", "personalized": False, "reason": "unknown-user"}


@pytest.mark.slow
def test_a_kill_loses_no_acknowledged_event_and_keys_hold(tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("shop: shop-key-1\ncinema: cinema-key\n")
    argv = serve_command("--store", f"sqlite:///{tmp_path / 'events.db'}", "--keys", str(keys), *FLAGS)
    shop, cinema = ({"authorization": f"Bearer {key}"} for key in ("shop-key-1", "cinema-key"))
    with serving(argv, tmp_path / "first.log") as server:
        event = {"source": "purchase", "text": "oak violin music"}
        for number in range(200):
            body = {"user": "ana", "events": [{**event, "timestamp": number, "event_id": str(number)}]}
            assert HTTP.post(server.url + EVENTS, json=body, headers=shop).json()["stored"] == 1
        server.kill()
    with serving(argv, tmp_path / "second.log") as server:
        body = {"user": "ana", "last": 1000}
        history = HTTP.post(server.url + "/persona/v1/history", json=body, headers=shop).json()
        assert [int(e["event_id"]) for e in history["events"]] == list(range(200))
        name = HTTP.get(server.url + "/v1/models", headers=shop).json()["data"][0]["id"]
        outcomes = []
        for headers in (shop, cinema, {}):
            reply = HTTP.post(server.url + CHAT, json=asked(name, "ana"), headers=headers)
            outcomes.append((reply.status_code, reply.headers["x-persona"], reply.headers.get("x-persona-reason")))
        assert outcomes == [
            (200, "personalized", None),
            (200, "plain", "unknown-user"),
            (401, "refused", "invalid_api_key"),
        ]
