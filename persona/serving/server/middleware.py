"""`PersonaMiddleware`: the pure ASGI class that `vllm serve --middleware` loads.

It runs ahead of everything of vLLM's, so it authenticates, bounds and checks each request itself, puts the user's
rows into chat and completion requests, serves the user API on the same port, and closes all other routes that generate.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persona.errors import PersonaError
from persona.serving.memory import check_served
from persona.serving.personalizer import CALLERS, REASONS, Outcome
from persona.serving.server import requests
from persona.serving.server.api import user_api
from persona.serving.server.auth import Caller
from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import log, log_error
from persona.serving.server.errors import Refused
from persona.serving.server.flags import check_vllm_args
from persona.serving.server.metrics import Metrics
from persona.serving.server.service import Service, check_caller_user

PERSONALIZED = ("/v1/chat/completions", "/v1/completions")
"""Routes whose requests are personalised."""
OPEN = ("/health", "/ping", "/metrics", "/persona/v1/health", "/persona/v1/ready", "/persona/metrics")
"""Routes without authentication, for probes and scrapers; they tell nothing of users."""
PASSED = ("/v1/models", "/version", "/load", "/tokenize", "/detokenize", "/docs", "/redoc", "/openapi.json")
"""Routes that are passed on to vLLM as they are, with authentication. All others are closed: they generate without
our checks, take a caller's own cache salt, or control the engine."""


class PersonaMiddleware:
    """Personalises the requests to `app`, an OpenAI-compatible ASGI application.

    vLLM gives no arguments, so the settings then come from the environment (`ServerConfig`). Adapter and store are
    loaded when the server starts up; if that fails, the server does not start.
    """

    def __init__(self, app: ASGIApp, service: Service | None = None):
        self.app = app
        self._service, self._api = service, service and user_api(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the server's lifespan."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "closed by persona"})

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._start(scope)
        except Exception as error:  # one that got out would only tell the server to go on without a lifespan
            if self._service:
                self._service.close()
            await receive()
            if not isinstance(error, PersonaError):
                log_error("persona could not start", error)
            await send({"type": "lifespan.startup.failed", "message": f"persona: {error}"})
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self._service.close()

    async def _start(self, scope: Scope) -> None:
        state = getattr(scope.get("app"), "state", None)
        args = getattr(state, "args", None)
        if isinstance(args, Namespace):  # we are inside vLLM
            check_vllm_args(args)
        if self._service is None:
            service = Service.load(ServerConfig.load())
            self._service, self._api = service, user_api(service)
        await self._service.start()
        if isinstance(args, Namespace):
            memory = self._service.memory
            check_served(memory, getattr(args, "model", ""))
            if memory:
                check_vllm_args(args, memory=True)
            own = args.api_key or [os.environ.get("VLLM_API_KEY")]
            if keys := [key for key in own if key]:
                self._service.auth.accept(keys)
        routes = {getattr(route, "path", "") for route in getattr(scope.get("app"), "routes", [])}
        closed = sorted(routes.difference(PERSONALIZED, OPEN, PASSED))
        log.info("personalised: %s; closed: %s", ", ".join(PERSONALIZED), ", ".join(closed) or "none")

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        if service is None:
            raise PersonaError("persona has not been started: this server runs no lifespan; switch it on")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = Headers(scope=scope)
        anybody = path in OPEN or (scope["method"] == "OPTIONS" and path in (*PERSONALIZED, *PASSED))
        generates = path in PERSONALIZED and scope["method"] == "POST"
        try:
            caller = None if anybody else service.auth.caller(headers)
            if not (anybody or generates or path in PASSED or path.startswith("/persona/")):
                raise Refused(404, "closed", "this route is closed; use /v1/chat/completions or /v1/completions")
            body = await requests.read_body(receive, headers, service.config.max_body)
            if body and path in PASSED:
                requests.check(path, requests.parse(body))  # the tokenizer's routes read messages, too
            if generates:
                started = time.perf_counter()
                body, outcome = await self._personalize(path, headers, body, caller)
                service.metrics.overhead.observe(time.perf_counter() - started)
                send = _Marked(send, service.metrics, path, outcome)
        except Refused as refused:
            if generates:
                service.metrics.requests.labels(path, "refused", refused.code).inc()
            await refused.response()(scope, receive, send)
            return
        except requests.Disconnected:
            return
        scope = {**scope, "headers": _with_length(scope["headers"], len(body)), "persona.caller": caller}
        replay = _replay(body, receive)
        if path.startswith("/persona/"):
            await self._api(scope, replay, send)
            return
        try:
            await self.app(scope, replay, send)
        except Exception as error:
            if generates and not send.counted:
                service.metrics.requests.labels(path, "failed", type(error).__name__).inc()
            raise

    async def _personalize(
        self, path: str, headers: Mapping[str, str], raw: bytes, caller: Caller
    ) -> tuple[bytes, Outcome]:
        service = self._service
        with service.metrics.on_loop():
            body = requests.parse(raw)
            memory = service.memory is not None
            requests.check(path, body, memory)
            user = caller.speaks_for(check_caller_user(body.pop("user", None)))
            instruction = requests.instruction_of(headers)
            count = requests.count_of(headers, service.adapter.tokens, memory)
        try:
            raw, outcome = await service.personalize(path, body, user, caller.tenant, instruction, count)
        except RecursionError:  # Python reads JSON that is nested a little more deeply than what it writes
            raise Refused(400, "invalid_json", "the body is nested too deeply") from None
        if service.config.require_personalization and user is not None and not outcome.personalized:
            status = 400 if outcome.reason in CALLERS else 503
            raise Refused(status, outcome.reason, f"not personalised: {REASONS[outcome.reason]}")
        return raw, outcome


class _Marked:
    """A `send` that writes into an answer's headers what became of the user, and counts the call once."""

    def __init__(self, send: Send, metrics: Metrics, path: str, outcome: Outcome):
        self.counted = False
        self._send, self._requests, self._path, self._outcome = send, metrics.requests, path, outcome

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            outcome, self.counted = self._outcome, True
            if message["status"] >= 400:  # nobody was answered, so nothing is said of the user
                self._requests.labels(self._path, "failed", str(message["status"])).inc()
            else:
                self._requests.labels(self._path, _mark(message, outcome), outcome.reason or "").inc()
        await self._send(message)


def _mark(message: Message, outcome: Outcome) -> str:
    """Writes the outcome into an answer's headers; gives the word for it."""
    headers, word = MutableHeaders(scope=message), "personalized" if outcome.personalized else "plain"
    headers["x-persona"] = word
    if outcome.reason:
        headers["x-persona-reason"] = outcome.reason
    if outcome.truncated:
        headers["x-persona-truncated"] = "true"
    return word


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body once, and after that what the server has to say: a disconnect."""
    rest = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return rest.pop() if rest else await receive()

    return replay


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(k, v) for k, v in headers if k.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]
