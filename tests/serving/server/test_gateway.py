"""The gateway between real clients and a real server on another port."""

import http.client
import json
import socket
import threading
from urllib.parse import urlsplit

import httpx
import pytest

from persona.errors import PersonaError
from persona.serving.server.config import ServerConfig
from persona.serving.server.gateway import gateway, proxy

CHAT = "/v1/chat/completions"


def asked(user="ana", **more):
    return {"model": "m", "messages": [{"role": "user", "content": "What next?"}], "user": user, **more}


@pytest.fixture
def front(make, serve, vllm):
    """Starts a gateway in front of a real server; gives the gateway's URL."""

    def front(upstream=None, **settings):
        upstream = upstream or serve(vllm.app)
        config = ServerConfig(adapter="unused", upstream=upstream, **{"upstream_key": "upstream-secret"})
        front.app = make(proxy(config), **settings)
        return serve(front.app)

    return front


def closing_server(answer):
    """A port where each connection gets these bytes and is then closed."""
    listener = socket.create_server(("127.0.0.1", 0))

    def work():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.recv(65536)
            connection.sendall(answer)
            connection.close()

    threading.Thread(target=work, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_chat_is_personalised_and_passed_on(front, vllm, ana, keys, rows_of):
    url = front(keys_file=keys)
    front.app.service.store.append("ana", [{"source": "search", "timestamp": 1, "text": "tea"}], tenant="shop")
    headers = {"authorization": "Bearer shop-key-1", "x-persona-tokens": "2", "x-request-id": "abc"}
    reply = httpx.post(url + CHAT, json=asked(), headers=headers)
    assert reply.status_code == 200 and reply.headers["x-persona"] == "personalized" and reply.json() == {"ok": True}
    seen = vllm.requests[-1]
    part = vllm.last["messages"][0]["content"][0]
    assert part["type"] == "prompt_embeds" and rows_of(part["data"]).shape == (2, 64)
    assert seen.header("authorization") == ["Bearer upstream-secret"] and seen.header("x-request-id") == ["abc"]
    assert seen.header("content-length") == [str(len(seen.body))] and not seen.header("transfer-encoding")
    assert not [name for name, _ in seen.headers if name.startswith("x-persona")]


def test_completions_and_other_routes(front, vllm, ana):
    url = front()
    reply = httpx.post(url + "/v1/completions", json={"model": "m", "prompt": "hello", "user": "ana"})
    assert reply.headers["x-persona"] == "personalized" and {"prompt_embeds", "cache_salt"} <= set(vllm.last)
    assert httpx.get(url + "/v1/models?limit=2").status_code == 200
    assert (vllm.requests[-1].method, vllm.requests[-1].path) == ("GET", "/v1/models")
    assert httpx.get(url + "/persona/v1/health").json()["tokens"] == 4
    assert httpx.post(url + "/v1/embeddings", json={}).status_code == 404


def test_a_stream_arrives_piece_by_piece(front, ana):
    with httpx.stream("POST", front() + CHAT, json=asked(stream=True)) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["x-persona"] == "personalized"
        assert list(reply.iter_lines())[::2] == ["data: one", "data: two", "data: [DONE]"]


def test_a_client_that_leaves_drops_the_upstream_request(front, vllm, ana):
    with httpx.stream("POST", front() + CHAT, json=asked(stream=True, slow=True)) as reply:
        lines = reply.iter_lines()  # a generator that is dropped closes the answer
        next(lines)
        assert not vllm.left.is_set()
    assert vllm.left.wait(10)


def test_a_client_that_leaves_before_the_answer_drops_the_upstream_request(front, serve, ana, until, caplog):
    seen = []

    async def slow(scope, receive, send):
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        while (message := await receive())["type"] != "http.disconnect":
            seen.append(message["type"])
        seen.append("http.disconnect")

    client = http.client.HTTPConnection(urlsplit(front(serve(slow))).netloc)
    client.request("POST", CHAT, json.dumps(asked()), {"content-type": "application/json"})
    until(lambda: seen)  # however long encoding takes, the upstream has the request before the client leaves
    client.close()
    until(lambda: seen[-1] == "http.disconnect")
    assert "Exception in ASGI application" not in caplog.text


def test_the_upstream_is_down(front, ana, counted):
    free = socket.create_server(("127.0.0.1", 0))
    url = front(f"http://127.0.0.1:{free.getsockname()[1]}")
    free.close()
    reply = httpx.post(url + CHAT, json=asked())
    assert reply.status_code == 502 and reply.json()["error"]["code"] == "upstream_down"
    assert counted(front.app, "persona_requests_total", route=CHAT, outcome="failed", reason="502") == 1
    assert httpx.get(url + "/health").status_code == 502


def test_the_upstream_breaks_off_before_and_in_the_middle_of_its_answer(front, ana):
    listener, upstream = closing_server(b"")
    reply = httpx.post(front(upstream) + CHAT, json=asked())
    assert reply.status_code == 502 and reply.json()["error"]["code"] == "upstream_failed"
    listener.close()
    listener, upstream = closing_server(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\none \r\n")
    got = b""
    with pytest.raises(httpx.RemoteProtocolError), httpx.stream("POST", front(upstream) + CHAT, json=asked()) as reply:
        for chunk in reply.iter_raw():
            got += chunk
    assert got == b"one "
    listener.close()


@pytest.mark.parametrize(
    "path", ["//evil/x", "//127.0.0.1:{port}/x", "/\\127.0.0.1:{port}/x", "/http://127.0.0.1:{port}/"]
)
def test_no_path_leads_to_another_server(serve, vllm, path):
    # Joining URLs takes a path that begins with two slashes for a host, which would get the upstream's key.
    other = socket.create_server(("127.0.0.1", 0))
    other.settimeout(0.3)
    gate = serve(proxy(ServerConfig(adapter="unused", upstream=serve(vllm.app))))  # without the middleware's refusals
    host, port = gate.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        target = path.format(port=other.getsockname()[1])
        client.sendall(f"OPTIONS {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
    with pytest.raises(TimeoutError):
        other.accept()
    other.close()
    assert answer.startswith(b"HTTP/1.1 200") and vllm.requests[-1].method == "OPTIONS"


def test_callers_share_no_cookies_and_get_no_coding_that_they_did_not_ask_for(front, vllm, ana):
    url = front()
    with httpx.Client() as client:
        del client.headers["accept-encoding"]
        assert "set-cookie" in client.post(url + CHAT, json=asked()).headers
    httpx.post(url + CHAT, json=asked(), headers={"cookie": "mine=1", "accept-encoding": "identity"})
    first, second = vllm.requests
    assert second.header("cookie") == ["mine=1"] and not first.header("cookie")
    assert not first.header("accept-encoding") and second.header("accept-encoding") == ["identity"]


def test_long_bodies_are_refused_without_being_read(front, vllm, ana):
    url = front()
    body = json.dumps(asked(padding="x" * 10_000_000)).encode()

    def chunks():
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    for content in (body, chunks()):
        for path in (CHAT, "/persona/v1/events", "/tokenize", "/health"):
            try:
                reply = httpx.post(url + path, content=content)
            except (httpx.WriteError, httpx.ReadError):  # the server closed while we were still sending
                continue
            assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_long"
            content = body if content is body else chunks()
    for method, path in (("OPTIONS", CHAT), ("POST", "/health")):
        reply = httpx.request(method, url + path, headers={"content-length": str(len(body))}, content=body)
        assert reply.status_code == 413
    assert not vllm.requests


def test_head_and_options(front, vllm):
    url = front()
    assert httpx.head(url + "/v1/models").status_code == 200 and vllm.requests[-1].method == "HEAD"
    assert vllm.requests[-1].header("authorization") == ["Bearer upstream-secret"]
    assert httpx.options(url + CHAT).status_code == 200 and vllm.requests[-1].method == "OPTIONS"
    assert vllm.requests[-1].header("authorization") == [], "who shows no key borrows none"


@pytest.mark.parametrize("url", [None, "", "vllm:8000", "ftp://vllm", "http://"])
def test_bad_upstreams(url):
    with pytest.raises(PersonaError, match="upstream server is a URL"):
        proxy(ServerConfig(adapter="unused", upstream=url))


def test_the_whole_from_an_adapter_folder(serve, vllm, model, tmp_path, store, ana):
    folder = model.save_pretrained(tmp_path / "adapter")
    config = ServerConfig(
        adapter=str(folder), store=str(store.database.url), upstream=serve(vllm.app), budget_ms=20_000
    )
    reply = httpx.post(serve(gateway(config)) + CHAT, json=asked())
    assert reply.headers["x-persona"] == "personalized"


def test_a_path_that_is_no_url(serve, vllm):
    gate = serve(proxy(ServerConfig(adapter="unused", upstream=serve(vllm.app))))
    reply = httpx.post(gate + "/a%00b", json={})
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "closed" and not vllm.requests
