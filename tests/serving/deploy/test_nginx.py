"""The real nginx, as nginx.conf sets it up, in front of servers and of two gateways."""

import json
import socket
import subprocess
import threading
import time

import httpx
import pytest

from persona.serving.server.config import ServerConfig

CHAT = "/v1/chat/completions"


def asked(user="ana", **more):
    return {"model": "llm", "messages": [{"role": "user", "content": "What next?"}], "user": user, **more}


def event(text):
    return {"user": "ana", "events": [{"source": "purchase", "timestamp": 1.76e9, "text": text}]}


def test_nginx_accepts_its_configuration(nginx_command):
    command = nginx_command(["127.0.0.1:9001", "127.0.0.1:9002"], 9000)
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert checked.returncode == 0 and "test is successful" in checked.stderr, checked.stderr
    assert "[warn]" not in checked.stderr


def test_two_gateways_behind_nginx(nginx, gateways, upstream):
    first, second = gateways
    url = nginx(first.address, second.address)
    with httpx.Client(timeout=30) as client:
        # Both get requests, in turn.
        for _ in range(4):
            assert client.post(url + CHAT, json=asked()).headers["x-persona-reason"] == "unknown-user"
        assert sorted(seen.key for seen in upstream.requests) == ["Bearer gateway-1"] * 2 + ["Bearer gateway-2"] * 2

        # What is written through one is in the other's next answer, within a second.
        rows = []
        for text in ("violin music", "drum music", "oak table"):
            client.post(f"http://{first.address}/persona/v1/events", json=event(text)).raise_for_status()
            written = time.monotonic()
            reply = client.post(f"http://{second.address}{CHAT}", json=asked())
            assert reply.headers["x-persona"] == "personalized" and upstream.requests[-1].key == "Bearer gateway-2"
            rows.append(json.loads(upstream.requests[-1].body)["messages"][0]["content"][0]["data"])
        assert time.monotonic() - written < 1, "the encoder was warm by then"
        assert len(set(rows)) == 3, "each event changes the user's rows"

        # A stream is passed on piece by piece: the next one is sent only when the last has arrived.
        pieces = []
        with client.stream("POST", url + CHAT, json=asked(stream=True), timeout=5) as reply:
            for line in filter(None, reply.iter_lines()):
                pieces.append(line)
                upstream.go_on.release()
        assert pieces == ["data: one", "data: two", "data: three"]

        # One is killed: no request that follows is lost.
        first.kill()
        upstream.requests.clear()
        for _ in range(8):
            assert client.post(url + CHAT, json=asked()).headers["x-persona"] == "personalized"
        assert client.post(url + "/persona/v1/events", json=event("lamp")).json() == {"given": 1, "stored": 1}
        assert [seen.key for seen in upstream.requests] == ["Bearer gateway-2"] * 8


def breaking_off(seen):
    """A server that reads a request and closes without an answer; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def work():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            seen.append(connection.recv(65536).split()[0])
            connection.close()

    threading.Thread(target=work, daemon=True).start()
    return listener, f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("method, times", [("POST", 1), ("GET", 2)])
def test_only_what_is_safe_to_repeat_is_sent_again(nginx, method, times):
    seen = []
    (one, first), (two, second) = breaking_off(seen), breaking_off(seen)
    reply = httpx.request(method, nginx(first, second) + "/v1/models", content=b"{}" if method == "POST" else None)
    assert reply.status_code == 502 and seen == [method.encode()] * times
    one.close()
    two.close()


def test_the_longest_body_passes_and_a_longer_one_does_not(nginx, serve, upstream):
    longest = ServerConfig.model_fields["max_body"].default
    address = serve(upstream.app).address
    url = nginx(address, address)
    reply = httpx.post(url + "/persona/v1/events", content=b"x" * longest)
    assert reply.json() == {"length": longest}
    assert httpx.post(url + "/persona/v1/events", content=b"x" * (longest + 1)).status_code == 413
    assert len(upstream.requests) == 1


def test_metrics_are_not_for_everybody(nginx, serve, upstream):
    address = serve(upstream.app).address
    url = nginx(address, address)
    assert httpx.get(url + "/persona/v1/health").status_code == 200
    assert [httpx.get(url + path).status_code for path in ("/metrics", "/persona/metrics")] == [404, 404]
    assert len(upstream.requests) == 1
