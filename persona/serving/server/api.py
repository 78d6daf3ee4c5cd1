"""The user API, on the port of the LLM: append events, read, export and forget a user; health, readiness, metrics.

User ids travel in bodies and never in URLs, since URLs are logged by servers and proxies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.params import Security
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field

import persona
from persona.errors import EventError, PersonaError
from persona.history import event_from_dict, event_to_dict
from persona.history.event import MAX_USER_ID
from persona.serving.server.auth import TOKEN_HEADER
from persona.serving.server.encoding import log_error
from persona.serving.server.errors import Refused
from persona.serving.server.service import Service, check_caller_user

_LINES = 500
_NDJSON = "application/x-ndjson"


class EventBody(BaseModel):
    """One event; see `persona.Event`."""

    # strict, as `Event` is: neither true nor "5" is a number.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    source: str = Field(min_length=1, description="Name of the stream that the event belongs to.")
    timestamp: float | None = Field(None, description="Seconds since 1970-01-01 UTC; none for facts without a time.")
    text: str | None = Field(None, description="What the event says, in words.")
    item_id: str | None = Field(None, description="Id of the thing acted on.")
    value: float | None = Field(None, description="A rating, a price, a duration.")
    attributes: dict[str, str | float | None] = Field({}, description="Named facts.")
    event_id: str | None = Field(None, description="Storing two events with the same id stores one.")


class UserBody(BaseModel):
    """The user that a request is about."""

    model_config = ConfigDict(extra="forbid")

    user: str | None = Field(
        None, min_length=1, max_length=MAX_USER_ID, description="User id; may be left out beside a signed user token."
    )


class EventsBody(UserBody):
    """Events to store."""

    events: list[EventBody] = Field(min_length=1, description="Stored all, or none if one of them is not valid.")


class HistoryBody(UserBody):
    """Which part of a history to read."""

    last: int = Field(100, ge=0, le=10_000, description="Newest so many timed events; untimed ones are always there.")
    until: float | None = Field(None, allow_inf_nan=False, description="Only timed events before it, in seconds.")


class Stored(BaseModel):
    """What became of events."""

    given: int = Field(description="Events in the request.")
    stored: int = Field(description="Events that were new.")


class HistoryOut(BaseModel):
    """A part of a history."""

    events: list[EventBody] = Field(description="Oldest first.")
    count: int = Field(description="Events stored of the user in all.")


class Erased(BaseModel):
    """What was forgotten."""

    erased: int = Field(description="Events there were.")


class ErrorOut(BaseModel):
    """An error as OpenAI clients read it."""

    class Detail(BaseModel):
        """What was wrong."""

        message: str
        type: str
        param: str | None
        code: str

    error: Detail


class Health(BaseModel):
    """Which server this is."""

    persona: str = Field(description="Version of persona.")
    domain: str = Field(description="Name of the adapter's recipe.")
    tokens: int = Field(description="User tokens that the adapter makes.")


class Ready(BaseModel):
    """Whether calls are personalised now."""

    ready: bool
    reason: str | None = None


_ERRORS = {status: {"model": ErrorOut} for status in (400, 401, 403, 413, 422, 503)}


def user_api(service: Service) -> FastAPI:
    """The FastAPI application; `PersonaMiddleware` authenticates ahead of it and names the caller in the scope."""
    app = FastAPI(
        title="persona",
        version=persona.__version__,
        description="Events of users, beside an OpenAI-compatible server that answers each user personally.",
        docs_url="/persona/docs",
        redoc_url=None,
        openapi_url="/persona/openapi.json",
    )
    # Checked by the middleware before anything is read; named here for the OpenAPI document.
    secured = {
        "responses": _ERRORS,
        "dependencies": [
            Security(HTTPBearer(auto_error=False, description="API key of a tenant")),
            Security(APIKeyHeader(name=TOKEN_HEADER, auto_error=False, description="Signed user token (JWT)")),
        ],
    }
    store, metrics = service.store, service.metrics

    def about(request: Request, body: UserBody) -> tuple[str, str]:
        """The user and the tenant that a request is about."""
        caller = request.scope["persona.caller"]
        user = caller.speaks_for(check_caller_user(body.user))
        if user is None:
            raise Refused(400, "missing_user", "name the user in the field `user`", "user")
        return user, caller.tenant

    @app.post("/persona/v1/events", tags=["users"], **secured)
    def append(request: Request, body: EventsBody) -> Stored:
        """Stores events of a user; when it answers, they are on disk. No model runs."""
        user, tenant = about(request, body)
        events = [event_from_dict(event.model_dump(exclude_unset=True)) for event in body.events]
        stored = store.append(user, events, tenant=tenant)
        metrics.events.inc(stored)
        return Stored(given=len(events), stored=stored)

    @app.post("/persona/v1/history", tags=["users"], response_model_exclude_none=True, **secured)
    def history(request: Request, body: HistoryBody) -> HistoryOut:
        """The newest events of a user."""
        user, tenant = about(request, body)
        found = store.history(user, until=body.until, last=body.last, tenant=tenant)
        events = [EventBody(**event_to_dict(event)) for event in found.events]
        return HistoryOut(events=events, count=store.count(user, tenant=tenant))

    @app.post(
        "/persona/v1/export",
        tags=["users"],
        response_class=StreamingResponse,
        **{**secured, "responses": {**_ERRORS, 200: {"content": {_NDJSON: {"schema": {"type": "string"}}}}}},
    )
    def export(request: Request, body: UserBody) -> StreamingResponse:
        """All that is stored of a user, one event a line, as `events` takes it back."""
        user, tenant = about(request, body)
        store.check()  # while there is still a status to send
        return StreamingResponse(_lines(store.export(user, tenant=tenant)), media_type=_NDJSON)

    @app.post("/persona/v1/forget", tags=["users"], **secured)
    async def forget(request: Request, body: UserBody) -> Erased:
        """Erases all of a user: events, states and cached texts, in the database's files and in memory."""
        user, tenant = about(request, body)
        return Erased(erased=await service.forget(user, tenant))

    @app.get("/persona/v1/health", tags=["operation"])
    async def health() -> Health:
        """Answers while the process lives; tells clients that this server takes user ids."""
        adapter = service.adapter
        return Health(persona=persona.__version__, domain=adapter.domain, tokens=adapter.tokens)

    @app.get("/persona/v1/ready", tags=["operation"], response_model=Ready, responses={503: {"model": Ready}})
    async def ready() -> Response:
        """200 when the store answers and encoding threads are free, else 503 with the reason."""
        reason = await service.not_ready()
        return JSONResponse({"ready": reason is None, "reason": reason}, 503 if reason else 200)

    @app.get("/persona/metrics", tags=["operation"], response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # Only where and what: the input itself may be no JSON (NaN), and is the user's.
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        where = where.encode("utf-8", "replace").decode()
        return Refused(422, "invalid_body", f"{where or 'body'}: {first['msg']}", where or None).response()

    @app.exception_handler(PersonaError)
    async def failed(request: Request, error: PersonaError) -> Response:
        if isinstance(error, EventError):
            message = str(error).encode("utf-8", "backslashreplace").decode()
            return Refused(422, "invalid_event", message).response()
        log_error("the user API failed", error)
        return Refused(503, "store_unavailable", str(error)).response()

    return app


def _lines(events: Iterable[dict]) -> Iterator[str]:
    """JSON lines, many at a time."""
    events = iter(events)
    while chunk := list(islice(events, _LINES)):
        yield "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in chunk)
