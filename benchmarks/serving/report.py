"""Writes the tables of the serving runs between their markers in benchmarks/README.md and README.md.

python benchmarks/serving/report.py
"""

from __future__ import annotations

import json
from pathlib import Path

from persona.evaluation.report import replace_section

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = {
    "plain": "plain",
    "personalised": "**personalised**, instruction known",
    "personalised_new_instruction": "**personalised**, new instruction at every call",
    "text_400": "history as 400 tokens of text",
}
COST = "cross-attention-cost"
READ_BY = {
    "plain": "no user, stock vLLM",
    "soft_prompt": "**soft prompt**",
    "cross_attention": "**cross-attention**",
    "cross_attention_nobody": "no user, with cross-attention",
}


def main() -> None:
    """All tables for which there are results."""
    loads = [load("serving"), load("serving-larger")]
    details = ROOT / "benchmarks" / "README.md"
    replace_section(details, "serving", "\n\n".join(load_table(result) for result in loads))
    replace_section(details, "isolation", isolation_table(load("isolation")))
    replace_section(details, "faults", faults_table(load("faults")))
    if (RESULTS / f"{COST}.json").exists():
        replace_section(details, COST, cross_attention_table(load(COST)))
    replace_section(ROOT / "README.md", "serving", summary(loads, load("isolation")))


def load(name: str) -> dict:
    """A result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def load_table(result: dict) -> str:
    """Throughput and latency of all kinds of calls."""
    size = result["llm"]["parameters"] / 1e6
    lines = [
        f"LLM of {size:.1f} M parameters (`{result['llm']['name']}`), {result['n']['users']} users:",
        "",
        "| answers | callers | call | prompt tokens | calls/s | median latency, ms | throughput to plain | to text | "
        "added latency, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for workload, tables in result["workloads"].items():
        for callers, table in tables.items():
            for kind, name in KINDS.items():
                row = table[kind]
                cells = [workload, callers, name, row["prompt_tokens"]]
                cells += [row["requests_per_second"], row["median_latency_ms"]]
                cells += [between(table.get(f"{key}_{kind}")) for key in ("throughput_to_plain", "throughput_to_text")]
                cells.append(between(table.get(f"added_latency_ms_{kind}"), 1))
                lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    if "without_plug_in" in result:
        lines += ["", *ready_made_table(result["without_plug_in"])]
    cold, plug_in, memory = result["cold_user"], result["plug_in"], result["memory"]
    lines += [
        "",
        f"Medians over rounds in random order, with bootstrap 95% intervals. A cold user with {cold['events']} "
        f"events: {cold['known_texts_ms']:.0f} ms with known texts, {cold['new_texts_ms']:.0f} ms when every text is "
        f"new, {cold['cached_after_ms']:.0f} ms at the next call; storing the events took "
        f"{cold['storing_500_events_ms']:.0f} ms. Over {plug_in['calls']:,} calls the longest stretch of our work on "
        f"the event loop was {plug_in['longest_stretch_on_event_loop_ms']:.0f} ms. Memory: {memory['added_mib']} MiB "
        f"more than plain vLLM's server, after the load. Seed {result['seed']}, {result['machine']['cores']} cores "
        f"({result['machine']['cpu']}). Made by `{result['command']}`.",
    ]
    return "\n".join(lines)


def ready_made_table(workloads: dict) -> list[str]:
    """What vLLM itself takes for calls that bring ready-made rows, without a plug-in or an encoder."""
    lines = [
        "The same vLLM without the plug-in, asked with ready-made rows: what is left is vLLM's own share.",
        "",
        "| answers | callers | calls/s, plain | with rows | throughput to plain | added latency, ms |",
        "|---|---|---|---|---|---|",
    ]
    for workload, tables in workloads.items():
        for callers, table in tables.items():
            rates = [table[kind]["requests_per_second"] for kind in ("plain", "ready_made_rows")]
            ratio = between(table["throughput_to_plain_ready_made_rows"])
            cells = [workload, callers, *rates, ratio, between(table["added_latency_ms_ready_made_rows"], 1)]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def cross_attention_table(result: dict) -> str:
    """Throughput, time to first token and memory of user tokens in the prompt and beside it."""
    lines = [
        "| callers | call | calls/s | throughput to plain | first token, ms | added to the first token, ms |",
        "|---|---|---|---|---|---|",
    ]
    for callers, table in result["callers"].items():
        for kind, name in READ_BY.items():
            row, own = table[kind], kind != "plain"
            cells = [callers, name, row["requests_per_second"], between(row["throughput_to_plain"]) if own else ""]
            cells += [row["first_token_ms"], between(row["added_first_token_ms"], 1) if own else ""]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    memory, size = result["memory"], {k: f"{v:,}" for k, v in result["memory"]["parameters"].items()}
    layout = memory["layout"]
    lines += [
        "",
        f"Streams of 16 tokens, {result['n']['users']} users; medians over rounds in random order, with bootstrap 95% "
        f"intervals. The LLM has {size['llm']} parameters, its {memory['layers']} cross-attention layers "
        f"{size['cross_attention']}, encoder {size['encoder']}, projector {size['projector']}. A user's "
        f"{layout['tokens']} tokens are {memory['user_tokens_bytes']:,} bytes; in the KV cache "
        f"{memory['kv_cache_bytes_soft_prompt']:,} bytes as a soft prompt and "
        f"{memory['kv_cache_bytes_cross_attention']:,} as {layout['slots']} slots. Seed {result['seed']}, "
        f"{result['machine']['cores']} cores. Made by `{result['command']}`.",
    ]
    return "\n".join(lines)


def isolation_table(result: dict) -> str:
    """What became of the calls at once, and of the kill."""
    lines = [
        "| run | calls | equal to the answer alone | wrong | another user's | plain |",
        "|---|---|---|---|---|---|",
    ]
    for name, what in (("crowd", "all at once, prefix caching on"), ("after_restart", "after SIGKILL and restart")):
        row = result[name]
        cells = [what, row["calls"], row["equal"], row["wrong"], row["crossed"], row["plain"]]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    n, prints, kill = result["n"], result["fingerprints"], result["kill"]
    lines += [
        "",
        f"{n['users']} user ids in each of {n['tenants']} tenants, which stand for {prints['people']} people. Equal "
        f"is: the same words, and the five best log-probabilities of the first token within {prints['tolerance']}; "
        f"the largest difference was {result['crowd']['largest_difference']:.1g}, while the two nearest people with "
        f"the same words differ by {prints['nearest_two_people']:.1g}. Killed in the middle, the server had "
        f"acknowledged {kill['acknowledged_events']} events; {kill['lost_events']} of them were lost. "
        f"Seed {result['seed']}. Made by `{result['command']}`.",
    ]
    return "\n".join(lines)


def faults_table(result: dict) -> str:
    """What was broken, and what came back."""
    lines = [
        "| fault | call | status | what came back | after, ms | personalised again after, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [row["fault"], row["asked"], row.get("status", ""), row["came_back"], row["ms"]]
        cells.append(row.get("personalised_again_after_ms", ""))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["", f"The budget for encoding was {result['budget_ms']} ms. Made by `{result['command']}`."]
    return "\n".join(lines)


def summary(loads: list[dict], isolation: dict) -> str:
    """The README's short table."""
    lines = [
        "| LLM | answers | callers | throughput to plain calls | to the history as 400 text tokens | added latency |",
        "|---|---|---|---|---|---|",
    ]
    for result in loads:
        for workload, tables in result["workloads"].items():
            for callers, table in tables.items():
                cells = [f"{result['llm']['parameters'] / 1e6:.1f} M", workload, callers]
                cells += [between(table[f"throughput_to_{other}_personalised"]) for other in ("plain", "text")]
                cells.append(f"{between(table['added_latency_ms_personalised'], 1)} ms")
                lines.append("| " + " | ".join(cells) + " |")
    crowd = isolation["crowd"]
    lines += [
        "",
        f"Of {crowd['calls']:,} calls at once by {isolation['fingerprints']['people']} people of two tenants, "
        f"{crowd['equal']:,} were answered as each of them is alone and {crowd['crossed']} as somebody else. "
        f"vLLM's own share: without the plug-in and with ready-made rows, {own_share(loads[0])}. "
        f"{loads[0]['machine']['cores']} CPU cores for all of it. Made by `{loads[0]['command']}` and the runs in "
        "[benchmarks](benchmarks/README.md).",
    ]
    return "\n".join(lines)


def own_share(result: dict) -> str:
    """What vLLM itself keeps of its throughput when calls bring rows, over all numbers of callers."""
    parts = []
    for workload, tables in result["without_plug_in"].items():
        ratios = [table["throughput_to_plain_ready_made_rows"]["median"] for table in tables.values()]
        parts.append(f"{workload} answers come at {min(ratios):.2f} to {max(ratios):.2f} of the plain throughput")
    return ", ".join(parts)


def between(value: dict | None, digits: int = 2) -> str:
    """A median and its interval."""
    if value is None:
        return ""
    return f"{value['median']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


if __name__ == "__main__":
    main()
