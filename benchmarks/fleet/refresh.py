"""Refreshing all users through Ray Data: users a second by number of actors, memory over the run, a killed actor.

    python benchmarks/fleet/refresh.py --users 100000 --out benchmarks/results/fleet-refresh.json

Users are made up: each has `--events` events drawn from those of the generated shop, so texts repeat as a shop's do.
Every run is a process of its own with its own Ray, from Parquet, or from an event store in SQLite, to Parquet. Numbers
of actors take turns in every round; a rate is that of the second half of the users, when all actors have started.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from persona.batch import refresh
from persona.cli.common import quiet
from persona.demo.shop import generate_shop
from persona.evaluation.runner import git_hash
from persona.history import Event, History, read_histories
from persona.store import EventStore
from persona.training.recipe import load_recipe

RECIPE = "adapters/demo/recipe.yaml"
GIT_HASH = git_hash()
"""As it was when the run began."""
MIB = 2**20
EVERY = 0.5
"""Seconds between two looks at the memory."""
POINTS = 200
"""Longest series that is written."""
MAKES = 1000
"""Users that are made up at a time."""


def made_up(users: int, events: int, seed: int) -> Iterator[History]:
    """Users in the order of their ids, an hour between two events of one."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(RECIPE)
        found, _ = read_histories(recipe.readers, generate_shop(folder, users=300, seed=seed))
    drawn = [event for history in found.values() for event in history.timed]
    rng = np.random.default_rng(seed)
    for number in range(users):
        own = [drawn[i] for i in rng.integers(len(drawn), size=events)]
        yield History(f"user{number:08d}", tuple(replace(e, timestamp=1.7e9 + 3600 * n) for n, e in enumerate(own)))


def save(args: argparse.Namespace, users: int, folder: Path) -> str:
    """Writes the users; returns the file, or the store's URL."""
    if args.input == "store":
        url = f"sqlite:///{folder / f'{users}.db'}"
        with EventStore(url) as store:
            for history in made_up(users, args.events, args.seed):
                store.append(history.user, history.events)
        return url
    path = folder / f"{users}.parquet"
    plain = [(name, pa.string()) for name in ("user", "source", "text", "item_id", "attributes")]
    schema = pa.schema([*plain, ("timestamp", pa.float64()), ("value", pa.float64())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        rows: list[dict] = []
        for number, history in enumerate(made_up(users, args.events, args.seed), 1):
            rows += [_row(history.user, event) for event in history.events]
            if number % MAKES == 0 or number == users:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
    return str(path)


def _row(user: str, event: Event) -> dict:
    row = asdict(event)
    row.pop("event_id")
    return {**row, "user": user, "attributes": json.dumps(row["attributes"], ensure_ascii=False)}


class Memory:
    """Memory of this process, Ray's driver, and of the actors, looked at from a thread, as a series."""

    def __init__(self):
        self.series: list[dict] = []
        self._began, self._stop = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> list[dict]:
        """Seconds, and MiB resident and private (not shared with others) of the driver and of each actor."""
        self._stop.set()
        self._thread.join()
        step = -(-len(self.series) // POINTS) or 1
        return self.series[::step]

    def _look(self) -> None:
        while not self._stop.wait(EVERY):
            found = {"s": round(time.monotonic() - self._began, 1), "driver": _mib(psutil.Process()), "actors": []}
            for process in actors():
                with suppress(psutil.Error):
                    found["actors"].append(_mib(process))
            self.series.append(found)


def _mib(process: psutil.Process) -> dict:
    memory = process.memory_full_info()
    return {"rss": memory.rss // MIB, "private": memory.uss // MIB}


def actors() -> list[psutil.Process]:
    """Processes of our Ray that encode."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def work(job: dict) -> dict:
    """One run, in this process: its progress, its memory, and which actor was killed."""
    progress, killed, memory, began = [], [], Memory(), time.monotonic()

    def say(text: str) -> None:
        if done := re.match(r"\d+ of \d+ parts: (\d+) users", text):
            progress.append((round(time.monotonic() - began, 2), int(done[1])))
            if job["kill"] and not killed and progress[-1][1] > job["users"] / 3:
                victim = actors()[0]
                os.kill(victim.pid, signal.SIGKILL)
                killed.append({"s": progress[-1][0], "users_done": progress[-1][1]})

    source = {"store": job["source"]} if "://" in job["source"] else {"events": job["source"]}
    settings = {"out": job["out"], "actors": job["actors"], "batch_size": job["batch_size"], "say": say}
    made = refresh(job["encoder"], **source, **settings)
    half = next(point for point in progress if point[1] >= job["users"] / 2)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "users_per_s": round((progress[-1][1] - half[1]) / (progress[-1][0] - half[0]), 1),
        "refreshed": made.refreshed,
        "skipped": made.skipped,
        "progress": progress,
        "killed": killed,
        "memory_mib": memory.stop(),
    }


def run(args: argparse.Namespace, source: str, users: int, out: Path, actors: int, *, kill: bool = False) -> dict:
    """One run in a process of its own."""
    job = {"source": source, "users": users, "out": str(out), "actors": actors, "kill": kill}
    job |= {"encoder": args.encoder, "batch_size": args.batch_size}
    command = [sys.executable, __file__, "--out", str(args.out), "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"a run ended with an error:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    brief = {name: found[name] for name in ("seconds", "users_per_s", "refreshed", "skipped", "killed")}
    print(users, "users,", actors, "actors:", brief, flush=True)
    return found


def speed(args: argparse.Namespace, source: str, folder: Path) -> dict:
    """Users a second for each number of actors, and as a ratio to one actor in the same round."""
    rates: dict[int, list[float]] = {count: [] for count in args.actors}
    for number in range(args.rounds):
        for count in args.actors if number % 2 == 0 else reversed(args.actors):
            out = folder / f"speed-{number}-{count}"
            rates[count].append(run(args, source, args.speed_users, out, count)["users_per_s"])
    ratios = {n: [one / base for one, base in zip(rates[n], rates[args.actors[0]])] for n in args.actors}
    return {
        str(count): {
            "users_per_s": round(median(rates[count]), 1),
            "rounds": rates[count],
            "ratio": round(median(ratios[count]), 3),
            "efficiency": round(median(ratios[count]) * args.actors[0] / count, 3),
        }
        for count in args.actors
    }


def flatness(series: list[dict]) -> dict:
    """Median private MiB in the middle third and the last third of the time with actors: the driver's, an actor's."""
    series = [point for point in series if point["actors"]]
    third = len(series) // 3
    result = {}
    for name, points in (("middle_third", series[third : 2 * third]), ("last_third", series[2 * third :])):
        each = [actor["private"] for point in points for actor in point["actors"]]
        driver = [point["driver"]["private"] for point in points]
        result[name] = {"driver": median(driver), "actor": median(each)}
    return result


def same(one: Path, other: Path) -> dict:
    """Whether two folders hold the same users, and the largest difference between their embeddings."""
    largest, users = 0.0, 0
    for path in sorted(one.glob("*.parquet")):
        a, b = pq.read_table(path), pq.read_table(other / path.name)
        if not a.drop_columns("embedding").equals(b.drop_columns("embedding")):
            raise SystemExit(f"{path.name} differs in more than its embeddings")
        vectors = [t["embedding"].combine_chunks().flatten().to_numpy() for t in (a, b)]
        largest, users = max(largest, float(np.abs(vectors[0] - vectors[1]).max())), users + len(a)
    return {"users": users, "largest_difference": largest}


def main(args: argparse.Namespace) -> None:
    """All runs, and the file."""
    quiet()
    if args.job:
        print(json.dumps(work(json.loads(args.job))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, most = Path(name), max(args.actors)
        few = save(args, args.speed_users, folder)
        rates = speed(args, few, folder)
        killed = run(args, few, args.speed_users, folder / "killed", min(2, most), kill=True)
        killed |= same(folder / f"speed-0-{min(2, most)}", folder / "killed")
        whole = run(args, save(args, args.users, folder), args.users, folder / "whole", min(2, most))
    result = {
        "name": args.out.stem,
        "kind": "fleet-refresh",
        "results": {
            "actors": rates,
            "memory": {"flat": flatness(whole["memory_mib"]), **whole},
            "killed": {key: value for key, value in killed.items() if key != "memory_mib"},
        },
        "config": {
            "encoder": args.encoder,
            "input": args.input,
            "users": args.users,
            "speed_users": args.speed_users,
            "events_per_user": args.events,
            "batch_size": args.batch_size,
            "rounds": args.rounds,
        },
        "command": " ".join(["python", "benchmarks/fleet/refresh.py", *sys.argv[1:]]),
        "seed": args.seed,
        "git_hash": GIT_HASH,
        "versions": {name: version(name) for name in ("torch", "ray", "pyarrow", "persona")},
        "machine": {"cores": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--users", type=int, default=100_000, help="of the run for memory")
    parser.add_argument("--speed-users", type=int, default=5_000, help="of each other run")
    parser.add_argument("--events", type=int, default=50, help="of each user")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4], help="efficiency is to the first of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--input", choices=("files", "store"), default="files")
    parser.add_argument("--encoder", default="adapters/demo/weights")
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
