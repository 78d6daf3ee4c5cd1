"""The gateway: the same ASGI application in front of a vLLM on another host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from persona.errors import PersonaError
from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import log_error
from persona.serving.server.errors import Refused
from persona.serving.server.middleware import PersonaMiddleware
from persona.serving.server.service import Service

_HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"),
    *("upgrade", "host", "content-length"),
}
"""Headers that concern one connection only (RFC 9110, 7.6.1)."""
_OURS = {"x-persona-user-token", "x-persona-instruction", "x-persona-tokens", "authorization"}
"""Headers that were meant for us."""


def gateway(config: ServerConfig) -> ASGIApp:
    """The middleware in front of `config.upstream`. Raises `PersonaError` for a bad URL or adapter."""
    return PersonaMiddleware(proxy(config), Service.load(config))


def proxy(config: ServerConfig) -> ASGIApp:
    """An ASGI application that hands every request on to `config.upstream` and streams back what it says."""
    try:
        url = httpx.URL(config.upstream or "")
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise PersonaError("the upstream server is a URL such as http://vllm.internal:8000")
    key = config.upstream_key and config.upstream_key.get_secret_value()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    timeout = httpx.Timeout(None, connect=5.0)  # an answer takes as long as it takes

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout) as client:
            app.state.client = client
            yield

    async def forward(request: Request) -> Response:
        client: httpx.AsyncClient = request.app.state.client
        ours = _HOP_BY_HOP | _OURS
        headers = [(k, v) for k, v in request.headers.raw if k.decode("latin-1") not in ours]
        if key and request.scope.get("persona.caller"):  # a probe has shown no key, and gets none
            headers.append((b"authorization", f"Bearer {key}".encode()))
        # Not joined: a path that begins with two slashes would be taken for another host.
        try:
            target = url.copy_with(path=request.scope["path"], query=request.scope["query_string"] or None)
        except httpx.InvalidURL:
            return Refused(404, "closed", "there is no such path").response()
        # Not the client's `build_request`, which would add the client's own headers and other callers' cookies.
        sent = httpx.Request(request.method, target, headers=headers, content=await request.body())
        try:
            answer = await _until_disconnect(request, client.send(sent, stream=True))
        except httpx.ConnectError as error:
            log_error("the upstream server cannot be reached", error)
            return Refused(502, "upstream_down", "the LLM server cannot be reached").response()
        except httpx.HTTPError as error:
            log_error("the upstream server failed", error)
            return Refused(502, "upstream_failed", "the LLM server broke off").response()
        if answer is None:
            return Response(status_code=499)  # nobody reads it
        response = StreamingResponse(answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose))
        response.raw_headers = [(k.lower(), v) for k, v in answer.headers.raw if k.lower().decode() not in _HOP_BY_HOP]
        return response

    methods = ["GET", "HEAD", "POST", "OPTIONS"]
    return Starlette(routes=[Route("/{path:path}", forward, methods=methods)], lifespan=lifespan)


async def _until_disconnect(request: Request, sending) -> httpx.Response | None:
    """What the upstream answers; None if the client goes away first, and then the upstream request is dropped."""
    answer = asyncio.ensure_future(sending)
    gone = asyncio.ensure_future(request.receive())  # the body is read: only a disconnect can come
    await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
    if answer.done():
        gone.cancel()
        return answer.result()
    answer.cancel()
    return None
