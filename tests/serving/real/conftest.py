"""Real servers: stock vLLM with our middleware and a plain port, a plain one, a gateway; one of each a session."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import psutil
import pytest

from persona import Persona
from persona.demo.shop import generate_shop
from persona.serving.server.config import ServerConfig
from persona.serving.server.launch import command
from persona.training.recipe import Domain, load_recipe

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ADAPTER, LLM = (str(ROOT / "adapters" / "demo" / name) for name in ("weights", "lm"))
FLAGS = ["--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "512"]
FLAGS += ["--kv-cache-memory-bytes", str(64 * 2**20)]


@dataclass
class Server:
    """A process that serves HTTP, where it listens, and what it logs."""

    process: subprocess.Popen
    url: str
    log: Path

    def kill(self):
        """SIGKILL, to what it started as well."""
        with suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                process.kill()
        self.process.wait()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(argv, log, port=None, environment=None):
    """Starts a Python process on a free port; `ready` waits for it."""
    port = port or free_port()
    with open(log, "a") as out:
        process = subprocess.Popen(
            [sys.executable, *argv, "--port", str(port)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    return Server(process, f"http://127.0.0.1:{port}", Path(log))


def ready(server, seconds=300):
    """The server, once it answers."""
    end = time.monotonic() + seconds
    while True:
        assert server.process.poll() is None and time.monotonic() < end, server.log.read_text()[-3000:]
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health").status_code == 200:
                return server
        time.sleep(0.2)


@contextmanager
def serving(argv, log, **options):
    """A server that is ready, until the end of the block."""
    server = launch(argv, log, **options)
    try:
        yield ready(server)
    finally:
        server.kill()


def serve_command(*arguments):
    """`persona serve` with the demo adapter."""
    return ["-m", "persona.cli", "serve", "--adapter", ADAPTER, *arguments]


@cache
def own_folder():
    """Where the servers' store and logs are."""
    return Path(tempfile.mkdtemp(prefix="persona-served-"))


@cache
def both_ports():
    """Starts one vLLM with two ports: our middleware is in front of the first, and nothing in front of the second."""
    port, store = free_port(), f"sqlite:///{own_folder() / 'events.db'}"
    found = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    argv = serve_command("--store", store, "--budget-ms", "30000", *FLAGS, "--middleware", "door.PlainDoor")
    environment = {"PYTHONPATH": found, "PLAIN_PORT": str(port)}
    served = launch(argv, own_folder() / "plug-in.log", environment=environment)
    return served, Server(served.process, f"http://127.0.0.1:{port}", served.log)


def pytest_collection_finish(session):
    """Starts it ahead of all tests if one here will ask it: start-up takes 80 seconds of one core, idling none."""
    asked = {name for item in session.items if item.path.parent == HERE for name in item.fixturenames}
    if "served" in asked and not session.config.option.collectonly:
        both_ports()


def pytest_sessionfinish():
    if both_ports.cache_info().currsize:
        both_ports()[0].kill()
    if own_folder.cache_info().currsize:
        shutil.rmtree(own_folder())


@pytest.fixture(scope="session")
def folder():
    return own_folder()


@pytest.fixture(scope="session")
def histories(tmp_path_factory):
    """Users of a shop that the adapter was not trained on."""
    shop = tmp_path_factory.mktemp("shop")
    generate_shop(shop, users=30, seed=7)
    found = Domain(load_recipe(ROOT / "adapters" / "demo" / "recipe.yaml"), shop).histories
    return {user: found[user] for user in sorted(found, key=lambda user: -len(found[user]))[:12]}


@pytest.fixture(scope="session")
def database(folder, histories):
    """The event store that all servers share, with all users in it."""
    with_events = Persona.from_pretrained(ADAPTER, engine=None, store=f"sqlite:///{folder / 'events.db'}")
    for user, history in histories.items():
        with_events.observe(user, history.events)
    with_events.store.close()
    return folder / "events.db"


@pytest.fixture(scope="session")
def served(database):
    """Stock vLLM with our middleware."""
    return ready(both_ports()[0])


@pytest.fixture(scope="session")
def door(served):
    """The same vLLM past our middleware."""
    return ready(both_ports()[1])


@pytest.fixture(scope="session")
def plain(folder):
    """Stock vLLM in a process without our middleware."""
    argv, environment = command(ServerConfig(adapter=ADAPTER), FLAGS, {})
    argv = argv[1 : argv.index("--middleware")]
    at = argv.index("--port")
    with serving([*argv[:at], *argv[at + 2 :]], folder / "plain.log", environment=environment) as server:
        yield server


@pytest.fixture(scope="session")
def gateway(folder, database, plain):
    """The gateway in front of the plain vLLM."""
    arguments = ["--store", f"sqlite:///{database}", "--budget-ms", "30000", "--upstream", plain.url]
    with serving(serve_command(*arguments), folder / "gateway.log") as server:
        yield server


@pytest.fixture(scope="session")
def persona(database):
    """The reference: Hugging Face, in this process."""
    return Persona.from_pretrained(ADAPTER, store=f"sqlite:///{database}")
