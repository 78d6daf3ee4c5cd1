"""`Encoding`: store, encoder and caches of one process, and the threads that work with them.

A server runs it in a process of its own (`process`): a forward pass takes and drops Python's lock some hundred times,
and beside a busy event loop it would wait for the loop every time, and the loop for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from persona.encoders.embed_files import encoder_folder, encoder_revision
from persona.errors import PersonaError
from persona.injection.model import AdapterConfig, PersonalizedLM
from persona.serving.memory import UnservableError
from persona.serving.personalizer import CHAT, Outcome, Personalizer
from persona.serving.server.config import ServerConfig
from persona.serving.shared_states import SharedStates
from persona.serving.states import UserStates
from persona.store import EventStore, open_embeddings, space_name

log = logging.getLogger("persona.serving")

STORE_TIMEOUT = 5.0
"""Seconds that a call of the user API waits for the lock of a SQLite file."""


class Made(NamedTuple):
    """A request to hand on, what became of the user, and what it took."""

    body: bytes | None
    """The request in JSON; None where the LLM takes no request without user tokens, and this one cannot bring any."""
    outcome: Outcome
    seconds: float = 0.0
    """Time for reading the store, encoding and resampling."""
    hits: int = 0
    """Look-ups of states answered from memory, since the process started."""
    misses: int = 0
    """Those that had to encode."""


class Encoding:
    """Personalises request bodies in threads of this process."""

    def __init__(
        self, config: ServerConfig, model: PersonalizedLM, store: EventStore, shared: SharedStates | None = None
    ):
        self.model, self.store = model.eval(), store
        self.states = UserStates(model.encoder, store, config.cache_mib, config.budget_ms / 1000, shared)
        self.personalizer = Personalizer(model, self.states)
        # One thread an encoding: more would each bring along threads of OpenMP, which spin while they wait.
        self._pool = ThreadPoolExecutor(config.encode_threads, "persona", torch.set_num_threads, (1,))

    @classmethod
    def load(cls, config: ServerConfig) -> Encoding:
        """Loads the adapter and opens the store. Raises `PersonaError` with what is wrong."""
        model = PersonalizedLM.from_pretrained(config.adapter, config.llm, llm_weights=False, device=config.device)
        if model.adapter.lora:
            raise PersonaError(f"{config.adapter} has a LoRA, which vLLM would not apply; merge it into the LLM first")
        store, shared = EventStore(config.store, timeout=STORE_TIMEOUT), None
        if config.cache_url:
            embeddings = open_embeddings(config.cache_url, store, ttl=config.cache_ttl)
            space = space_name(encoder_revision(encoder_folder(config.adapter)))
            shared = SharedStates(embeddings, space, model.encoder.device)
        return cls(config, model, store, shared)

    @property
    def adapter(self) -> AdapterConfig:
        """The adapter's configuration."""
        return self.model.adapter

    async def start(self) -> None:
        """Nothing: this process runs already."""

    async def call(self, method: str, *args: Any) -> Any:
        """What `personalize`, `forget` or `check` returns, run in a thread. A thread that hangs is lost."""
        pool = None if method == "forget" else self._pool  # erasing does not wait behind encodings
        return await asyncio.get_running_loop().run_in_executor(pool, getattr(self, method), *args)

    def personalize(
        self,
        route: str,
        body: bytes,
        user: str | None,
        tenant: str,
        salt: str,
        instruction: str | None,
        count: int | None,
    ) -> Made:
        """The body, in JSON, with the user's rows in it, or without them and why.

        Never raises for a store or an encoder.
        """
        apply = self.personalizer.chat if route.endswith(CHAT) else self.personalizer.completion
        start = time.perf_counter()
        asked, made = json.loads(body), None
        try:
            made, outcome = apply(asked, user, instruction=instruction, count=count, tenant=tenant)
        except TimeoutError:
            outcome = Outcome(False, "timeout")
        except UnservableError as error:
            outcome = Outcome(False, error.reason)
        except Exception as error:  # whatever fails in ours, the call is answered
            log_error("personalising failed", error)
            outcome = Outcome(False, "failed")
        if made is None:
            try:
                made = self.personalizer.plain(route, asked)
            except UnservableError as error:
                outcome = Outcome(False, error.reason)
            except Exception as error:  # it may be what made personalising fail
                log_error("writing a plain request failed", error)
        seconds = time.perf_counter() - start
        sent = None if made is None else written(made, salt)
        return Made(sent, outcome, seconds, self.states.hits, self.states.misses)

    def forget(self, user: str, tenant: str) -> int:
        """Erases a user here and in the store; returns how many events there were."""
        return self.states.forget(user, tenant=tenant)

    def check(self) -> None:
        """Raises `PersonaError` unless the store answers."""
        self.store.check()

    def close(self) -> None:
        """Closes the store; does not wait for threads that hang."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.store.close()


def written(body: dict, salt: str) -> bytes:
    """A request in JSON, with the tenant's cache salt."""
    return json.dumps({**body, "cache_salt": salt}).encode()


def log_error(what: str, error: BaseException) -> None:
    """Logs where an error came from, without its message, which may quote a user.

    For an error that is raised on purpose (a locked store) that is one line; for any other, the whole way.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, PersonaError) and frames:
        log.error("%s: %s in %s, line %d", what, type(error).__name__, frames[-1].filename, frames[-1].lineno)
    else:
        log.error("%s: %s\n%s", what, type(error).__name__, "".join(traceback.format_list(frames)))
