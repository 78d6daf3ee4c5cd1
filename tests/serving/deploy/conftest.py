"""A real nginx on a free port, servers behind it, and two gateways that share an event store."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import Encoding
from persona.serving.server.gateway import proxy
from persona.serving.server.middleware import PersonaMiddleware
from persona.serving.server.service import Service
from persona.store import EventStore

DEPLOY = Path(__file__).parents[3] / "persona" / "serving" / "deploy"


@pytest.fixture(scope="session")
def deploy():
    """The folder with the files."""
    return DEPLOY


class Manifest:
    """The documents of kubernetes.yaml."""

    def __init__(self, documents):
        self.documents = documents

    def of(self, *kinds):
        """All documents of these kinds."""
        return [document for document in self.documents if document["kind"] in kinds]

    def one(self, kind, name):
        """The one document of this kind and name."""
        (found,) = [document for document in self.of(kind) if document["metadata"]["name"] == name]
        return found

    def workloads(self):
        """What starts pods, by name."""
        return {document["metadata"]["name"]: document for document in self.of("Deployment", "StatefulSet", "Job")}

    def containers(self):
        """The containers of all workloads."""
        return [c for w in self.workloads().values() for c in w["spec"]["template"]["spec"]["containers"]]


@pytest.fixture(scope="session")
def manifest():
    return Manifest(list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))))


class Upstream:
    """Stands where vLLM stands: records requests, and holds back each piece of a stream until it may go on."""

    def __init__(self):
        self.requests, self.go_on = [], threading.Semaphore(0)
        self.app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST"])])

    async def answer(self, request):
        body = await request.body()
        self.requests.append(SimpleNamespace(key=request.headers.get("authorization"), body=body))
        if request.method == "POST" and request.url.path.startswith("/v1/") and json.loads(body).get("stream"):
            return StreamingResponse(self.pieces(), media_type="text/event-stream")
        return JSONResponse({"length": len(body)})

    async def pieces(self):
        for word in ("one", "two", "three"):
            yield f"data: {word}\n\n"
            while not self.go_on.acquire(blocking=False):
                await asyncio.sleep(0.01)


@pytest.fixture
def upstream():
    return Upstream()


@pytest.fixture
def serve(app_server):
    """Runs an ASGI application on a free port; gives its address and a way to stop it. Stopped when the test ends."""
    with ExitStack() as running:

        def start(app):
            one = running.enter_context(ExitStack())
            return SimpleNamespace(address=one.enter_context(app_server(app)).removeprefix("http://"), stop=one.close)

        yield start


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def nginx_binary():
    """Path of nginx; a machine without it skips its tests, but CI may not."""
    path = shutil.which("nginx", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"]))
    if path is None and os.environ.get("CI"):
        pytest.fail("nginx is not installed (apt-get install nginx-light)")
    return path or pytest.skip("nginx is not installed (apt-get install nginx-light)")


@pytest.fixture
def nginx_command(nginx_binary, tmp_path):
    """Writes nginx.conf with addresses of this machine; gives the command line that starts it."""

    def command(addresses, port):
        folder = tmp_path / "nginx"
        folder.mkdir()
        text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
        changes = {"listen 8080;": f"listen 127.0.0.1:{port};", " /tmp/": f" {folder}/"}
        changes |= {f"gateway-{n}:8000": address for n, address in enumerate(addresses, 1)}
        for old, new in changes.items():
            assert old in text, f"nginx.conf has no {old!r}"
            text = text.replace(old, new)
        (folder / "nginx.conf").write_text(text, encoding="utf-8")
        # The workers of a root's nginx would be nobody's, who may not enter the test's folder.
        directives = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
        return [nginx_binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr", "-g", directives]

    return command


@pytest.fixture
def nginx(nginx_command, tmp_path):
    """Starts nginx in front of two addresses; gives its URL."""
    running = []

    def start(*addresses):
        port = _free_port()
        command = nginx_command(addresses, port)
        with open(tmp_path / "nginx.log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        running.append(process)
        _wait(lambda: _connects(port), process, tmp_path / "nginx.log")
        return f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def _connects(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _wait(condition, process, log, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text(encoding="utf-8", errors="replace")
        time.sleep(0.05)


@pytest.fixture(params=["apps", pytest.param("processes", marks=pytest.mark.slow)])
def gateways(request, model, upstream, serve, tmp_path):
    """Two gateways with one event store in front of `upstream`, which can tell them apart by their keys.

    Each has an `address` and is ended by `kill`. Applications in threads of this process, or `persona serve`.
    """
    settings = {
        "store": f"sqlite:///{tmp_path / 'events.db'}",
        "upstream": f"http://{serve(upstream.app).address}",
        "budget_ms": 20_000,
    }
    each = [{**settings, "upstream_key": f"gateway-{n}"} for n in (1, 2)]
    with ExitStack() as running:
        if request.param == "apps":
            yield [_app(running, model, serve, one) for one in each]
        else:
            folder = model.save_pretrained(tmp_path / "adapter")
            made = [_process(running, tmp_path / one["upstream_key"], {**one, "adapter": folder}) for one in each]
            for one in made:  # both start at once
                _wait(one.ready, one.process, one.log)
            yield made


def _app(running, model, serve, settings):
    config, store = ServerConfig(adapter="unused", **settings), EventStore(settings["store"], timeout=5.0)
    running.enter_context(store)
    server = serve(PersonaMiddleware(proxy(config), Service(config, Encoding(config, model, store), store)))
    return SimpleNamespace(address=server.address, kill=server.stop)


def _process(running, log, settings):
    port = _free_port()
    variables = {f"PERSONA_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "persona.cli", "serve", "--port", str(port)]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=file, stderr=file)
    running.callback(process.wait)
    running.callback(process.kill)

    def ready():
        return _connects(port) and httpx.get(f"http://127.0.0.1:{port}/persona/v1/ready").status_code == 200

    def kill():
        process.kill()
        process.wait()

    return SimpleNamespace(address=f"127.0.0.1:{port}", kill=kill, ready=ready, process=process, log=log)
