"""What callers get when something breaks: each fault is made on purpose, in front of a real vLLM.

    python benchmarks/serving/faults.py --out benchmarks/results/faults.json

Our application runs in this process, as a gateway, and so does its encoding, which otherwise has a process of its
own, so that both can be broken. vLLM runs in another, and behind each fault a sound call is made. The
tests hold every row of the table.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import jwt
import uvicorn
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import ADAPTER, LLM, QUESTIONS, VLLM_FLAGS, free_port, plain_vllm, write

from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import Encoding
from persona.serving.server.gateway import proxy
from persona.serving.server.middleware import PersonaMiddleware
from persona.serving.server.service import Service

CHAT, EVENTS = "/v1/chat/completions", "/persona/v1/events"
KEYS = {"shop": "key-of-the-shop", "cinema": "key-of-the-cinema"}
JWT_KEY = "a-secret-of-32-bytes-for-this-run"
BUDGET_MS = 500
MIB = 2**20


class Breakable(nn.Module):
    """The encoder's backbone, which first does what the run wants: nothing, raise, or hang."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone, self.fault = backbone, lambda: None

    def forward(self, *args, **kwargs):
        self.fault()
        return self.backbone(*args, **kwargs)


class Front:
    """Our application in front of an upstream, on a port of its own, with a store and an encoder of its own."""

    def __init__(self, upstream: str, folder: Path, *, own_process: bool = False, **settings):
        self.database = folder / f"{len(list(folder.iterdir()))}.db"
        store = f"sqlite:///{self.database}"
        config = ServerConfig.load(
            adapter=ADAPTER, llm=LLM, store=store, upstream=upstream, budget_ms=BUDGET_MS, **settings
        )
        self.service = Service.load(config)
        if own_process:
            self.encoding = self.service.encoding
        else:
            self.encoding = self.service.encoding = Encoding.load(config)
            encoder = self.encoding.model.encoder
            encoder.backbone = self.broken = Breakable(encoder.backbone)
        app, port = PersonaMiddleware(proxy(config), self.service), free_port()
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="on"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def stop(self) -> None:
        """Stops listening; does not wait for threads that hang."""
        self.http.close()
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)

    def observe(self, user: str, tenant: str = "default") -> None:
        """Gives a user a history, past the API."""
        events = [{"source": "purchase", "timestamp": 1e9 + i, "text": "violin music"} for i in range(20)]
        self.service.store.append(user, events, tenant=tenant)

    def chat(self, user: str | None = "ana", headers: dict | None = None, **more) -> httpx.Response:
        """One call."""
        return self.http.post(CHAT, json=body(user, **more), headers=headers)


def body(user: str | None = "ana", **more) -> dict:
    """A chat request."""
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    return {"model": LLM, "messages": messages, "max_tokens": 4, "temperature": 0, "user": user, **more}


class Run:
    """The rows of the table."""

    def __init__(self):
        self.rows: list[dict] = []

    def note(self, fault: str, asked: str, call: Callable[[], httpx.Response | str]) -> None:
        """Makes the call and writes down what came back."""
        start = time.perf_counter()
        answer = call()
        row = {"fault": fault, "asked": asked, "ms": round(1000 * (time.perf_counter() - start))}
        if isinstance(answer, str):
            row["came_back"] = answer
        else:
            row |= {"status": answer.status_code, "came_back": said(answer)}
        self.rows.append(row)
        print(f"{fault}: {asked}: {row.get('status', '')} {row['came_back']} ({row['ms']} ms)", flush=True)

    def sound(self, front: Front, user: str = "ana", headers: dict | None = None, wait: float = 20) -> None:
        """A sound call after a fault is personalised again; how soon is written down. Ends the run if it never is."""
        start = time.perf_counter()
        while (answer := front.chat(user, headers)).headers.get("x-persona") != "personalized":
            if time.perf_counter() - start > wait:
                raise SystemExit(f"not personalised again after {self.rows[-1]['fault']}: {said(answer)}")
            time.sleep(0.05)
        self.rows[-1]["personalised_again_after_ms"] = round(1000 * (time.perf_counter() - start))


def said(answer: httpx.Response) -> str:
    """What an answer says of itself: what became of the user, or the error."""
    outcome = ": ".join(filter(None, (answer.headers.get("x-persona"), answer.headers.get("x-persona-reason"))))
    return outcome or (json.dumps(answer.json())[:100] if answer.content else "nothing")


def main(args: argparse.Namespace) -> None:
    """All faults, one after the other."""
    run = Run()
    with tempfile.TemporaryDirectory() as name, plain_vllm([*VLLM_FLAGS, "--disable-uvicorn-access-log"]) as vllm:
        folder = Path(name)
        keys = folder / "keys.yaml"
        keys.write_text("".join(f"{tenant}: {key}\n" for tenant, key in KEYS.items()))
        with started(vllm.url, folder) as front:
            encoder(run, front)
            store(run, front)
            callers(run, front)
            streams(run, front, vllm.url)
            database_gone(run, front)
        with started(vllm.url, folder, own_process=True) as front:
            killed(run, front)
        with started(vllm.url, folder, require_personalization=True) as front:
            required(run, front)
        with started(vllm.url, folder, keys_file=keys, jwt_key=JWT_KEY) as front:
            strangers(run, front)
        with started(f"http://127.0.0.1:{free_port()}", folder) as front:
            run.note("upstream down", "chat", front.chat)
            run.note("upstream down", "append events", lambda: front.http.post(EVENTS, json=event("ana")))
    write(args.out, {"n": {"rows": len(run.rows)}, "budget_ms": BUDGET_MS, "rows": run.rows}, 0)


@contextmanager
def started(upstream: str, folder: Path, **settings) -> Iterator[Front]:
    """A front whose user ana has a history."""
    front = Front(upstream, folder, **settings)
    front.observe("ana")
    try:
        yield front
    finally:
        front.stop()


def event(user: str) -> dict:
    """A request that appends one event."""
    return {"user": user, "events": [{"source": "search", "timestamp": 2e9, "text": "violin"}]}


def encoder(run: Run, front: Front) -> None:
    """An encoder that raises, hangs, or makes rows that would harm the engine."""

    def fail() -> None:
        raise RuntimeError

    go = threading.Event()
    front.broken.fault = fail
    run.note("encoder raises", "chat", front.chat)
    front.broken.fault = lambda: None
    run.sound(front)
    front.observe("ben")
    front.broken.fault = lambda: go.wait(60)
    run.note("encoder hangs", "chat of this user", lambda: front.chat("ben"))
    run.note("encoder hangs", "chat of a user whose state is cached", front.chat)
    front.broken.fault = lambda: None
    go.set()
    run.sound(front, "ben")
    for what, bad in (("NaN", float("nan")), ("a row of zeros", 0.0)):
        hook = front.encoding.model.projector.register_forward_hook(lambda _, args, rows, bad=bad: rows.fill_(bad))
        run.note(f"encoder makes {what}", "chat", front.chat)
        hook.remove()
        run.sound(front)


def killed(run: Run, front: Front) -> None:
    """The encoding process is killed; the server starts another."""
    front.chat()
    front.encoding._process.kill()
    run.note("encoding process killed", "chat", front.chat)
    run.note("encoding process killed", "append events", lambda: front.http.post(EVENTS, json=event("ana")))
    run.sound(front, wait=60)


def store(run: Run, front: Front) -> None:
    """A database that another process writes to for long, or has locked as a whole."""
    other = sqlite3.connect(front.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    run.note("database locked by a writer", "chat", front.chat)
    run.note("database locked by a writer", "append events", lambda: front.http.post(EVENTS, json=event("ana")))
    other.close()
    for store in (front.service.store, front.encoding.store):
        store.close()  # our own open connections would keep the other from locking it
    other = sqlite3.connect(front.database, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    run.note("database locked", "chat", front.chat)
    run.note("database locked", "readiness", lambda: front.http.get("/persona/v1/ready"))
    run.note("database locked", "append events", lambda: front.http.post(EVENTS, json=event("ana")))
    other.close()
    run.sound(front)


def database_gone(run: Run, front: Front) -> None:
    """A database whose files were deleted; it stays gone until the server is started again."""
    for file in front.database.parent.glob(front.database.name + "*"):
        file.unlink()
    run.note("database gone", "chat", front.chat)
    run.note("database gone", "append events", lambda: front.http.post(EVENTS, json=event("ana")))
    run.note("database gone", "readiness", lambda: front.http.get("/persona/v1/ready"))


def callers(run: Run, front: Front) -> None:
    """Requests that are wrong, too long, or ask for what would harm the engine or others."""
    send = front.http.post
    run.note("body of 10 MB", "chat", lambda: front.chat(padding="x" * 10 * MIB))
    run.note("body of 10 MB", "append events", lambda: send(EVENTS, json={**event("ana"), "more": "x" * 10 * MIB}))
    for path, what in ((CHAT, "chat"), (EVENTS, "append events")):
        run.note("malformed JSON", what, lambda path=path: send(path, content=b'{"user": "ana", '))
    own = [{"role": "user", "content": [{"type": "prompt_embeds", "data": "AAAA"}]}]
    for what, more in (
        ("prompt_embeds", {"messages": own}),
        ("cache_salt", {"cache_salt": "x"}),
        ("prompt_logprobs", {"prompt_logprobs": 1}),
        ("echo with logprobs", {"echo": True, "logprobs": True}),
        ("a user id of 300 characters", {"user": "x" * 300}),
    ):
        run.note(f"caller's own {what}", "chat", lambda more=more: front.http.post(CHAT, json=body(**more)))
    run.note(
        "a route that generates past our checks", "/v1/responses", lambda: send("/v1/responses", json={"input": "x"})
    )
    run.sound(front)


def streams(run: Run, front: Front, upstream: str) -> None:
    """A client that goes away in the middle of its stream."""

    def leave() -> str:
        long = body(stream=True, max_tokens=900, ignore_eos=True)
        with front.http.stream("POST", CHAT, json=long) as answer:
            lines = answer.iter_lines()
            before = 0
            while not before:  # vLLM counts now and then
                next(lines)
                before = running(upstream)
        end = time.monotonic() + 10
        while running(upstream) and time.monotonic() < end:
            time.sleep(0.02)
        return f"vLLM runs {before} request while it streams, {running(upstream)} after the client has left"

    run.note("client leaves in the middle of its stream", "chat, 900 tokens", leave)
    run.sound(front)


def running(vllm: str) -> int:
    """How many requests vLLM works on."""
    lines = httpx.get(f"{vllm}/metrics").text.splitlines()
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running{")))


def required(run: Run, front: Front) -> None:
    """The same faults where personalisation is required."""

    def fail() -> None:
        raise RuntimeError

    front.broken.fault = fail
    run.note("encoder raises, personalisation required", "chat", front.chat)
    front.broken.fault = lambda: None
    run.sound(front)
    run.note("unknown user, personalisation required", "chat", lambda: front.chat("nobody"))
    run.note("no user, personalisation required", "chat", lambda: front.chat(None))


def strangers(run: Run, front: Front) -> None:
    """Callers without a right to ask, or to ask for this user."""
    front.observe("ana", "shop")
    front.observe("ana", "cinema")

    def auth(tenant: str = "shop", user: str = "ana", seconds: float = 60, **more) -> dict:
        claims = {"sub": user, "aud": "persona", "exp": time.time() + seconds, "tenant": "shop", **more}
        token = jwt.encode(claims, JWT_KEY, "HS256")
        return {"authorization": f"Bearer {KEYS[tenant]}", "x-persona-user-token": token}

    bad_key = {**auth(), "authorization": "Bearer wrong-key"}
    run.note("no key", "chat", front.chat)
    run.note("wrong key", "chat", lambda: front.chat(headers=bad_key))
    run.note("wrong key", "append events", lambda: front.http.post(EVENTS, json=event("ana"), headers=bad_key))
    run.note("no user token", "chat", lambda: front.chat(headers={"authorization": auth()["authorization"]}))
    run.note("expired user token", "chat", lambda: front.chat(headers=auth(seconds=-60)))
    run.note("user token for another audience", "chat", lambda: front.chat(headers=auth(aud="another")))
    run.note("user token of another tenant", "chat", lambda: front.chat(headers=auth("cinema")))
    run.note("user token of another user", "chat", lambda: front.chat(headers=auth(user="ben")))
    run.note(
        "user token of another user",
        "append events",
        lambda: front.http.post(EVENTS, json=event("ana"), headers=auth(user="ben")),
    )
    run.sound(front, headers=auth())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
