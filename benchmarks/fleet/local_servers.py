"""Private servers of this machine's Debian packages, for tests and benchmarks: own folder, loopback, a free port.

    with Postgres() as postgres, Redis() as redis:
        EventStore(postgres.database("shop"))

Nothing is kept when a `with` block ends. `stop` and `start` in between are a restart that keeps the data.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PACKAGES = {"postgres": "postgresql", "initdb": "postgresql", "redis-server": "redis-server", "nginx": "nginx-light"}
"""Program to the Debian package that it comes with."""


def program(name: str) -> str:
    """Where a program lies. Raises `FileNotFoundError` that names its package."""
    places = [os.environ["PATH"], *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)]
    found = shutil.which(name, path=os.pathsep.join([*places, "/usr/sbin"]))
    if not found:
        raise FileNotFoundError(f"{name} is not installed: apt-get install {PACKAGES.get(name, name)}")
    return found


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """A program in a folder of its own that listens on a port."""

    account: str | None = None
    """Who runs it when we are root; None for ourselves."""
    wait_s = 30.0
    """Seconds that it may take to start."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="persona-"))
        self.port, self._process = free_port(), None
        self.where: Path | None = self.folder
        """Where it runs; None is where we are."""
        if self._account:
            shutil.chown(self.folder, self._account)

    @property
    def _account(self) -> str | None:
        return self.account if os.geteuid() == 0 else None

    def command(self) -> list[str]:
        """The command line."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Its environment variables: nothing of ours, so that no setting of this machine gets in."""
        return {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TZ": "UTC"}

    def run(self, command: list[str]) -> None:
        """Runs a command to its end. Raises `subprocess.CalledProcessError`."""
        subprocess.run(command, check=True, user=self._account, stdout=subprocess.DEVNULL, cwd=self.folder)

    def start(self) -> None:
        """Returns when it listens. Raises `RuntimeError` with its log when it ends or takes too long."""
        log = self.folder / "log"
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                self.command(), user=self._account, stdout=out, stderr=out, cwd=self.where, env=self.environment()
            )
        end = time.monotonic() + self.wait_s
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.command()[0]} did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.02)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self, number: int = signal.SIGINT) -> None:
        """Ends it by a signal and waits."""
        self._process.send_signal(number)
        self._process.wait(30)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc) -> None:
        if self._process and self._process.poll() is None:
            self.stop(signal.SIGQUIT if self._account else signal.SIGTERM)  # PostgreSQL's is without a last checkpoint
        shutil.rmtree(self.folder, ignore_errors=True)


class Postgres(Server):
    """PostgreSQL with a superuser `postgres` and a plain role `persona`, both let in without a password.

    `durable`: whether a commit waits for the disk, as in production; tests of anything else are faster without.
    """

    account = "postgres"

    def __init__(self, durable: bool = False):
        super().__init__()
        self._durable, data = durable, str(self.folder / "data")
        self.run([program("initdb"), "--no-sync", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"])

    def command(self) -> list[str]:
        """See `Server`."""
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": self.folder, "max_connections": 200}
        settings |= {} if self._durable else {"fsync": "off"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [program("postgres"), "-D", str(self.folder / "data"), "-p", str(self.port), *options]

    def start(self) -> None:
        """See `Server`; waits for the first answer too."""
        super().start()
        end = time.monotonic() + 30
        while True:
            try:
                with self.connect() as connection:
                    if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'persona'").fetchone():
                        connection.execute("CREATE ROLE persona LOGIN")
                return
            except self._errors():
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def connect(self, database: str = "postgres", role: str = "postgres"):
        """A psycopg connection that commits at once."""
        import psycopg

        return psycopg.connect(host="127.0.0.1", port=self.port, dbname=database, user=role, autocommit=True)

    def _errors(self) -> type[Exception]:
        import psycopg

        return psycopg.OperationalError

    def url(self, database: str, role: str = "persona") -> str:
        """For `EventStore`."""
        return f"postgresql://{role}@127.0.0.1:{self.port}/{database}"

    def database(self, name: str) -> str:
        """The URL of a new empty database that the role `persona` owns, in place of an earlier one of that name."""
        with self.connect() as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            connection.execute(f'CREATE DATABASE "{name}" OWNER persona')
        return self.url(name)


class Redis(Server):
    """Redis. `persistent`: whether it keeps its data over a restart."""

    def __init__(self, persistent: bool = False):
        super().__init__()
        self._program, self._persistent = program("redis-server"), persistent

    def command(self) -> list[str]:
        """See `Server`."""
        keep = ["--appendonly", "yes"] if self._persistent else ["--appendonly", "no"]
        where = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        return [self._program, *where, "--save", "", *keep]

    def empty(self) -> None:
        """Erases all keys."""
        import redis

        redis.Redis(port=self.port).flushall()

    @property
    def url(self) -> str:
        """For `open_embeddings`."""
        return f"redis://127.0.0.1:{self.port}/0"
