"""100 million users on paper, computed from what was measured here.

    python benchmarks/fleet/plan.py --out benchmarks/results/fleet-plan.json

Nothing of it was run. Sizes and rates come from fleet-points.json, fleet-refresh.json and fleet-load.json beside --out;
habits of users and sizes of machines are the arguments, and stand in the result. Rates grow with cores in proportion,
which two cores cannot show; a gateway's is divided by all cores, though callers, nginx, databases and the stand-in for
vLLM had their share of them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import UTC, datetime
from pathlib import Path

DAY = 86_400
TB = 1e12


def plan(points: dict, refresh: dict, load: dict, asked: argparse.Namespace) -> dict:
    """Bytes, machines and hours. Memory and disk are used to `fill`, cores to `busy` at the peak."""
    users, largest = asked.users, max(points["results"]["postgresql"], key=int)
    database, redis = points["results"]["postgresql"][largest], points["results"]["redis"][largest]
    of_event = database["bytes_per_user_of_events"] / points["config"]["events_per_user"]
    events = users * asked.events * of_event
    vectors = users * database["bytes_per_user_of_embedding"]
    # A state is kept while its user is at it: those of the busiest hour.
    hot = users * asked.active * asked.peak / 24
    states = hot * redis["state_bytes"]  # beside which what Redis needs for a key is little
    calls = users * asked.active * asked.calls * asked.peak / DAY
    writes = users * asked.active * asked.writes * asked.peak / DAY
    one = load["results"][f"one gateway, {asked.callers} callers"]["per_second"]
    gateway_cores = calls / (one / load["machine"]["cores"]) / asked.busy
    encoded = max(row["users_per_s"] for row in refresh["results"]["actors"].values()) / refresh["machine"]["cores"]
    core_hours = users / encoded / 3600
    return {
        "events": {
            "bytes_each": round(of_event),
            "tb": _short(events / TB),
            "tb_with_a_replica": _short(2 * events / TB),
        },
        "vectors of one instruction": {
            "bytes_each": database["bytes_per_user_of_embedding"],
            "tb": _short(vectors / TB),
        },
        "states of the busiest hour in Redis": {
            "users_m": _short(hot / 1e6),
            "bytes_each": round(states / hot),
            "tb": _short(states / TB),
            "machines": math.ceil(states / (asked.memory_gb * 1e9 * asked.fill)),
        },
        "database": {
            "machines": math.ceil(2 * (events + vectors) / (asked.disk_tb * TB * asked.fill)),
            "appends_per_s_at_the_peak": round(writes),
            "one_caller_per_s": round(1000 / database["append"]["p50_ms"]),
            "callers_busy": math.ceil(writes * database["append"]["p50_ms"] / 1000),
        },
        "gateways": {
            "calls_per_s_at_the_peak": round(calls),
            "measured_per_s_and_core": _short(one / load["machine"]["cores"]),
            "cores": math.ceil(gateway_cores),
            "machines": math.ceil(gateway_cores / asked.cores),
        },
        "refresh of everybody": {
            "measured_users_per_s_and_core": _short(encoded),
            "core_hours": round(core_hours),
            "machines_for_a_night": math.ceil(core_hours / asked.night_h / asked.cores),
        },
    }


def drivers(made: dict, asked: argparse.Namespace) -> list[str]:
    """What the cost is made of, and what would change it."""
    return [
        f"Memory for states: {made['states of the busiest hour in Redis']['machines']} machines of "
        f"{asked.memory_gb} GB. A state holds keys and values for every event and layer; without the head's, which can "
        "be made again from the states, it is half as large; with events per user it grows in proportion.",
        f"Cores for calls: {made['gateways']['cores']}, beside the LLM's own, which are not counted here.",
        f"Disk for events: {made['events']['tb_with_a_replica']} TB with a replica; keeping only what an encoder reads "
        "(its newest events) bounds it.",
        f"Each new encoder costs {made['refresh of everybody']['core_hours']:,} core hours, or a map.",
        "A database machine holds whole tenants (tables are partitioned by tenant, not by user): one tenant of 100 "
        "million users needs one PostgreSQL that large, or a sharded one, which was not tried.",
    ]


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def main(asked: argparse.Namespace) -> None:
    """Computes and writes it."""
    folder = asked.out.parent
    files = (json.loads((folder / f"fleet-{name}.json").read_text()) for name in ("points", "refresh", "load"))
    made = plan(*files, asked)
    record = {
        "name": asked.out.stem,
        "kind": "fleet-plan",
        "results": made,
        "drivers": drivers(made, asked),
        "config": {name: value for name, value in vars(asked).items() if name != "out"},
        "command": " ".join(["python", "benchmarks/fleet/plan.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    asked.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=float, default=100e6)
    parser.add_argument("--events", type=float, default=50, help="kept of each user")
    parser.add_argument("--active", type=float, default=0.1, help="share of users on a day")
    parser.add_argument("--calls", type=float, default=5, help="of an active user a day")
    parser.add_argument("--writes", type=float, default=10, help="events of an active user a day")
    parser.add_argument("--peak", type=float, default=3, help="busiest hour to the mean hour")
    parser.add_argument(
        "--callers", type=int, default=8, help="row of fleet-load.json that a gateway's rate is taken from"
    )
    parser.add_argument("--cores", type=int, default=16, help="of a machine")
    parser.add_argument("--memory-gb", type=int, default=256)
    parser.add_argument("--disk-tb", type=float, default=4)
    parser.add_argument("--fill", type=float, default=0.7, help="share of memory and disk that is used")
    parser.add_argument("--busy", type=float, default=0.6, help="share of a core that is used at the peak")
    parser.add_argument("--night-h", type=float, default=8, help="hours that a refresh may take")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
