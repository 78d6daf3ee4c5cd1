"""Writes the tables of the LaMP runs between their markers in benchmarks/README.md and README.md.

python benchmarks/lamp/report.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from persona.evaluation.lamp.methods import METHODS
from persona.evaluation.lamp.table import OURS, interval_cell, shown
from persona.evaluation.lamp.tasks import TASKS
from persona.evaluation.report import decimals, replace_section

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SHORT = {
    "user_mean": "the user's mean score (no LLM)",
    "user_item_bias": "user + item bias (no LLM)",
    "no_history": "no profile",
    "bm25_k4": "four retrieved items as text (BM25)",
    "pplug": "PPlug, soft prompt",
    "learned_prompt": "learned prompt, no user in it",
    "shuffled_user": "another user's tokens, soft prompt",
    "ours": "**ours, soft prompt**",
    "learned_prompt_cross": "learned, no user in it, cross-attention",
    "shuffled_user_cross": "another user's tokens, cross-attention",
    "ours_cross": "**ours, cross-attention**",
    "lora": "LoRA for the task",
    "user_lora": "LoRA for each user (OPPU)",
}
"""Rows of the README's table, in words."""
FULL = ("acl-title-s0", "movie-rating-long-s0", "movie-rating-s0")
"""Results whose rows are shown. The others repeat some of them, with another seed or LM."""
README = "movie-rating-long-s0"
"""The result in the README."""
AGAIN = (
    "no_history",
    "pplug",
    "learned_prompt_cross",
    "shuffled_user_cross",
    "ours_cross",
    "ours_cross_k1",
    "ours_cross_no_instruction",
    "ours_cross_no_labels",
    "ours_cross_set",
)
"""Rows that were repeated."""


def main() -> None:
    """All tables for which there are results."""
    details, readme = ROOT / "benchmarks" / "README.md", ROOT / "README.md"
    every = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((RESULTS / "lamp").glob("*.json"))]
    results = [result for result in every if result["name"] in FULL]
    replace_section(details, "lamp", "\n\n".join(map(table, results)))
    for task in dict.fromkeys(result["task"] for result in every):
        again = [result for result in every if result["task"] == task]
        if len(again) > 1:
            replace_section(details, f"lamp-again-{task}", repeated(again))
    replace_section(details, "lamp-ablation", "\n\n".join(map(ablation, results)))
    replace_section(readme, "lamp", "\n\n".join(short(r) for r in results if r["name"] == README))
    file = RESULTS / "lamp-speed.json"
    text = speed(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else "(not measured yet)"
    replace_section(details, "lamp-speed", text)


def table(result: dict) -> str:
    """Floors, then the methods, with ours minus each of them, as a soft prompt and by cross-attention."""
    names = [name for name in result["results"] if name not in METHODS or not METHODS[name].ablation]
    return "\n".join([title(result), "", *rows(result, names), "", made(result)])


def short(result: dict) -> str:
    """The README's table: one metric."""
    metric = shown(TASKS[result["task"]])[0]
    less = " (less is better)" if TASKS[result["task"]].kind == "rating" else ""
    lines = [f"| | {metric}{less} | ours, cross-attention, minus it | prompt tokens |", "|---|---|---|---|"]
    for name, words in SHORT.items():
        if row := result["results"].get(name):
            paired = result["paired_cross"].get(name, {}).get(metric)
            cells = [words, interval_cell(row[metric]), difference(paired) if paired else "", row.get("tokens", "")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", caption(result)])


def repeated(results: list[dict]) -> str:
    """One metric of the rows that several runs have, and ours by cross-attention minus the others, run by run."""
    metric = shown(TASKS[results[0]["task"]])[0]
    names = [name for name in AGAIN if any(name in result["results"] for result in results)]
    lines = ["| " + " | ".join(["", *(result["name"] for result in results)]) + " |", "|---" * (len(results) + 1) + "|"]
    for name in names:
        found = [result["results"].get(name) for result in results]
        lines.append(f"| {name} | " + " | ".join(interval_cell(row[metric]) if row else "" for row in found) + " |")
    for name in names:
        found = [result["paired_cross"].get(name, {}).get(metric) for result in results]
        if any(found):
            cells = [difference(value) if value else "" for value in found]
            lines.append(f"| ours_cross minus {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{result['name']}: {made(result)}\n" for result in results)]).rstrip()


def difference(value: dict) -> str:
    """`+.023 [+.010, +.035]`."""
    return "{} [{}, {}]".format(*(decimals(value[n], signed=True) for n in ("value", "low", "high")))


def ablation(result: dict) -> str:
    """Ours and PPlug, and each row that takes something away."""
    names = ["ours", "pplug", *(name for name, method in METHODS.items() if method.ablation)]
    return "\n".join([title(result), "", *rows(result, names)])


def rows(result: dict, names: Sequence[str]) -> list[str]:
    """Lines of a table of these methods, as far as they were run."""
    metrics = shown(TASKS[result["task"]])
    first = {"rmse": "mse"}  # the metric that is a mean, for differences
    compared = first.get(metrics[0], metrics[0])
    taken = {key: ours for key, ours in OURS.items() if result.get(key)}
    columns = [*metrics, *(f"{ours} minus it, {compared}" for ours in taken.values()), "prompt tokens", "s / example"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        row = result["results"].get(name)
        if row is None:
            continue
        cells = [interval_cell(row[metric]) for metric in metrics]
        for key in taken:
            paired = result[key].get(name, {}).get(compared)
            cells.append(difference(paired) if paired else "")
        cost = [row.get("tokens", ""), row.get("seconds", "")]
        lines.append(f"| {name} | " + " | ".join(map(str, [*cells, *cost])) + " |")
    return lines


def title(result: dict) -> str:
    """What was asked."""
    less = " (less is better)" if TASKS[result["task"]].kind == "rating" else ""
    return f"**{result['name']}**, the form of {result['task']}{less}"


def made(result: dict) -> str:
    """The caption, and the command."""
    return f"{caption(result)} Made by `{result['command']}`."


def caption(result: dict) -> str:
    """What is needed to read the table."""
    n, config = result["n"], result["config"]
    return (
        f"{n['questions']} questions of {n['users']} users, profiles of {n['mean_profile']:.0f} items on average, "
        f"split by {config['split']}; {n['gold_in_profile']} gold answers stand in the user's own profile. "
        f"Bootstrap 95% intervals over users. LLM `{config['llm']}`, prompts of at most {config['max_length']} tokens, "
        f"greedy. Each trained method had {config['steps']} steps. Seed {result['seed']}."
    )


def speed(result: dict) -> str:
    """Texts a second, and milliseconds of a retrieval."""
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in result["results"].items()]
    lines += ["", f"{result['machine']}. Made by `{result['command']}`."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
