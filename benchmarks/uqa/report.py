"""Writes the tables of the UQA runs between their markers in benchmarks/README.md and README.md.

python benchmarks/uqa/report.py
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from injection import caption, injections, overview, with_all_kinds
from report_rows import commands, head

from persona.evaluation.report import cell, label, replace_section
from persona.evaluation.uqa.table import summary
from persona.evaluation.uqa.tasks import DIMENSIONS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TASKS = [task for members in DIMENSIONS.values() for task in members]
SHORT = ("chance", "majority", "ease", "no_history", "learned_prompt", "text_128", "text_full")
"""Baselines in the README's table."""
METRICS = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")


def main() -> None:
    """All tables for which there are results."""
    details, readme = ROOT / "benchmarks" / "README.md", ROOT / "README.md"
    uqa = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((RESULTS / "uqa").glob("*.json"))]
    baselines = next(r for r in uqa if r["kind"] == "uqa-baselines")
    every = [r for r in uqa if r["kind"] == "uqa"]
    runs = sorted((r for r in every if injection(r) == "soft_prompt"), key=lambda r: -ours(r)["mean"]["acc"])
    replace_section(details, "uqa", table(baselines, runs))
    replace_section(details, "uqa-tasks", table(baselines, runs, TASKS))
    replace_section(details, "uqa-paired", paired(runs))
    replace_section(details, "uqa-lengths", lengths(runs))
    replace_section(details, "uqa-changed", changed(runs))
    replace_section(details, "injection", injections(every, baselines))
    replace_section(readme, "injection", injections(every, baselines, short=True))
    replace_section(readme, "uqa", short(baselines, every))
    for name, write in (("uqa-ranking", ranking), ("uqa-speed", speed)):
        file = RESULTS / f"{name}.json"
        text = write(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else "(not measured yet)"
        replace_section(details, name, text)


def injection(run: dict) -> str:
    """How a run's user tokens enter the LLM."""
    return run["config"]["run"].get("injection", "soft_prompt")


def ours(run: dict) -> dict:
    """The row of a run with all its tokens."""
    return run["results"][f"soft_k{run['config']['tokens']}"]


def table(baselines: dict, runs: list[dict], columns: list[str] | None = None) -> str:
    """Baselines, then each run with all tokens and with another user's, best first."""
    columns = columns or [*DIMENSIONS, "next_item", "mean"]
    lines = [head(["", *columns, "prompt tokens"])]
    for name, row in baselines["results"].items():
        lines.append(line(label(name), row, columns))
    for run in runs:
        lines.append(line(f"**{run['name']}, K = {run['config']['tokens']}**", ours(run), columns))
        lines.append(line(f"{run['name']}, another user's tokens", run["results"]["shuffled_user"], columns))
    n, config = baselines["n"], baselines["config"]
    answers = ", ".join(f"{count} {task}" for task, count in n["answers"].items())
    lines += [
        "",
        f"Accuracy, mean over {n['users']} test users, with bootstrap 95% intervals over users; {n['cuts']} cuts; "
        f"answers: {answers}. The LLM has {config['llm_parameters'] / 1e6:.1f} M parameters and is frozen; the window "
        f"is {config['window']} events. A run's name is its backbone, its head and its seed; questions have seed "
        f"{baselines['seed']}.",
        "",
        commands([baselines, *runs]),
    ]
    return "\n".join(lines)


def short(baselines: dict, runs: list[dict]) -> str:
    """Floors, text and ours with its controls, over seeds."""
    columns = [*DIMENSIONS, "next_item", "mean"]
    lines = [head(["", *columns, "prompt tokens"])]
    lines += [line(label(name), baselines["results"][name], columns) for name in SHORT]
    for kinds in with_all_kinds(runs, baselines).values():
        lines += [line(*row, columns) for row in overview(kinds, list(baselines["n"]["answers"]))]
        lines += ["", caption(kinds, baselines), ""]
    return "\n".join(lines).strip()


def paired(runs: list[dict]) -> str:
    """Ours minus each comparison, user by user."""
    columns = [*DIMENSIONS, "next_item", "mean"]
    lines = [head(["difference", *columns])]
    for run in runs:
        for name, row in run["paired"].items():
            other = name.partition(" - ")[2]
            cells = [cell(row.get(column), signed=True) for column in columns]
            lines.append(f"| {run['name']} minus {label(other)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def changed(runs: list[dict]) -> str:
    """Runs with one thing changed beside the run without the change, and the difference user by user."""
    plain = {_kind(run): run for run in runs if not run["config"]["run"]["label"]}
    columns = [*DIMENSIONS, "next_item", "mean"]
    lines = [head(["", "backbone parameters", *columns])]
    for run in runs:
        other = plain.get(_kind(run))
        if not run["config"]["run"]["label"] or other is None:
            continue
        most = f"soft_k{run['config']['tokens']}"
        left, right = (np.array(r["per_user"][most], float) for r in (other, run))
        rows = [(other["name"], other, ours(other)), (run["name"], run, ours(run))]
        for title, of, row in rows:
            cells = " | ".join(cell(row.get(column)) for column in columns)
            lines.append(f"| {title} | {of['config']['backbone_parameters']:,} | {cells} |")
        difference = summary(left - right, list(run["n"]["answers"]))
        cells = " | ".join(cell(difference.get(column), signed=True) for column in columns)
        lines.append(f"| {other['name']} minus {run['name']} | | {cells} |")
    return "\n".join(dict.fromkeys(lines))


def _kind(run: dict) -> tuple:
    own = run["config"]["run"]
    return own["backbone"], own["head"], own["seed"]


def lengths(runs: list[dict]) -> str:
    """Accuracy by newest events that the encoder may read, and by number of tokens."""
    measured = list(runs[0]["lengths"])
    counts = [name for name in runs[0]["results"] if name.startswith("soft_k")]
    columns = [*(f"{n} events" for n in measured), *(f"K = {name[6:]}" for name in counts)]
    lines = [head(["mean of all sub-tasks", *columns])]
    for run in runs:
        cells = [cell(run["lengths"][n].get("mean")) for n in measured]
        cells += [cell(run["results"][name].get("mean")) for name in counts]
        lines.append(f"| {run['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ranking(result: dict) -> str:
    """Recall and NDCG of every model."""
    lines = [head(["model", *METRICS, "backbone parameters", "steps"])]
    for name, row in result["results"].items():
        model = result["models"].get(name.removesuffix(", unseen items"), {})
        values = [f"{row[m]['value']:.4f} [{row[m]['low']:.4f}, {row[m]['high']:.4f}]" for m in METRICS]
        size = [f"{model['backbone_parameters']:,}", model["steps"]] if model else ["", ""]
        lines.append(f"| {name} | " + " | ".join(str(c) for c in [*values, *size]) + " |")
    lines += [
        "",
        f"{result['config']['protocol']}; {result['n']['users']} users, {result['config']['items']} items, with "
        f"bootstrap 95% intervals over users. Seed {result['seed']}. Made by `{result['command']}`.",
    ]
    return "\n".join(lines)


def speed(result: dict) -> str:
    """Steps and users a second, ratios to PyTorch's own transformer, and how time grows with length."""
    lengths = list(result["results"])
    steps = [f"{a} to {b}" for a, b in pairwise(lengths)]
    kinds = {"training steps/s": "train_steps_per_s", "users/s": "inference_users_per_s"}
    lines = []
    for title, key in kinds.items():
        kind = key.split("_")[0]
        columns = [f"{title}, {n} events" for n in lengths] + [f"exponent, {step}" for step in steps]
        lines += [head(["backbone", *columns])]
        for name in result["results"][lengths[0]]:
            rows = [result["results"][n][name] for n in lengths]
            cells = [f"{row[key]:.3g} ({row[f'{kind}_ratio']:.2f})" for row in rows]
            cells += [f"{exponent:.2f}" for exponent in result["growth"][name][kind].values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    config, machine = result["config"], result["machine"]
    lines.append(
        f"In parentheses the {config['ratio']}. Width {config['width']}, {config['layers']} layers, batch "
        f"{config['batch']}, parameters matched; an exponent e says that time grows with length to the e. "
        f"{machine['threads']} threads of {machine['cores']} cores. Seed {result['seed']}. Made by "
        f"`{result['command']}`."
    )
    return "\n".join(lines)


def line(title: str, row: dict, columns: list[str]) -> str:
    """One line of a table of accuracies."""
    tokens = f"{row['tokens']['prompt']:.0f}" if "tokens" in row else ""
    return f"| {title} | " + " | ".join([*(cell(row.get(c)) for c in columns), tokens]) + " |"


if __name__ == "__main__":
    main()
