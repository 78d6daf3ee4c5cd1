"""A recording server behind ours, a way to call an ASGI application, real servers, and an encoder that can fail."""

import asyncio
import base64
import io
import json
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
import torch
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from torch import nn

from persona.encoders import EncoderConfig, UserEncoder
from persona.history import Event
from persona.injection import PersonalizedLM, load_llm
from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import Encoding
from persona.serving.server.middleware import PersonaMiddleware
from persona.serving.server.service import Service
from persona.store import EventStore


class Vllm:
    """Stands where vLLM stands: records requests, answers in JSON, in a stream, or in a slow stream."""

    def __init__(self):
        self.requests, self.left = [], threading.Event()
        methods = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]
        self.app = Starlette(routes=[Route("/{path:path}", self.answer, methods=methods)])

    @property
    def last(self):
        """The last request's body."""
        return json.loads(self.requests[-1].body)

    async def answer(self, request):
        body = await request.body()
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in request.headers.raw]
        self.requests.append(Seen(request.method, request.scope["path"], headers, body))
        try:
            asked = json.loads(body)
        except ValueError:
            asked = None
        asked = asked if isinstance(asked, dict) else {}
        if asked.get("fail"):
            raise RuntimeError("the engine died")
        if asked.get("stream"):
            return StreamingResponse(self.words(asked.get("slow")), media_type="text/event-stream")
        return JSONResponse({"ok": True}, asked.get("status", 200), {"set-cookie": "session=of-one-caller"})

    async def words(self, slow):
        """Server-sent events; `slow` ones never end by themselves."""
        try:
            for word in ("one", "two"):
                yield f"data: {word}\n\n"
            while slow:
                await asyncio.sleep(0.02)
                yield "data: more\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.left.set()


@dataclass
class Seen:
    """A request that arrived at the inner server."""

    method: str
    path: str
    headers: list
    body: bytes

    def header(self, name):
        """All values of a header."""
        return [v for k, v in self.headers if k.lower() == name]


@dataclass
class Reply:
    """What an application answered."""

    status: int = 0
    headers: dict = field(default_factory=dict)
    body: bytes = b""
    messages: list = field(default_factory=list)

    @property
    def json(self):
        """The body, which is JSON."""
        return json.loads(self.body)

    @property
    def outcome(self):
        """What the headers say became of the user."""
        return self.headers.get("x-persona"), self.headers.get("x-persona-reason")


async def _call(app, method, path, body=b"", headers=(), *, chunks=None, gone=False, **scope):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = [("content-type", "application/json"), *(headers.items() if isinstance(headers, dict) else headers)]
    if chunks is None:
        headers.append(("content-length", str(len(body))))
        chunks = [body]
    waiting = [{"type": "http.request", "body": c, "more_body": i < len(chunks) - 1} for i, c in enumerate(chunks)]
    if gone:
        waiting[-1]["more_body"] = True
    reply, taken = Reply(), 0

    async def receive():
        nonlocal taken
        if taken < len(waiting):
            taken += 1
            return waiting[taken - 1]
        if not gone:
            await asyncio.sleep(30)  # a client that stays
        return {"type": "http.disconnect"}

    async def send(message):
        reply.messages.append(message)
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in message["headers"]}
        reply.body += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        **scope,
    }
    await app(scope, receive, send)
    reply.taken = taken
    return reply


@pytest.fixture(scope="session")
def acall():
    """`await acall(app, method, path, body, headers, ...)` calls an ASGI application once."""
    return _call


@pytest.fixture(scope="session")
def call():
    """The same, for tests that do not run in an event loop."""
    return lambda *args, **kwargs: asyncio.run(_call(*args, **kwargs))


@pytest.fixture
def vllm():
    return Vllm()


@pytest.fixture(scope="session")
def model(llm_path, vocabulary, text_encoder):
    """An untrained adapter on the tiny Llama, one for all tests of the server."""
    torch.manual_seed(1)
    config = EncoderConfig(width=32, heads=2, layers=2, tokens=4, max_events=64, dropout=0.0)
    encoder = UserEncoder(config, vocabulary, text_encoder)
    torch.manual_seed(2)
    llm, tokenizer = load_llm(llm_path)
    return PersonalizedLM(llm, tokenizer, encoder, base_model=str(llm_path), domain="shop").eval()


class Faulty(nn.Module):
    """A backbone that first does what a test wants it to do: nothing, raise, or wait."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.calls, self.fault = backbone, 0, lambda: None
        self.keep = backbone.keep

    def forward(self, *args, **kwargs):
        self.calls += 1
        self.fault()
        return self.backbone(*args, **kwargs)


@pytest.fixture
def faulty(model):
    """The model's backbone, made faulty for one test."""
    good = model.encoder.backbone
    model.encoder.backbone = Faulty(good)
    yield model.encoder.backbone
    model.encoder.backbone = good


@pytest.fixture
def database(tmp_path):
    """Path of the event store's file."""
    return tmp_path / "events.db"


@pytest.fixture
def store(database):
    with EventStore(f"sqlite:///{database}", timeout=5.0) as store:
        yield store


@pytest.fixture
def make(model, store, vllm, monkeypatch):
    """Makes the middleware in front of the recording server, with the settings given."""
    monkeypatch.delenv("PERSONA_STORE", raising=False)
    services = []

    def make(app=None, store=store, **settings):
        config = ServerConfig(adapter="unused", **{"budget_ms": 20_000, **settings})
        service = Service(config, Encoding(config, model, store), store)
        services.append(service)
        made = PersonaMiddleware(app or vllm.app, service)
        made.service = service
        return made

    yield make
    for service in services:
        service.close()


@pytest.fixture
def keys(tmp_path):
    """A file with the API keys of two tenants."""
    path = tmp_path / "keys.yaml"
    path.write_text("shop: [shop-key-1, shop-key-2]\ncinema: cinema-key\n")
    return path


@pytest.fixture
def ana(store):
    """A user with events."""
    store.append("ana", [Event("purchase", float(i), text=f"{w} music") for i, w in enumerate(["violin", "drum"])])
    return "ana"


@pytest.fixture(scope="session")
def rows_of():
    """Decodes what stands in a request as embeddings."""
    return lambda text: torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)


@pytest.fixture(scope="session")
def counted():
    """The value of a metric, from what Prometheus reads."""

    def counted(app, name, **labels):
        value = app.service.metrics.registry.get_sample_value(name, labels)
        return 0 if value is None else value

    return counted


@pytest.fixture
def serve(app_server):
    """Runs an ASGI application on a free port until the test ends; gives its URL."""
    with ExitStack() as running:
        yield lambda app, **options: running.enter_context(app_server(app, **options))


def wait_for(condition, seconds=10.0):
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def until():
    return wait_for
