"""A fleet on loopback: gateways behind nginx, events in PostgreSQL, states in Redis, and a stand-in for vLLM.

The stand-in answers a chat with what it was sent of the user: the first numbers of each row of user tokens. So a caller
can tell whose tokens came, and no LLM takes the cores that the gateways are measured on.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from local_servers import Postgres, Redis, Server, program
from stand_in import NUMBERS

from persona.history import History
from persona.injection import PersonalizedLM

DEPLOY = Path(__file__).parents[2] / "persona" / "serving" / "deploy"
QUESTION = "What does this user buy most?"


class Program(Server):
    """A Python program of ours that takes a port."""

    def __init__(self, *arguments: str):
        super().__init__()
        self._arguments, self.where = arguments, None  # paths in the arguments are as the caller means them

    def command(self) -> list[str]:
        """See `Server`."""
        return [sys.executable, *self._arguments, "--port", str(self.port)]

    def environment(self) -> dict[str, str]:
        """Ours, with one thread for each process."""
        return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def mebibytes(self) -> float:
        """Resident memory of its processes."""
        own = psutil.Process(self.pid)
        return sum(p.memory_info().rss for p in (own, *own.children(recursive=True))) / 2**20


class Nginx(Server):
    """nginx with the configuration that we ship, in front of the servers given."""

    def __init__(self, ports: Sequence[int]):
        super().__init__()
        text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
        text = re.sub(r"\n\s*server gateway-\d[^\n]*", "", text)
        servers = "".join(f"\n        server 127.0.0.1:{port} max_fails=1 fail_timeout=5s;" for port in ports)
        text = text.replace("zone gateways 64k;", f"zone gateways 64k;{servers}")
        text = text.replace("listen 8080;", f"listen 127.0.0.1:{self.port};").replace("/tmp/", f"{self.folder}/")
        text = text.replace("access_log /dev/stdout;", "access_log off;")
        (self.folder / "nginx.conf").write_text(text, encoding="utf-8")

    def command(self) -> list[str]:
        """See `Server`."""
        return [program("nginx"), "-c", str(self.folder / "nginx.conf"), "-g", "daemon off;"]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


class Fleet:
    """All servers, started. `store` and `cache` are their URLs."""

    def __init__(self, stack: ExitStack, adapter: str, llm: str, gateways: int):
        self.postgres = stack.enter_context(Postgres(durable=True))
        self.redis = stack.enter_context(Redis())
        self.store, self.cache = self.postgres.database("fleet"), self.redis.url
        upstream = stack.enter_context(Program(str(Path(__file__).with_name("stand_in.py"))))
        serve = ["-m", "persona.cli", "serve", "--adapter", adapter, "--llm", llm, "--upstream", upstream.url]
        serve += ["--store", self.store, "--cache-url", self.cache]
        self.gateways = [Program(*serve) for _ in range(gateways)]
        for gateway in self.gateways:
            gateway.wait_s = 120  # beside a busy core; it imports PyTorch
            stack.enter_context(gateway)
        self.nginx = stack.enter_context(Nginx([gateway.port for gateway in self.gateways]))
        self.client = stack.enter_context(httpx.Client(base_url=self.nginx.url, timeout=60))
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 120
        for gateway in self.gateways:
            while httpx.get(f"{gateway.url}/persona/v1/ready").status_code != 200:
                if time.monotonic() > end:
                    raise RuntimeError(f"{gateway.url} did not get ready")
                time.sleep(0.2)


@contextmanager
def fleet(adapter: str, llm: str, gateways: int = 2):
    """A `Fleet`, which ends with the block."""
    with ExitStack() as stack:
        yield Fleet(stack, adapter, llm, gateways)


def chat(client: httpx.Client, user: str | None) -> tuple[str, np.ndarray | None]:
    """Asks about a user: what became of it (`personalized` or the reason), and what came to the LLM of the user."""
    body = {"model": "m", "messages": [{"role": "user", "content": QUESTION}], **({"user": user} if user else {})}
    reply = client.post("/v1/chat/completions", json=body)
    reply.raise_for_status()
    said = reply.headers["x-persona-reason"] if reply.headers["x-persona"] == "plain" else reply.headers["x-persona"]
    rows = reply.json()["choices"][0]["message"]["content"]
    return said, np.array([float(x) for x in rows.split()]) if rows else None


def append(client: httpx.Client, user: str, events: Sequence[dict]) -> bool:
    """Writes events; whether they were acknowledged."""
    try:
        return client.post("/persona/v1/events", json={"user": user, "events": list(events)}).status_code == 200
    except httpx.HTTPError:
        return False


class Expected:
    """What should come to the LLM of a user, made in this process, without store, cache or server."""

    def __init__(self, adapter: str, llm: str):
        torch.set_num_threads(1)
        self.model = PersonalizedLM.from_pretrained(adapter, llm, llm_weights=False).eval()

    @torch.inference_mode()
    def __call__(self, histories: Sequence[History]) -> np.ndarray:
        """`[users, numbers]`."""
        states = self.model.encoder.read(histories)
        rows = self.model.soft_rows(states, [QUESTION] * len(states))
        return np.stack([own[:, :NUMBERS].flatten().float().numpy() for own in rows])


def interrupt(server: Server, seconds: float) -> None:
    """Stops a server and starts it again after a while."""
    server.stop(signal.SIGINT if isinstance(server, Postgres) else signal.SIGTERM)
    time.sleep(seconds)
    server.start()


def processors() -> str:
    """The machine, in words."""
    name = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    model = re.search(r"Model name:\s*(.+)", name)
    return f"{os.cpu_count()} cores, {model[1] if model else 'unknown'}"
