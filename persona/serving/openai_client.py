"""OpenAI clients with a user id: a subclass of the given client's own class that shares its HTTP client.

The user is put into a request's fields before the request is built, once for all its retries, so signing, retries,
streaming and raw responses are the client's own. Nothing of a call that names no user is changed.

What became of the user stands in the answer's headers `x-persona` and `x-persona-reason`, as our server sets them,
and in `persona` of a parsed answer: `{"mode": ..., "personalized": ..., "reason": ...}` with the reason a key of
`persona.serving.personalizer.REASONS`. In the modes "embeds" and "text" the user id itself is not sent.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import TypeVar
from urllib.parse import quote

import anyio
import openai
from anyio.lowlevel import RunVar

from persona.errors import PersonaError
from persona.serving.local import Local
from persona.serving.openai_call import Call
from persona.serving.openai_users import API, AsyncUsers, Users, root
from persona.serving.personalizer import COUNT_HEADER, INSTRUCTION_HEADER

Client = TypeVar("Client", openai.OpenAI, openai.AsyncOpenAI)


def wrap_client(client: Client, local: Local, mode: str) -> Client:
    """A twin of the client, as `client.with_options()` makes one: closing either closes both."""
    kind = type(client)
    mixin = _AsyncPersonal if isinstance(client, openai.AsyncOpenAI) else _Personal
    modes = _Modes(local, mode)
    names = {"_persona_local": local, "_persona_modes": modes, "__module__": kind.__module__, "__doc__": kind.__doc__}
    twin = object.__new__(type(kind.__name__, (mixin, kind), names))
    # Resources that the client has made already (client.chat) point to the client itself; the twin makes its own.
    state = {n: v for n, v in vars(client).items() if not isinstance(getattr(kind, n, None), cached_property)}
    vars(twin).update(state)
    return twin


class _Modes:
    """The modes found out so far, by base URL; shared by a wrapped client and its `with_options()` copies."""

    def __init__(self, local: Local, mode: str):
        self.local, self.fixed = local, None if mode == "auto" else mode
        self.found: dict[str, str] = {}
        self.lock = threading.Lock()
        self._async_lock = RunVar("persona")  # an event loop's own

    @property
    def async_lock(self) -> anyio.Lock:
        """One lock for each event loop."""
        lock = self._async_lock.get(None)
        if lock is None:
            self._async_lock.set(lock := anyio.Lock())
        return lock

    def known(self, url: str) -> str | None:
        """The mode for a base URL, if it is known."""
        return self.fixed or self.found.get(url)

    def ask_models(self, health: object) -> bool:
        """Whether the list of models has to be looked at too."""
        return self.local.persona is not None and not _is_ours(health)

    def decide(self, url: str, health: object, models: object) -> str:
        """The mode that two answers speak for. Raises `PersonaError` when there is none without a persona."""
        if _is_ours(health):
            mode = "server"
        elif self.local.persona is None:
            raise PersonaError(
                f"{url} does not run persona, so the user must be encoded here: pass wrap(client, "
                "Persona.from_pretrained(adapter, engine=None))"
            )
        else:
            # No plain vLLM has the layers that read an adapter's memory.
            mode = "embeds" if _is_vllm(models) and not self.local.persona.personalizer.memory else "text"
        self.found[url] = mode
        return mode


class _Resources:
    """The resources that take a user."""

    _persona_local: Local
    _persona_modes: _Modes

    # Properties, which go before what the base class caches in the instance: no thread sees it without a user.

    @property
    def chat(self):
        """Chat completions; `create`, `parse` and `stream` take a user."""
        chat = super().chat
        _take_user(chat.completions, "create", "parse", "stream")
        return chat

    @property
    def completions(self):
        """Completions; `create` takes a user."""
        completions = super().completions
        _take_user(completions, "create")
        return completions


class _Personal(_Resources):
    """What a wrapped `openai.OpenAI` does differently."""

    @cached_property
    def persona(self) -> Users:
        """Observes, reads and forgets users, on our server or in the local store."""
        return Users(self)

    def _persona_mode(self) -> str:
        url, modes = str(self.base_url), self._persona_modes
        with modes.lock:
            if mode := modes.known(url):
                return mode
            health = self._persona_ask(root(url) + API + "health")
            return modes.decide(url, health, self._persona_ask("/models") if modes.ask_models(health) else None)

    def _persona_ask(self, path: str) -> object:
        try:
            return self.get(path, cast_to=object)
        except openai.APIStatusError as error:
            return _no_answer(error)

    def request(self, cast_to, options, **kwargs):
        call = Call.of(options)
        if call is None:
            return super().request(cast_to, options, **kwargs)
        if call.user:
            call.personalize(self._persona_local, self._persona_mode())
        return super().request(cast_to, call.options, **kwargs)

    def _process_response(self, *, options, response, **kwargs):
        if isinstance(call := options.post_parser, Call):
            try:
                call.mark(response)
            except PersonaError:
                response.close()
                raise
        return super()._process_response(options=options, response=response, **kwargs)


class _AsyncPersonal(_Resources):
    """What a wrapped `openai.AsyncOpenAI` does differently; users are encoded in threads."""

    @cached_property
    def persona(self) -> AsyncUsers:
        """Observes, reads and forgets users, on our server or in the local store."""
        return AsyncUsers(self)

    async def _persona_mode(self) -> str:
        url, modes = str(self.base_url), self._persona_modes
        async with modes.async_lock:
            if mode := modes.known(url):
                return mode
            health = await self._persona_ask(root(url) + API + "health")
            return modes.decide(url, health, await self._persona_ask("/models") if modes.ask_models(health) else None)

    async def _persona_ask(self, path: str) -> object:
        try:
            return await self.get(path, cast_to=object)
        except openai.APIStatusError as error:
            return _no_answer(error)

    async def request(self, cast_to, options, **kwargs):
        call = Call.of(options)
        if call is None:
            return await super().request(cast_to, options, **kwargs)
        if call.user:
            mode = await self._persona_mode()
            await anyio.to_thread.run_sync(call.personalize, self._persona_local, mode, abandon_on_cancel=True)
        return await super().request(cast_to, call.options, **kwargs)

    async def _process_response(self, *, options, response, **kwargs):
        if isinstance(call := options.post_parser, Call):
            try:
                call.mark(response)
            except PersonaError:
                await response.aclose()
                raise
        return await super()._process_response(options=options, response=response, **kwargs)


def _take_user(resource: object, *methods: str) -> None:
    for name in methods:
        if name not in vars(resource):
            setattr(resource, name, _taking_user(getattr(resource, name)))


def _taking_user(method):
    @functools.wraps(method)
    def call(*args, user_id: str | None = None, instruction: str | None = None, tokens: int | None = None, **kwargs):
        if user_id is not None:
            if kwargs.get("user", user_id) != user_id:
                raise PersonaError("`user_id` and `user` name two users; give one of them")
            kwargs["user"] = user_id
        headers = {}
        if instruction:
            headers[INSTRUCTION_HEADER] = quote(instruction)
        if tokens is not None:
            headers[COUNT_HEADER] = str(tokens)
        if headers:
            kwargs["extra_headers"] = {**(kwargs.get("extra_headers") or {}), **headers}
        return method(*args, **kwargs)

    return call


def _no_answer(error: openai.APIStatusError) -> None:
    """A server that has no such route answers None; one that is busy or broken has not answered at all."""
    if error.status_code == 429 or error.status_code >= 500:
        raise error


def _is_ours(health: object) -> bool:
    return isinstance(health, Mapping) and isinstance(health.get("persona"), str)


def _is_vllm(models: object) -> bool:
    listed = models.get("data") if isinstance(models, Mapping) else None
    return any(isinstance(m, Mapping) and m.get("owned_by") == "vllm" for m in listed or [])
