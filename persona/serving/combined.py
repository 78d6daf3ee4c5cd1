"""`Combined`: calls of many threads done together, so that concurrent requests share one forward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from persona.errors import PersonaError


class PatienceError(PersonaError, TimeoutError):
    """Other requests have kept the encoder busy for longer than a caller waits."""


@dataclass(slots=True, eq=False)
class _Call:
    item: Any
    done: bool = False
    result: Any = None
    error: Exception | None = None


class Combined:
    """`work(items) -> results`, called item by item from any thread.

    While one thread works, further calls gather; the next thread to have its turn does all of them. Nothing waits for
    company: a call that comes alone is done at once. If a group fails, its calls are done one by one.
    """

    def __init__(self, work: Callable[[Sequence[Any]], Sequence[Any]], patience: float = 60.0, most: int = 64):
        self._work, self._patience, self._most = work, patience, most
        self._turn, self._gate = threading.Lock(), threading.Lock()
        self._waiting: list[_Call] = []

    def __call__(self, item: Any) -> Any:
        """The result for `item`. Raises what `work` raises, and `PatienceError` after `patience` seconds of waiting."""
        call = _Call(item)
        with self._gate:
            self._waiting.append(call)
        while not call.done:
            if not self._turn.acquire(timeout=self._patience):
                with self._gate:
                    if call in self._waiting:
                        self._waiting.remove(call)
                raise PatienceError(f"the encoder has been busy with other requests for {self._patience:g} s")
            try:
                if not call.done:
                    with self._gate:
                        calls, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                    self._do(calls)
            finally:
                self._turn.release()
        if call.error:
            raise call.error
        return call.result

    def _do(self, calls: Sequence[_Call]) -> None:
        try:
            results = self._work([call.item for call in calls])
        except Exception as error:
            if len(calls) > 1:
                for call in calls:
                    self._do([call])
                return
            calls[0].error, calls[0].done = error, True
            return
        for call, result in zip(calls, results):
            call.result, call.done = result, True
