"""`Service`: what the ASGI layers stand on. It personalises request bodies in threads, within a budget."""

from __future__ import annotations

import asyncio
import logging
import secrets
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from persona.errors import PersonaError
from persona.history import check_user
from persona.injection.model import PersonalizedLM
from persona.serving.personalizer import CHAT, Outcome, Personalizer
from persona.serving.server.auth import Authenticator, cache_salt, read_secret
from persona.serving.server.config import ServerConfig
from persona.serving.server.errors import Refused
from persona.serving.server.metrics import Metrics
from persona.serving.states import UserStates
from persona.store import EventStore

log = logging.getLogger("persona.serving")

_STORE_TIMEOUT = 5.0
"""Seconds that a call of the user API waits for the lock of a SQLite file."""


class Service:
    """Model, store, authentication and metrics of one server process."""

    def __init__(self, config: ServerConfig, model: PersonalizedLM, store: EventStore):
        self.config, self.model, self.store = config, model.eval(), store
        budget = config.budget_ms / 1000
        self.states = UserStates(model.encoder, store, config.cache_size, patience=budget)
        self.personalizer = Personalizer(model, self.states)
        self.auth = Authenticator(config)
        self.metrics = Metrics(self.states)
        self._secret = read_secret(config.secret_file, "the secret") if config.secret_file else secrets.token_bytes(32)
        self._budget = budget
        # One thread an encoding: more would each bring along threads of OpenMP, which spin while they wait.
        self._pool = ThreadPoolExecutor(config.encode_threads, "persona", torch.set_num_threads, (1,))
        self._pending = 0

    @classmethod
    def load(cls, config: ServerConfig) -> Service:
        """Loads the adapter and opens the store. Raises `PersonaError` with what is wrong."""
        model = PersonalizedLM.from_pretrained(config.adapter, config.llm, llm_weights=False, device=config.device)
        if model.adapter.lora:
            raise PersonaError(f"{config.adapter} has a LoRA, which vLLM would not apply; merge it into the LLM first")
        return cls(config, model, EventStore(config.store, timeout=_STORE_TIMEOUT))

    def salt(self, tenant: str) -> str:
        """The prefix cache's salt of a tenant."""
        return cache_salt(self._secret, tenant)

    async def personalize(
        self, route: str, body: dict, user: str | None, tenant: str, instruction: str | None, count: int | None
    ) -> tuple[dict, Outcome]:
        """The body with the user's rows in it, or unchanged with the reason.

        Never raises for a store or an encoder that fails, hangs or is slow; see `require_personalization` for the
        other choice.
        """
        if user is None:
            return body, Outcome(False, "no-user")
        apply = self.personalizer.chat if route.endswith(CHAT) else self.personalizer.completion

        def work() -> tuple[dict, Outcome]:
            with self.metrics.encode.time():
                return apply(body, user, instruction=instruction, count=count, tenant=tenant)

        try:
            return await self.in_thread(work)
        except TimeoutError:
            return body, Outcome(False, "timeout")
        except _Busy:
            return body, Outcome(False, "busy")
        except Exception as error:  # whatever fails in ours, the call is answered
            log_error("personalising failed", error)
            return body, Outcome(False, "failed")

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, run in an encoding thread. Raises `TimeoutError` after the budget.

        A thread cannot be stopped: one that hangs is lost, and readiness tells when none is left.
        """
        if self._pending >= self.config.max_pending:
            raise _Busy
        self._pending += 1
        self.metrics.pending.set(self._pending)
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(self._done)
        return await asyncio.wait_for(asyncio.shield(future), self._budget)

    def _done(self, future: asyncio.Future) -> None:
        self._pending -= 1
        self.metrics.pending.set(self._pending)
        if not future.cancelled():
            future.exception()  # looked at, so that a late failure is not reported as never retrieved

    async def not_ready(self) -> str | None:
        """Why this server cannot personalise now; None when it can."""
        try:
            await self.in_thread(self.store.check)
        except (TimeoutError, _Busy):
            return "all encoding threads are busy, or the event store does not answer"
        except PersonaError:
            return "the event store cannot be used"
        return None

    def close(self) -> None:
        """Closes the store; does not wait for threads that hang."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.store.close()


class _Busy(Exception):
    pass


def check_caller_user(user: object) -> str | None:
    """The request's `user` field. Raises `Refused` (400) for what cannot be a user id."""
    if user is None or user == "":
        return None
    try:
        return check_user(user)
    except PersonaError:
        raise Refused(400, "invalid_user", "user must be a text of 1 to 256 Unicode characters", "user") from None


def log_error(what: str, error: BaseException) -> None:
    """Logs where an error came from, without its message, which may quote a user."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s: %s\n%s", what, type(error).__name__, frames)
