"""Two gateways behind nginx against one: throughput, waiting, and how soon an event is seen by the other server.

    python benchmarks/fleet/load.py --out benchmarks/results/fleet-load.json

Rounds alternate between the two, callers ask as fast as they are answered, and every answer is compared with what this
process makes of the user itself. No session is sticky: nginx deals requests out in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
from fleet import Expected, Fleet, append, chat, fleet, processors
from points import events_of

from persona.evaluation.intervals import interval
from persona.evaluation.runner import git_hash
from persona.history import History
from persona.history.event import event_to_dict

TOLERANCE = 0.02
"""Of the largest number: what rounding and the order of additions may change."""


def nearest(rows: np.ndarray, expected: np.ndarray) -> int:
    """Whose tokens these are; -1 for nobody's."""
    distances = np.abs(expected - rows).max(axis=1)
    best = int(distances.argmin())
    return best if distances[best] < TOLERANCE * np.abs(expected).max() else -1


def write_users(made: Fleet, users: int) -> list[History]:
    """Writes everybody's events through nginx."""
    histories = [History(f"user-{n}", tuple(events_of(n, 10))) for n in range(users)]
    for history in histories:
        assert append(made.client, history.user, [event_to_dict(event) for event in history.events])
    return histories


def ask(url: str, histories: list[History], expected: np.ndarray, callers: int, seconds: float) -> dict:
    """What `callers` who never wait got within `seconds`."""
    began = time.monotonic()
    end = began + seconds

    def caller(number: int) -> list[tuple[float, str, bool]]:
        rng, got = np.random.default_rng(number), []
        with httpx.Client(base_url=url, timeout=60) as client:
            while time.monotonic() < end:
                n = int(rng.integers(len(histories)))
                start = time.perf_counter()
                said, rows = chat(client, histories[n].user)
                took = 1000 * (time.perf_counter() - start)
                wrong = rows is not None and nearest(rows, expected) != n
                got.append((took, said, wrong))
        return got

    with ThreadPoolExecutor(callers) as pool:
        answers = [answer for got in pool.map(caller, range(callers)) for answer in got]
    passed = time.monotonic() - began
    times, said, wrong = zip(*answers)
    p50, p99 = np.percentile(times, (50, 99))
    return {
        "per_second": len(answers) / passed,
        "p50_ms": p50,
        "p99_ms": p99,
        "personalized": said.count("personalized"),
        "plain": len(said) - said.count("personalized"),
        "wrong_user": sum(wrong),
    }


def seen_after(made: Fleet, expect: Expected, turns: int) -> dict:
    """Milliseconds from an event's acknowledgement by one server to an answer by the other that has it in it.

    The other one has the user's older state in memory, and what comes to the LLM is compared with both.
    """
    times = []
    clients = [httpx.Client(base_url=gateway.url, timeout=60) for gateway in made.gateways]
    for turn in range(turns):
        writer, reader = clients[turn % 2], clients[1 - turn % 2]
        history = History(f"new-{turn}", tuple(events_of(turn, 6)))
        old_and_new = expect([history.of(history.events[:5]), history])
        *known, newest = (event_to_dict(event) for event in history.events)
        assert append(reader, history.user, known) and nearest(chat(reader, history.user)[1], old_and_new) == 0
        assert append(writer, history.user, [newest])
        start = time.perf_counter()
        while nearest(chat(reader, history.user)[1], old_and_new) != 1:
            assert time.perf_counter() < start + 30
        times.append(1000 * (time.perf_counter() - start))
    return {"p50_ms": round(float(np.median(times)), 1), "max_ms": round(max(times), 1), "turns": turns}


def main(args: argparse.Namespace) -> None:
    """Runs all rounds and writes the result."""
    expect, rounds = Expected(args.adapter, args.llm), {}
    with fleet(args.adapter, args.llm) as made:
        histories = write_users(made, args.users)
        expected = expect(histories)
        urls = {"one gateway": made.gateways[0].url, "two behind nginx": made.nginx.url}
        for url in urls.values():  # everybody is encoded before anything is measured
            with httpx.Client(base_url=url, timeout=60) as client:
                for history in [*histories, *histories]:
                    chat(client, history.user)
        for number in range(args.rounds):
            for callers in args.callers:
                for name, url in list(urls.items())[:: 1 if number % 2 else -1]:
                    got = ask(url, histories, expected, callers, args.seconds)
                    rounds.setdefault(f"{name}, {callers} callers", []).append(got)
                    print(name, callers, got, flush=True)
        seen = seen_after(made, expect, args.turns)
    write(args, {name: summary(got) for name, got in rounds.items()} | ratios(rounds, args.callers), seen)


def summary(got: list[dict]) -> dict:
    """Means over rounds; counts are added."""
    means = {name: round(float(np.mean([g[name] for g in got])), 2) for name in ("per_second", "p50_ms", "p99_ms")}
    return means | {name: sum(g[name] for g in got) for name in ("personalized", "plain", "wrong_user")}


def ratios(rounds: dict[str, list[dict]], callers: list[int]) -> dict:
    """Throughput of two to one, round by round, with its interval."""
    found = {}
    for count in callers:
        one, two = (rounds[f"{name}, {count} callers"] for name in ("one gateway", "two behind nginx"))
        each = np.array([b["per_second"] / a["per_second"] for a, b in zip(one, two)])
        low, high = interval(each, lambda v: v.mean(), seed=0)
        found[f"two to one, {count} callers"] = {
            "value": round(float(each.mean()), 3),
            "low": round(float(low), 3),
            "high": round(float(high), 3),
        }
    return found


def write(args: argparse.Namespace, results: dict, seen: dict) -> None:
    """The result with what is needed to get it again."""
    record = {
        "name": args.out.stem,
        "kind": "fleet-load",
        "results": results,
        "an event is seen by the other server after": seen,
        "config": {"users": args.users, "rounds": args.rounds, "seconds": args.seconds},
        "machine": {"cores": os.cpu_count(), "name": processors()},
        "command": " ".join(["python", "benchmarks/fleet/load.py", *sys.argv[1:]]),
        "git_hash": git_hash(),
        "versions": {name: version(name) for name in ("torch", "uvicorn", "persona")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="adapters/demo/weights")
    parser.add_argument("--llm", default="adapters/demo/lm")
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=50, help="events whose way to the other server is timed")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
