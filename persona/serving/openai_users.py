"""`client.persona` of a wrapped OpenAI client: what is known of users, on our server or in the local store.

User ids travel in bodies and never in URLs, which are logged. Requests go through the client, with its key, timeout
and retries, and its errors are the client's (`openai.APIStatusError`, `openai.APIConnectionError`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio

from persona.history import Event, History, check_user
from persona.history.event import event_from_dict, event_to_dict

if TYPE_CHECKING:
    from persona.serving.persona import Persona

API = "/persona/v1/"


@dataclass(frozen=True)
class _Errand:
    """One thing to do with a user, for our server or for a local persona."""

    route: str
    body: dict
    read: Callable[[Any], Any]
    """What the server's answer says."""
    local: Callable[[Persona], Any]
    answer: type = object
    """The server answers JSON, or text (str)."""


class Users:
    """Observes, reads and forgets users. Every method raises `EventError` for a user id that cannot be one."""

    def __init__(self, client):
        self._client = client

    def observe(self, user: str, events: Event | Iterable[Event]) -> int:
        """Stores events and returns how many were new.

        On our server, events without an `event_id` get a random one: a request that is tried again stores them once.
        """
        return self._run(_observe(user, events))

    def history(self, user: str, last: int = 100) -> History:
        """The newest `last` timed events, and those without a time; our server gives at most 10,000."""
        return self._run(_history(user, last))

    def export(self, user: str) -> list[dict]:
        """All that is stored of the user, in order of arrival, as dicts that `observe` takes back."""
        return self._run(_export(user))

    def forget(self, user: str) -> int:
        """Erases the user and returns how many events there were."""
        return self._run(_forget(user))

    def _run(self, errand: _Errand) -> Any:
        client = self._client
        if client._persona_mode() != "server":
            return errand.local(client._persona_local.persona)
        return errand.read(client.post(_url(client, errand), body=errand.body, cast_to=errand.answer))


class AsyncUsers:
    """`Users` for `openai.AsyncOpenAI`, which uses the local store in threads."""

    def __init__(self, client):
        self._client = client

    async def observe(self, user: str, events: Event | Iterable[Event]) -> int:
        """See `Users.observe`."""
        return await self._run(_observe(user, events))

    async def history(self, user: str, last: int = 100) -> History:
        """See `Users.history`."""
        return await self._run(_history(user, last))

    async def export(self, user: str) -> list[dict]:
        """See `Users.export`."""
        return await self._run(_export(user))

    async def forget(self, user: str) -> int:
        """See `Users.forget`."""
        return await self._run(_forget(user))

    async def _run(self, errand: _Errand) -> Any:
        client = self._client
        if await client._persona_mode() != "server":
            return await anyio.to_thread.run_sync(errand.local, client._persona_local.persona)
        return errand.read(await client.post(_url(client, errand), body=errand.body, cast_to=errand.answer))


def root(base_url: str) -> str:
    """The server's address, without the /v1 of the OpenAI routes."""
    return base_url.rstrip("/").removesuffix("/v1")


def _url(client, errand: _Errand) -> str:
    return root(str(client.base_url)) + API + errand.route


def _observe(user: str, events: Event | Iterable[Event | Mapping]) -> _Errand:
    listed = [events] if isinstance(events, (Event, Mapping)) else list(events)
    listed = [event if isinstance(event, Event) else event_from_dict(event) for event in listed]
    named = [replace(event, event_id=event.event_id or uuid4().hex) for event in listed]
    body = {"user": check_user(user), "events": [event_to_dict(event) for event in named]}
    return _Errand("events", body, lambda answer: answer["stored"], lambda persona: persona.observe(user, listed))


def _history(user: str, last: int) -> _Errand:
    def read(answer: dict) -> History:
        return History(user, tuple(event_from_dict(event) for event in answer["events"]))

    def local(persona: Persona) -> History:
        return persona.store.history(user, last=last, tenant=persona.tenant)

    return _Errand("history", {"user": check_user(user), "last": last}, read, local)


def _export(user: str) -> _Errand:
    def read(answer: str) -> list[dict]:
        return [json.loads(line) for line in answer.split("\n") if line]  # a text may hold other line separators

    def local(persona: Persona) -> list[dict]:
        return list(persona.store.export(user, tenant=persona.tenant))

    return _Errand("export", {"user": check_user(user)}, read, local, answer=str)


def _forget(user: str) -> _Errand:
    body = {"user": check_user(user)}
    return _Errand("forget", body, lambda answer: answer["erased"], lambda persona: persona.forget(user))
