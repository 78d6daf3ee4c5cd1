"""Start-up, threads and shutdown of a server process."""

import asyncio
import logging
import threading
from argparse import Namespace

import pytest
from starlette.applications import Starlette

from persona.errors import PersonaError
from persona.injection import PersonalizedLM, load_llm
from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import Encoding, log_error
from persona.serving.server.errors import Refused
from persona.serving.server.middleware import PersonaMiddleware
from persona.serving.server.service import check_caller_user

CHAT = "/v1/chat/completions"


def lifespan(app, scope=()):
    """What the application says when a server starts and stops."""
    said, waiting = [], [{"type": "lifespan.shutdown"}, {"type": "lifespan.startup"}]

    async def receive():
        return waiting.pop()

    async def send(message):
        said.append(message)

    asyncio.run(app({"type": "lifespan", "asgi": {"version": "3.0"}, **dict(scope)}, receive, send))
    return said


@pytest.fixture
def environment(model, tmp_path, monkeypatch):
    """Settings of a server that would start."""
    folder = model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv("PERSONA_ADAPTER", str(folder))
    monkeypatch.setenv("PERSONA_STORE", f"sqlite:///{tmp_path / 'served.db'}")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return monkeypatch


def test_a_server_loads_its_adapter_when_it_starts(environment, vllm, tmp_path):
    app = PersonaMiddleware(vllm.app)
    assert [m["type"] for m in lifespan(app)] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert (tmp_path / "served.db").exists()
    assert app._service.adapter.domain == "shop"
    assert app._service.encoding._process.poll() is not None, "the encoding process has ended"


def test_an_encoding_reads_no_weights_of_the_llm_but_its_embeddings(environment):
    encoding = Encoding.load(ServerConfig.load())
    assert {p.is_meta for n, p in encoding.model.llm.named_parameters() if "embed" not in n} == {True}
    encoding.close()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("ADAPTER", "/no/such/folder", "/no/such/folder"),
        ("STORE", "sqlite:////no/such/folder/x.db", "cannot be used"),
        ("STORE", "mysql://bob:hunter2@host/db", "works with sqlite"),
        ("KEYS_FILE", "/no/such/keys", "/no/such/keys cannot be read"),
        ("SECRET_FILE", "/no/such/secret", "/no/such/secret cannot be read"),
        ("BUDGET_MS", "-1", "PERSONA_BUDGET_MS"),
        ("JWT_KEY", "short", "32 or more"),
        pytest.param("DEVICE", "warp-drive", "warp-drive", marks=pytest.mark.slow),  # test_process asks the process
    ],
)
def test_a_server_that_cannot_start_says_why(environment, vllm, name, value, message):
    environment.setenv(f"PERSONA_{name}", value)
    said = lifespan(PersonaMiddleware(vllm.app))
    assert [m["type"] for m in said] == ["lifespan.startup.failed"]
    assert said[0]["message"].startswith("persona: ") and message in said[0]["message"]
    assert "hunter2" not in said[0]["message"]


def inside_vllm(**args):
    """The scope in which vLLM's own application calls its middleware."""
    args = Namespace(**{"api_key": None, "enable_prompt_embeds": True, **args})
    app = Starlette()
    app.state.args = args
    return {"app": app}


@pytest.fixture
def accepted(monkeypatch):
    """vLLM's own flags are checked elsewhere."""
    monkeypatch.setattr("persona.serving.server.middleware.check_vllm_args", lambda args: None)


def test_vllms_own_keys_are_taken_over(make, call, vllm, accepted, monkeypatch):
    app = make()
    lifespan(app, inside_vllm(api_key=["vllm-key"]))
    assert call(app, "POST", CHAT, {"messages": []}).status == 401
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    app = make()
    lifespan(app, inside_vllm())
    assert call(app, "POST", CHAT, {"messages": []}, {"authorization": "Bearer vllm-key"}).status == 401
    app = make()
    auth = {"authorization": "Bearer from-environment"}
    lifespan(app, inside_vllm())
    assert app.service.auth.caller(auth).tenant == "default"


def test_two_sets_of_keys_are_refused(make, keys, accepted):
    said = lifespan(make(keys_file=keys), inside_vllm(api_key=["vllm-key"]))
    assert said[0]["type"] == "lifespan.startup.failed" and "keep the latter" in said[0]["message"]


def test_closed_routes_are_logged(make, accepted, caplog):
    scope = inside_vllm()
    scope["app"].add_route("/v1/embeddings", lambda r: None)
    with caplog.at_level(logging.INFO):
        lifespan(make(), scope)
    assert "closed: /v1/embeddings" in caplog.text


def test_a_server_that_runs_no_lifespan_is_told_so(vllm, call):
    with pytest.raises(PersonaError, match="runs no lifespan"):
        call(PersonaMiddleware(vllm.app), "POST", CHAT, {"messages": [], "user": "ana"})


def test_an_adapter_with_lora_is_refused(llm_path, model, tmp_path):
    own = PersonalizedLM(*load_llm(llm_path), model.encoder, base_model=str(llm_path))
    own.add_lora(2)
    own.save_pretrained(tmp_path / "lora")
    with pytest.raises(PersonaError, match="merge it"):
        Encoding.load(ServerConfig(adapter=str(tmp_path / "lora"), store="sqlite://"))


def test_closing_does_not_wait_for_what_hangs(make, call, ana, faulty):
    app, go = make(budget_ms=100), threading.Event()
    faulty.fault = lambda: go.wait(30)
    assert (
        call(app, "POST", CHAT, {"messages": [{"role": "user", "content": "x"}], "user": ana}).outcome[1] == "timeout"
    )
    app.service.close()
    go.set()


def test_users_of_requests():
    assert check_caller_user(None) is None and check_caller_user("") is None and check_caller_user("é") == "é"
    for bad in (0, False, [], "x" * 257, "\ud83d"):
        with pytest.raises(Refused, match="1 to 256"):
            check_caller_user(bad)


def test_a_logged_error_keeps_its_message_to_itself(caplog):
    secret = "a user's text"
    try:
        raise ValueError(secret)
    except ValueError as error:
        log_error("it failed", error)
    assert "it failed: ValueError" in caplog.text and "test_service.py" in caplog.text and secret not in caplog.text


def test_an_error_that_is_raised_on_purpose_is_logged_in_one_line(caplog):
    try:
        raise PersonaError("a user's text")
    except PersonaError as error:
        log_error("it failed", error)
    assert "it failed: PersonaError in" in caplog.text and len(caplog.text.splitlines()) == 1
    assert "a user's text" not in caplog.text
