"""A recording LLM server, the real gateway in front of it, and the real LiteLLM proxy in front of both."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from persona.encoders import EncoderConfig, UserEncoder
from persona.history import Event
from persona.injection import PersonalizedLM, load_llm
from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import Encoding
from persona.serving.server.gateway import proxy as forwarding
from persona.serving.server.middleware import PersonaMiddleware
from persona.serving.server.service import Service
from persona.store import EventStore

README = Path(__file__).parents[2] / "persona" / "integrations" / "README.md"
MASTER_KEY = "sk-master-0123456789abcdef0123456789abcdef"
CALLERS = """
from litellm.proxy._types import LitellmUserRoles, ProxyException, UserAPIKeyAuth

KEYS = {
    "sk-ana": {"user_id": "ana"},
    "sk-ben": {"user_id": "ben"},
    "sk-long": {"user_id": "x" * 300},
    "sk-service": {},
    "sk-customer": {"end_user_id": "ana"},
    "sk-admin": {"user_id": "default_user_id", "user_role": LitellmUserRoles.PROXY_ADMIN},
}


async def check(request, api_key):
    if api_key not in KEYS:
        raise ProxyException("unknown key", "auth_error", "key", 401)
    return UserAPIKeyAuth(api_key=api_key, **KEYS[api_key])
"""
"""What stands for LiteLLM's database of keys: `general_settings.custom_auth`."""


class Recorder:
    """An OpenAI-compatible server that records the requests to its generating routes."""

    def __init__(self):
        self.requests = []
        answer = Route("/v1/{route:path}", self.answer, methods=["POST"])
        self.app = Starlette(routes=[Route("/v1/models", self.models), answer])

    async def models(self, request):
        return JSONResponse({"object": "list", "data": [{"id": "shop", "object": "model", "owned_by": "vllm"}]})

    async def answer(self, request):
        body = json.loads(await request.body())
        self.requests.append((request.url.path, body, dict(request.headers)))
        if body["model"] == "broken":
            return JSONResponse({"error": {"message": "out of order", "type": "t", "code": "c"}}, 500)
        if request.url.path.endswith("embeddings"):
            data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
            return JSONResponse({"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1}})
        chat = request.url.path.endswith("chat/completions")
        whole = {"id": "1", "object": "chat.completion" if chat else "text_completion", "created": 1, "model": "shop"}
        if body.get("stream"):
            return StreamingResponse(self.words(whole), media_type="text/event-stream")
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": "music"}} if chat else {"text": "music"}
        usage = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
        return JSONResponse({**whole, "choices": [choice], "usage": usage})

    async def words(self, whole):
        for word in ("mu", "sic"):
            choice = {"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}
            yield f"data: {json.dumps({**whole, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    @property
    def last(self):
        """Body and headers of the last request."""
        _, body, headers = self.requests[-1]
        return body, headers


@pytest.fixture(scope="session")
def examples():
    """The README's blocks of code, by name."""
    blocks = re.findall(r"<!-- (\w+) -->\n```\w+\n(.*?)```\n<!-- \1 -->", README.read_text(encoding="utf-8"), re.S)
    return dict(blocks)


@pytest.fixture(scope="session")
def _recorder(app_server):
    recorder = Recorder()
    with app_server(recorder.app) as recorder.url:
        yield recorder


@pytest.fixture
def recorder(_recorder):
    """The recording server, without what earlier tests sent."""
    _recorder.requests.clear()
    return _recorder


@pytest.fixture(scope="session")
def gateway(app_server, _recorder, llm_path, vocabulary, text_encoder, tmp_path_factory):
    """URL of the real gateway with an untrained adapter, in front of the recording server; it knows ana and ben."""
    torch.manual_seed(1)
    shape = EncoderConfig(width=32, heads=2, layers=2, tokens=4, max_events=64, dropout=0.0)
    encoder = UserEncoder(shape, vocabulary, text_encoder)
    torch.manual_seed(2)
    model = PersonalizedLM(*load_llm(llm_path), encoder, base_model=str(llm_path), domain="shop").eval()
    config = ServerConfig(adapter="unused", upstream=_recorder.url, budget_ms=60_000)
    with EventStore(f"sqlite:///{tmp_path_factory.mktemp('gateway') / 'events.db'}", timeout=5.0) as store:
        for user, words in (("ana", ("violin", "drum")), ("ben", ("spade", "hose"))):
            store.append(user, [Event("purchase", float(i), text=word) for i, word in enumerate(words)])
        service = Service(config, Encoding(config, model, store), store)
        with app_server(PersonaMiddleware(forwarding(config), service)) as url:
            yield url
        service.close()


@pytest.fixture(scope="session")
def litellm_proxy(_recorder, gateway, examples, tmp_path_factory):
    """URL of the real LiteLLM proxy; `shop` is the README's model, on the gateway, others are on the recorder."""
    folder, recorded = tmp_path_factory.mktemp("litellm"), f"{_recorder.url}/v1"
    config = yaml.safe_load(examples["litellm"].replace("http://127.0.0.1:8000/v1", f"{gateway}/v1"))

    def add(name, model, persona=True, **params):
        params = {"model": model, "api_base": recorded, "api_key": "server-key", **params}
        config["model_list"].append({"model_name": name, "litellm_params": params, "model_info": {"persona": persona}})

    add("recorded", "openai/shop", extra_body={"top_k": 3}, extra_headers={"x-tier": "gold"})
    add("hosted", "hosted_vllm/shop")
    add("plain", "hosted_vllm/shop", persona=False)
    add("broken", "openai/broken", persona=False)
    config["litellm_settings"] |= {"cache": True, "cache_params": {"type": "local"}, "num_retries": 0}
    config["general_settings"] = {"master_key": MASTER_KEY, "custom_auth": "callers.check"}
    (folder / "callers.py").write_text(CALLERS)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("litellm"), "--config", "config.yaml", "--host", "127.0.0.1"]
    env = {k: v for k, v in os.environ.items() if k != "DATABASE_URL"} | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=folder, env=env, stdout=log, stderr=log)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 180
    try:
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _answers(url):
    try:
        return httpx.get(f"{url}/health/liveliness").is_success
    except httpx.TransportError:
        return False
