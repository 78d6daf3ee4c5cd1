"""Mixed traffic for half an hour through two gateways, with a restart of the database and one of Redis in it.

    python benchmarks/fleet/soak.py --minutes 30 --out benchmarks/results/fleet-soak.json

Three kinds of people, all asked for through nginx. **Still** ones, whose events never change: what comes to the LLM of
each is known beforehand, and another's is noticed. **Busy** ones, for whom events are written all the time: each
acknowledged event is looked for at once and at the end. **Leaving** ones, who are written, asked, forgotten, and must
then be unknown. What was not acknowledged while the database was away is written again with the same event ids.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
from fleet import Expected, Fleet, append, chat, fleet, interrupt, processors
from load import nearest, write_users
from points import events_of

from persona.evaluation.runner import git_hash
from persona.history import History
from persona.history.event import event_to_dict
from persona.store import EventStore

CALLERS = 6
AWAY = 5.0
"""Seconds that the database, and later Redis, is away."""


class Traffic:
    """What callers do and what came of it."""

    def __init__(self, made: Fleet, still: list[History], expected: np.ndarray, rate: float):
        self.made, self.still, self.expected, self.rate = made, still, expected, rate
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        """What must never happen, in words."""
        self.acknowledged: dict[str, list[str]] = {}
        """Event ids by busy user."""
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def caller(self, number: int) -> None:
        """One caller, until `stop`; it has busy and leaving people of its own, so it knows what they must be."""
        rng, turn = np.random.default_rng(number), 0
        with httpx.Client(base_url=self.made.nginx.url, timeout=60) as client:
            while not self.stop.wait(rng.exponential(CALLERS / self.rate)):
                kind = ("still", "busy", "still", "leaving", "still", "nobody")[turn % 6]
                turn += 1
                try:
                    getattr(self, f"_{kind}")(client, rng, number, turn)
                except httpx.HTTPError as error:
                    self._count(f"{kind}: {type(error).__name__}")
                except Exception as error:  # a fault of this program must not look like a quiet caller
                    self._wrong(f"{kind}: {error!r}")

    def _still(self, client: httpx.Client, rng: np.random.Generator, number: int, turn: int) -> None:
        n = int(rng.integers(len(self.still)))
        said, rows = chat(client, self.still[n].user)
        self._count(f"still: {said}")
        if said == "personalized" and nearest(rows, self.expected) != n:
            self._wrong(f"{self.still[n].user} was answered as somebody else")
        elif said in ("no-user", "unknown-user"):
            self._wrong(f"{self.still[n].user} was {said}")

    def _nobody(self, client: httpx.Client, rng: np.random.Generator, number: int, turn: int) -> None:
        said, rows = chat(client, None)
        self._count(f"nobody: {said}")
        if rows is not None:
            self._wrong("nobody was answered as somebody")

    def _busy(self, client: httpx.Client, rng: np.random.Generator, number: int, turn: int) -> None:
        user = f"busy-{number}-{int(rng.integers(20))}"
        known = self.acknowledged.setdefault(user, [])
        events = [{**event_to_dict(e), "event_id": f"{turn}-{i}"} for i, e in enumerate(events_of(turn, 2))]
        if not self._write(client, user, events):
            return
        known += [event["event_id"] for event in events]
        reply = client.post("/persona/v1/history", json={"user": user, "last": 64})
        if reply.status_code != 200:
            self._count(f"busy: history {reply.status_code}")
            return
        seen = {event.get("event_id") for event in reply.json()["events"]}
        if lost := [e for e in known[-20:] if e not in seen]:
            self._wrong(f"{user} lacks acknowledged events {lost}")
        said, _ = chat(client, user)
        self._count(f"busy: {said}")

    def _leaving(self, client: httpx.Client, rng: np.random.Generator, number: int, turn: int) -> None:
        user = f"leaving-{number}-{turn}"
        if not self._write(client, user, [event_to_dict(event) for event in events_of(turn, 3)]):
            return
        self._count(f"leaving: {chat(client, user)[0]}")
        while client.post("/persona/v1/forget", json={"user": user}).status_code != 200:
            self._count("leaving: forget not acknowledged")
            if self.stop.wait(1.0):
                return
        said, rows = chat(client, user)
        self._count(f"leaving, after: {said}")
        if rows is not None:
            self._wrong(f"{user} was forgotten and is known")

    def _write(self, client: httpx.Client, user: str, events: list[dict]) -> bool:
        """Writes events until they are acknowledged; False when time is up before."""
        while not append(client, user, events):
            self._count("append: not acknowledged, written again")
            if self.stop.wait(1.0):
                return False
        self._count("append: acknowledged")
        return True

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _wrong(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)
        print("WRONG:", what, flush=True)


def main(args: argparse.Namespace) -> None:
    """Runs it all and writes the result."""
    with fleet(args.adapter, args.llm) as made:
        still = write_users(made, args.users)
        traffic = Traffic(made, still, Expected(args.adapter, args.llm)(still), args.rate)
        seconds, memory, happened = 60 * args.minutes, [], []
        start = time.monotonic()
        plan = [(seconds / 3, "database", made.postgres), (2 * seconds / 3, "redis", made.redis)]
        with ThreadPoolExecutor(CALLERS) as pool:
            callers = [pool.submit(traffic.caller, n) for n in range(CALLERS)]
            while (now := time.monotonic() - start) < seconds:
                memory.append([round(now), *(round(gateway.mebibytes(), 1) for gateway in made.gateways)])
                if plan and now > plan[0][0]:
                    _, name, server = plan.pop(0)
                    interrupt(server, AWAY)
                    happened.append({"what": f"{name} away for {AWAY:g} s", "at_s": round(now)})
                    print(happened[-1], dict(traffic.counts), flush=True)
                time.sleep(min(15.0, max(1.0, seconds / 60)))
            traffic.stop.set()
            for caller in callers:
                caller.result()
        lost = lost_events(made.store, traffic.acknowledged)
    write(args, traffic, memory, happened, lost)


def lost_events(store: str, acknowledged: dict[str, list[str]]) -> int:
    """Acknowledged events of busy people that the database does not hold, read without any server."""
    with EventStore(store) as events:
        return sum(
            len(set(ids) - {event.event_id for event in events.history(user).events})
            for user, ids in acknowledged.items()
        )


def growth(memory: list[list[float]]) -> list[float]:
    """Mebibytes an hour of each gateway, by a straight line through the second half."""
    half = np.array(memory[len(memory) // 2 :], dtype=float)
    return [round(float(np.polyfit(half[:, 0], half[:, n], 1)[0] * 3600), 1) for n in range(1, half.shape[1])]


def write(args, traffic: Traffic, memory: list[list[float]], happened: list[dict], lost: int) -> None:
    """The result with what is needed to get it again."""
    record = {
        "name": args.out.stem,
        "kind": "fleet-soak",
        "results": {
            "requests": sum(traffic.counts.values()),
            "counts": dict(sorted(traffic.counts.items())),
            "never": traffic.wrong[:50],
            "never_count": len(traffic.wrong),
            "acknowledged_events": sum(map(len, traffic.acknowledged.values())),
            "lost_events": lost,
            "happened": happened,
            "memory_mib": memory,
            "growth_mib_per_hour": growth(memory),
        },
        "config": {"minutes": args.minutes, "users": args.users, "rate": args.rate, "machine": processors()},
        "command": " ".join(["python", "benchmarks/fleet/soak.py", *sys.argv[1:]]),
        "git_hash": git_hash(),
        "versions": {name: version(name) for name in ("torch", "uvicorn", "persona")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in record["results"].items() if k != "memory_mib"}, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="adapters/demo/weights")
    parser.add_argument("--llm", default="adapters/demo/lm")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--users", type=int, default=100, help="people whose events never change")
    parser.add_argument("--rate", type=float, default=6.0, help="turns a second of all callers together, at most")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
