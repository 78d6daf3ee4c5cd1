"""`Service`: what the ASGI layers stand on. It has request bodies personalised, within a budget."""

from __future__ import annotations

import asyncio
import json
import secrets
from contextlib import closing, suppress
from typing import Any

from starlette.concurrency import run_in_threadpool

from persona.errors import PersonaError
from persona.history import check_user
from persona.injection.model import AdapterConfig
from persona.serving.memory import Memory
from persona.serving.personalizer import CALLERS, CHAT, REASONS, Outcome
from persona.serving.server.auth import Authenticator, cache_salt, read_secret
from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import STORE_TIMEOUT, Encoding, Made, log_error, written
from persona.serving.server.errors import Refused
from persona.serving.server.metrics import Metrics
from persona.serving.server.process import EncodingLostError, EncodingProcess
from persona.store import EventStore, open_embeddings


class Service:
    """Encoding, store, authentication and metrics of one server process."""

    def __init__(self, config: ServerConfig, encoding: Encoding | EncodingProcess, store: EventStore):
        self.config, self.encoding, self.store = config, encoding, store
        self.auth = Authenticator(config)
        self.metrics = Metrics()
        self._secret = read_secret(config.secret_file, "the secret") if config.secret_file else secrets.token_bytes(32)
        self._pending = 0
        self._memory: Memory | None = None
        self._check: asyncio.Future | None = None

    @classmethod
    def load(cls, config: ServerConfig) -> Service:
        """A service that encodes in a process of its own, which `start` starts. Raises `PersonaError`."""
        return cls(config, EncodingProcess(config), EventStore(config.store, timeout=STORE_TIMEOUT))

    async def start(self) -> None:
        """Returns when users can be encoded. Raises `PersonaError` with what is wrong."""
        await self.encoding.start()

    @property
    def adapter(self) -> AdapterConfig:
        """The adapter's configuration."""
        return self.encoding.adapter

    async def personalize(
        self, route: str, body: dict, user: str | None, tenant: str, instruction: str | None, count: int | None
    ) -> tuple[bytes, Outcome]:
        """The request to hand on, in JSON, with the tenant's salt and the user's rows in it, or without rows and why.

        Never raises for a store or an encoder that fails, hangs or is slow; see `require_personalization` for the
        other choice. Raises `Refused` for a request that cannot bring user tokens to an LLM that takes none without,
        and `RecursionError` for a body that is nested too deeply to be written as JSON.
        """
        salt, memory = cache_salt(self._secret, tenant), self.memory
        reason = "no-user"
        if user is not None or (memory and not route.endswith(CHAT)):
            sent = json.dumps(body).encode()  # pickle cannot go as deep as the JSON that came in
            try:
                made: Made = await self._soon("personalize", route, sent, user, tenant, salt, instruction, count)
            except TimeoutError:
                reason = "timeout"
            except _Busy:
                reason = "busy"
            except PersonaError as error:  # of the process: it has ended, or has no memory left
                log_error("personalising failed", error)
                reason = "failed"
            else:
                if user is not None:
                    self.metrics.encoded(made)
                if made.body is None:
                    raise _unservable(made.outcome.reason)
                return made.body, made.outcome
        if memory and not route.endswith(CHAT):
            raise _unservable(reason)
        with self.metrics.on_loop():
            return written(memory.chat(body, None) if memory else body, salt), Outcome(False, reason)

    @property
    def memory(self) -> Memory | None:
        """What every request must bring to an LLM with cross-attention; None for a stock one."""
        if self._memory is None:
            self._memory = Memory.of(self.adapter)
        return self._memory

    async def forget(self, user: str, tenant: str) -> int:
        """Erases a user in the store and in memory; returns how many events there were."""
        try:
            return await self.encoding.call("forget", user, tenant)
        except EncodingLostError:  # and with it all that it had in memory
            erased = await run_in_threadpool(self._forget_here, user, tenant)
        with suppress(EncodingLostError):  # the next one may have read the user meanwhile
            await self.encoding.call("forget", user, tenant)
        return erased

    def _forget_here(self, user: str, tenant: str) -> int:
        """Erases a user in the store and in the shared cache, without the encoding process."""
        erased = self.store.forget(user, tenant=tenant)
        if self.config.cache_url:
            with closing(open_embeddings(self.config.cache_url, self.store)) as embeddings:
                embeddings.forget(user, tenant=tenant)
        return erased

    async def not_ready(self) -> str | None:
        """Why this server cannot personalise now; None when it can. Probes that come together share one check."""
        if self._pending >= self.config.max_pending:
            return "all encoding threads are busy"
        if self._check is None or self._check.done():
            self._check = asyncio.ensure_future(self.encoding.call("check"))
        try:
            await asyncio.wait_for(asyncio.shield(self._check), self.config.budget_ms / 1000)
        except TimeoutError:
            return "all encoding threads are busy, or the event store does not answer"
        except EncodingLostError:
            return "the encoding process is being started"
        except PersonaError:
            return "the event store cannot be used"
        return None

    def close(self) -> None:
        """Ends the encoding and closes the store."""
        self.encoding.close()
        self.store.close()

    async def _soon(self, method: str, *args: Any) -> Any:
        """What a method of the encoding returns. Raises `TimeoutError` after the budget; the work itself goes on."""
        if self._pending >= self.config.max_pending:
            raise _Busy
        self._pending += 1
        self.metrics.pending.set(self._pending)
        work = asyncio.ensure_future(self.encoding.call(method, *args))
        work.add_done_callback(self._done)
        return await asyncio.wait_for(asyncio.shield(work), self.config.budget_ms / 1000)

    def _done(self, work: asyncio.Future) -> None:
        self._pending -= 1
        self.metrics.pending.set(self._pending)
        if not work.cancelled():
            work.exception()  # looked at, so that a late failure is not reported as never retrieved


def _unservable(reason: str) -> Refused:
    why = f"this LLM takes no completion without user tokens, and {REASONS[reason]}"
    return Refused(400 if reason in CALLERS else 503, reason, why)


class _Busy(Exception):
    pass


def check_caller_user(user: object) -> str | None:
    """The request's `user` field. Raises `Refused` (400) for what cannot be a user id."""
    if user is None or user == "":
        return None
    try:
        return check_user(user)
    except PersonaError:
        raise Refused(
            400, "invalid_user", "user must be 1 to 256 Unicode characters, none of them U+0000", "user"
        ) from None
