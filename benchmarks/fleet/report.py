"""Writes the tables of benchmarks/fleet between their markers in benchmarks/README.md and README.md.

python benchmarks/fleet/report.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from persona.evaluation.report import replace_section

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DETAILS, README = ROOT / "benchmarks" / "README.md", ROOT / "README.md"
KINDS = {
    "append": "append one event",
    "revision": "look up a user's revision",
    "history": "read a user's history",
    "embedding": "read an embedding",
    "embedding, 100 users at once": "read 100 embeddings at once",
    "state": "read a state",
}


def main() -> None:
    """All tables for which there are results."""
    sections = {"points": points, "load": load, "refresh": refresh, "soak": soak, "plan": plan}
    for name, write in sections.items():
        if found := result(name):
            replace_section(DETAILS, f"fleet-{name}", write(found))
    replace_section(README, "fleet", brief(*(result(name) for name in ("points", "load", "refresh", "soak"))))


def result(name: str) -> dict | None:
    """A result file; None where it was not made."""
    file = RESULTS / f"fleet-{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def points(found: dict) -> str:
    """Milliseconds by kind of call, store and number of users, and how much slower ten times as many users are."""
    rows = []
    for kind, title in KINDS.items():
        for store, sizes in found["results"].items():
            few, many = (sizes[size].get(kind) for size in sorted(sizes, key=int)[:2])
            if few:
                growth = f"{many['p50_ms'] / few['p50_ms']:.2f}, {many['p99_ms'] / few['p99_ms']:.2f}"
                rows.append([title, store, few["p50_ms"], few["p99_ms"], many["p50_ms"], many["p99_ms"], growth])
    sizes = sorted(next(iter(found["results"].values())), key=int)
    heads = [f"{what}, {int(size):,} users" for size in sizes for what in ("p50 ms", "p99 ms")]
    body = table(["one caller", "store", *heads, "growth of p50, p99"], rows)
    largest, config = sizes[-1], found["config"]
    size = table(
        ["bytes of a user", "events", "embedding"],
        [
            [store, own[largest].get("bytes_per_user_of_events", ""), own[largest]["bytes_per_user_of_embedding"]]
            for store, own in found["results"].items()
        ],
    )
    state = next(iter(found["results"].values()))[largest]["state_bytes"]
    said = (
        f"{config['events_per_user']} events a user, {config['embedding_bytes']:,} bytes an embedding (8 tokens, 64 "
        f"wide), "
        f"{state:,} bytes a state (50 events, the demo's encoder; kept for 2,000 users). Commits wait for the disk. "
        f"Made by `{found['command']}`."
    )
    return "\n\n".join([body, size, said])


def load(found: dict) -> str:
    """Throughput and waiting of one gateway and of two behind nginx."""
    names = ("per_second", "p50_ms", "p99_ms", "personalized", "plain", "wrong_user")
    measured = {name: row for name, row in found["results"].items() if "per_second" in row}
    ratios = {name: row for name, row in found["results"].items() if "value" in row}
    seen, config = found["an event is seen by the other server after"], found["config"]
    said = [
        f"{name}: {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}] of the throughput"
        for name, row in ratios.items()
    ]
    tail = (
        f"{'; '.join(said)} (interval over {config['rounds']} rounds). {found['machine']['name']} for callers, "
        f"gateways, nginx, "
        f"PostgreSQL, Redis and a stand-in for vLLM. An event written through one server was in an answer of the other "
        f"{seen['p50_ms']} ms after its acknowledgement (median of {seen['turns']}; at most {seen['max_ms']} ms). Made "
        f"by "
        f"`{found['command']}`."
    )
    rows = [[name, *(row[n] for n in names)] for name, row in measured.items()]
    return table(["", *(n.replace("_", " ") for n in names)], rows) + "\n\n" + tail


def refresh(found: dict) -> str:
    """Users a second by number of actors, memory, and the killed actor."""
    own, config = found["results"], found["config"]
    rows = [
        [count, row["users_per_s"], ", ".join(map(str, row["rounds"])), row["ratio"], row["efficiency"]]
        for count, row in own["actors"].items()
    ]
    flat, killed = own["memory"]["flat"], own["killed"]
    thirds = " and ".join(f"{row['driver']:g} / {row['actor']:g} MiB" for row in flat.values())
    tail = (
        f"{config['events_per_user']} events a user; {config['speed_users']:,} users a run, "
        f"{found['machine']['cores']} "
        f"cores. Over {config['users']:,} users with 2 actors ({own['memory']['users_per_s']} users a second): private "
        f"memory of driver / actor in the middle and the last third of the run {thirds}. An actor killed with SIGKILL "
        f"after {killed['killed'][0]['users_done']:,} of {config['speed_users']:,} users: {killed['users']:,} users "
        f"there "
        f"at the end, largest difference to the run without a kill {killed['largest_difference']:.1e}. Made by "
        f"`{found['command']}`."
    )
    return table(["actors", "users/s", "rounds", "to one actor", "efficiency"], rows) + "\n\n" + tail


def soak(found: dict) -> str:
    """What came of the calls, what must never happen, memory."""
    own = found["results"]
    rows = [[name, count] for name, count in own["counts"].items()]
    first, last = own["memory_mib"][0], own["memory_mib"][-1]
    happened = "; ".join(f"{e['what']} at {e['at_s']} s" for e in own["happened"])
    tail = (
        f"{found['config']['minutes']:g} minutes; {happened}. Of {own['acknowledged_events']:,} acknowledged events "
        f"{own['lost_events']} were lost; answers as somebody else, of forgotten people, or without an acknowledged "
        f"event: "
        f"{own['never_count']}. Memory of the gateways {' and '.join(f'{m:g}' for m in first[1:])} MiB at first, "
        f"{' and '.join(f'{m:g}' for m in last[1:])} at the end; in the second half it grew by "
        f"{' and '.join(f'{g:g}' for g in own['growth_mib_per_hour'])} MiB an hour. Made by `{found['command']}`."
    )
    return table(["what", "times"], rows) + "\n\n" + tail


def plan(found: dict) -> str:
    """Bytes, machines and hours, and what the cost is made of."""
    rows = [
        [part, ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in own.items())]
        for part, own in found["results"].items()
    ]
    given = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in found["config"].items())
    lines = [table([f"{found['config']['users'] / 1e6:g} million users", ""], rows), ""]
    lines += [f"- {text}" for text in found["drivers"]]
    return "\n".join([*lines, "", f"Computed for {given}, by `{found['command']}`; nothing of it was run."])


def brief(points: dict | None, load: dict | None, refresh: dict | None, soak: dict | None) -> str:
    """A line for each result."""
    lines = []
    if points:
        size = max(points["results"]["sqlite"], key=int)
        rows = [
            [KINDS[kind], *(_ms(points["results"][store][size].get(kind)) for store in points["results"])]
            for kind in ("append", "history", "embedding", "state")
        ]
        lines.append(table([f"p50 / p99 ms at {int(size):,} users", *points["results"]], rows))
    said = []
    if load:
        seen = load["an event is seen by the other server after"]
        wrong = sum(row.get("wrong_user", 0) for row in load["results"].values())
        said.append(
            f"An event written through one of two servers is in the other's answer {seen['p50_ms']} ms later (median), "
            f"and of all answers under load {wrong} were another user's."
        )
    if refresh:
        own = refresh["results"]["memory"]
        said.append(
            f"Refreshing {refresh['config']['users']:,} users with two actors: {own['users_per_s']} users a second on "
            f"{refresh['machine']['cores']} cores."
        )
    if soak:
        own = soak["results"]
        said.append(
            f"{soak['config']['minutes']:g} minutes of mixed traffic with a restart of PostgreSQL and of Redis: "
            f"{own['lost_events']} of {own['acknowledged_events']:,} acknowledged events lost, {own['never_count']} "
            f"answers "
            "that must not be."
        )
    said.append(
        "Details, commands, and a plan on paper for 100 million users: [benchmarks](benchmarks/README.md#a-fleet)."
    )
    return "\n\n".join([*lines, " ".join(said)])


def _ms(row: dict | None) -> str:
    return f"{row['p50_ms']:.2f} / {row['p99_ms']:.2f}" if row else ""


if __name__ == "__main__":
    main()
