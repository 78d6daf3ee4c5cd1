"""Real HTTP endpoints that record what they are asked: a plain vLLM's, our server's, and a hosted one's."""

import base64
import io
import json
import socket
import threading
import time

import openai
import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from persona import Event, Persona
from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import Encoding
from persona.serving.server.middleware import PersonaMiddleware
from persona.serving.server.service import Service
from persona.store import EventStore

ANA = "ana ✓ אנה"
"""A user id that no header or URL would take as it is; the persona knows it."""
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


class Endpoint:
    """An OpenAI-compatible server that records what it is asked."""

    def __init__(self, owned_by):
        self.owned_by, self.requests, self.failures, self.url = owned_by, [], [], None
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Route("/v1/completions", self.answer, methods=["POST"]),
            Route("/v1/embeddings", self.answer, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def models(self, request):
        self.requests.append((request.url.path, None, dict(request.headers)))
        return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": self.owned_by}]})

    async def answer(self, request):
        raw = await request.body()
        body = json.loads(raw)
        self.requests.append((request.url.path, raw, dict(request.headers)))
        if self.failures:
            status = self.failures.pop(0)
            error = {"error": {"message": f"status {status}", "type": "t", "param": "p", "code": "c"}}
            return JSONResponse(error, status, {"retry-after-ms": "1"})
        chat = "chat" in request.url.path
        whole = {"id": "1", "object": "chat.completion" if chat else "text_completion", "created": 1, "model": "m"}
        if body.get("stream"):
            return StreamingResponse(self.events(whole), media_type="text/event-stream")
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": '{"word": "hi"}'}} if chat else {"text": "hi"}
        return JSONResponse({**whole, "choices": [choice], "usage": USAGE})

    async def events(self, whole):
        for word in ("one", "two"):
            delta = {"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}
            yield f"data: {json.dumps({**whole, 'object': 'chat.completion.chunk', 'choices': [delta]})}\n\n"
        yield "data: [DONE]\n\n"

    def client(self, **options):
        return openai.OpenAI(base_url=self.url, api_key="secret-key", **options)

    def async_client(self, **options):
        return openai.AsyncOpenAI(base_url=self.url, api_key="secret-key", **options)

    @property
    def bodies(self):
        return [json.loads(raw) for _, raw, _ in self.requests if raw]

    @property
    def turns(self):
        """The last messages' contents."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    @property
    def rows(self):
        """The embeddings that open the last messages, `[K, width]` each."""
        parts = [turn[0] for turn in self.turns]
        assert all(part["type"] == "prompt_embeds" for part in parts)
        return [torch.load(io.BytesIO(base64.b64decode(part["data"]))) for part in parts]

    @property
    def paths(self):
        return [path for path, _, _ in self.requests]


@pytest.fixture
def events():
    """Three purchases."""
    return [Event("purchase", float(i), text=f"{word} music") for i, word in enumerate(["violin", "drum", "vinyl"])]


@pytest.fixture
def serve():
    """Runs ASGI applications on free ports until the test ends; gives their base URLs."""
    running = []

    def start(app):
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(5)


@pytest.fixture
def persona(model, tmp_path, events):
    """A local persona that knows one user."""
    with EventStore(f"sqlite:///{tmp_path / 'local.db'}") as store:
        persona = Persona(model, store)
        persona.observe(ANA, events)
        yield persona


@pytest.fixture
def vllm(serve):
    """A plain vLLM."""
    endpoint = Endpoint("vllm")
    endpoint.url = serve(endpoint.app)
    return endpoint


@pytest.fixture
def hosted(serve):
    """An endpoint that takes no embeddings."""
    endpoint = Endpoint("openai")
    endpoint.url = serve(endpoint.app)
    return endpoint


@pytest.fixture
def ours(serve, model, tmp_path):
    """Our real plug-in in front of the recording endpoint, with a key and a store of its own."""
    keys = tmp_path / "keys.yaml"
    keys.write_text("default: [secret-key]\n")
    endpoint = Endpoint("vllm")
    config = ServerConfig(adapter="unused", keys_file=keys, budget_ms=60_000)
    endpoint.store = EventStore(f"sqlite:///{tmp_path / 'server.db'}")
    service = Service(config, Encoding(config, model, endpoint.store), endpoint.store)
    endpoint.plugin = PersonaMiddleware(endpoint.app, service)
    endpoint.url = serve(endpoint.plugin)
    return endpoint
