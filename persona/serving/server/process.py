"""`EncodingProcess`: an `Encoding` in a process of its own, behind a socket that only the two processes have.

    python -m persona.serving.server.process FD

is what it starts. Both sides are asyncio; messages are pickled, which is safe between a process and its own child.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from typing import Any

from persona.errors import PersonaError
from persona.injection.model import AdapterConfig
from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import Encoding, log_error

log = logging.getLogger("persona.serving")

_SIZE = 8
"""Bytes of the number before each message that says how long it is."""
_VARIABLES = {"MALLOC_ARENA_MAX": "2"}
"""Of the process, unless they are set: each thread would else keep memory of its own that it has given back."""
_GONE = (asyncio.IncompleteReadError, ConnectionError)
"""What reading raises when the other side is gone."""
_PAUSE = 5.0
"""Seconds between attempts to start a process that has ended."""


class EncodingLostError(PersonaError):
    """The encoding process has ended, or has not started yet."""


class EncodingProcess:
    """Starts the process, starts it again when it ends, and calls its methods."""

    def __init__(self, config: ServerConfig):
        self._config, self._numbers = config, itertools.count()
        self._process: subprocess.Popen | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: dict[int, asyncio.Future] = {}
        self._reading: asyncio.Task | None = None
        self.adapter: AdapterConfig | None = None
        """The adapter's configuration, once the process has started."""

    async def start(self) -> None:
        """Returns when the process has loaded the adapter. Raises `PersonaError` with what is wrong."""
        ours, its = socket.socketpair()
        with its:
            argv = [sys.executable, "-m", __name__, str(its.fileno())]
            self._process = subprocess.Popen(argv, pass_fds=[its.fileno()], env={**_VARIABLES, **os.environ})
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(_message(self._config))
        try:
            told = await _read(reader)
        except _GONE:
            raise EncodingLostError("the encoding process ended before it was ready; its log says why") from None
        if isinstance(told, str):
            raise PersonaError(told)
        if self.adapter not in (None, told):  # the LLM may have been exported with layers of the other
            writer.close()  # which ends the process
            log.error("the adapter's files are of another training than at the start; restart the server")
            raise EncodingLostError("the adapter has changed")
        self.adapter, self._writer = told, writer
        self._reading = asyncio.create_task(self._read_answers(reader))

    async def call(self, method: str, *args: Any) -> Any:
        """What the `Encoding` of the process returns. Raises `EncodingLostError`, and the `PersonaError`s it raises."""
        if self._writer is None:
            raise EncodingLostError("the encoding process is being started")
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        message = _message((number, method, args))
        self._waiting[number] = answer
        self._writer.write(message)
        return await answer

    def close(self) -> None:
        """Ends the process."""
        if self._reading:
            self._reading.cancel()
        if self._writer:
            self._writer.close()
        if self._process:
            self._process.kill()
            self._process.wait()

    async def _read_answers(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, result, error = await _read(reader)
                answer = self._waiting.pop(number)
                if answer.done():
                    continue  # nobody waits any more
                if error is None:
                    answer.set_result(result)
                else:
                    answer.set_exception(error)
        except Exception as error:  # whatever is wrong with what it says, another has to take its place
            await self._again(error)

    async def _again(self, why: Exception) -> None:
        """After the end of the process: gives up what waits for it, and starts another."""
        self._writer.close()
        self._writer, waiting, self._waiting = None, self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(EncodingLostError("the encoding process has ended"))
        self._process.kill()
        code = await asyncio.to_thread(self._process.wait)  # giving back its memory may take a while
        ended = f"has ended ({code})" if isinstance(why, _GONE) else f"is ended ({type(why).__name__})"
        log.error("the encoding process %s; another is started", ended)
        while self._writer is None:
            try:
                await self.start()
            except Exception as error:
                log_error("the encoding process cannot be started", error)
                await asyncio.sleep(_PAUSE)


def _message(content: object) -> bytes:
    data = pickle.dumps(content)
    return len(data).to_bytes(_SIZE, "big") + data


async def _read(reader: asyncio.StreamReader) -> Any:
    """The next message. Raises `IncompleteReadError` when the other side is gone."""
    size = int.from_bytes(await reader.readexactly(_SIZE), "big")
    return pickle.loads(await reader.readexactly(size))


async def _serve(connection: socket.socket) -> None:
    """The child: loads what the first message says, then answers calls until the parent is gone."""
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        encoding = Encoding.load(await _read(reader))
    except Exception as error:
        if not isinstance(error, PersonaError):
            log_error("persona could not start", error)
        writer.write(_message(str(error) or type(error).__name__))
        await writer.drain()
        return
    writer.write(_message(encoding.adapter))
    running = set()

    async def answer(number: int, method: str, args: tuple) -> None:
        result = error = None
        try:
            result = await encoding.call(method, *args)
        except PersonaError as raised:
            error = raised
        except Exception as raised:
            log_error(f"{method} failed", raised)
            error = PersonaError(f"{method} failed: {type(raised).__name__}")
        try:
            message = _message((number, result, error))
        except Exception as raised:  # an answer that does not fit into memory, say
            log_error(f"{method} cannot be answered", raised)
            message = _message((number, None, PersonaError(f"{method} cannot be answered: {type(raised).__name__}")))
        writer.write(message)

    try:
        while True:
            task = asyncio.create_task(answer(*await _read(reader)))
            running.add(task)
            task.add_done_callback(running.discard)
    except _GONE:
        os._exit(0)  # a thread that hangs would keep the process


def main() -> None:
    """Entry point of the child process."""
    from persona.cli.common import quiet

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its end is ours
    logging.basicConfig(format="%(levelname)s persona: %(message)s")
    quiet()
    asyncio.run(_serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
