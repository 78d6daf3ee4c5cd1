"""From result files to Markdown, and into a README between markers, so that no table is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from persona.errors import DataError

NAMES = {
    "chance": "chance",
    "majority": "majority answer, most popular item (no LM)",
    "user_item_bias": "user + item bias (no LM)",
    "item_cosine": "item cosine (no LM)",
    "ease": "EASE (no LM)",
    "no_history": "no history",
    "learned_prompt": "learned prompt, no user in it",
    "shuffled_user": "another user's tokens",
    "text_same_budget": "newest events as text, same budget",
    "text_full": "full history (the window) as text",
}
NUMBERED = {
    r"(?:ours|soft)_k(\d+)": "**ours, K = {}**",
    r"text_(\d+)": "newest events as text, {} tokens",
    r"retrieved_(\d+)": "retrieved events as text (BM25), {} tokens",
}
"""Methods with a number in their name."""
_MARKER = "<!-- persona:{name} -->"


def load_result(path: str | Path) -> dict:
    """A result file; raises `DataError` when it is missing or not one."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; make it with `persona bench table`") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not {"results", "n", "command", "seed"} <= result.keys():
        raise DataError(f"{path} is not a result of `persona bench table`")
    return result


def markdown_table(result: dict) -> str:
    """The table of one result, and how it was made below it."""
    tasks = list(result["n"]["answers"])
    lines = [
        "| method | user tokens | prompt tokens | " + " | ".join([*tasks, "mean"]) + " |",
        "|---|---|---|" + "---|" * (len(tasks) + 1),
    ]
    for name, row in result["results"].items():
        tokens = row.get("tokens", {})
        size = f"{tokens['user']:.0f} | {tokens['prompt']:.0f}" if tokens else " | "
        lines.append(f"| {label(name)} | {size} | " + " | ".join(cell(row.get(t)) for t in [*tasks, "mean"]) + " |")
    n = result["n"]
    answers = ", ".join(f"{count} {task}" for task, count in n["answers"].items())
    lines += [
        "",
        f"Accuracy, mean over {n['users']} {result['config']['part']} users who took no part in training, with "
        f"bootstrap 95% intervals over users. {n['cuts']} cuts; answers: {answers}. Seed {result['seed']}. "
        "User tokens include the line break that joins them to the question. "
        f"Made by `{result['command']}`.",
    ]
    return "\n".join(lines)


def terminal_table(result: dict) -> str:
    """The table for a terminal: accuracies, and the interval of the mean alone."""
    tasks = list(result["n"]["answers"])
    names = {name: label(name).strip("*") for name in result["results"]}
    width = max(map(len, names.values())) + 2
    lines = [f"{'':{width}}{'tokens':>7}" + "".join(f"{t:>{len(t) + 2}}" for t in tasks) + f"{'mean':>23}"]
    for name, row in result["results"].items():
        tokens = f"{row['tokens']['prompt']:.0f}" if "tokens" in row else ""
        cells = "".join(f"{cell(row.get(t))[:5]:>{len(t) + 2}}" for t in tasks)
        lines.append(f"{names[name]:{width}}{tokens:>7}{cells}{cell(row.get('mean')):>23}")
    n = result["n"]
    lines.append(f"accuracy, mean over {n['users']} users with bootstrap 95% interval; {n['cuts']} cuts")
    return "\n".join(lines)


def paired_table(result: dict) -> str:
    """Ours minus each comparison, user by user."""
    tasks = list(result["n"]["answers"])
    lines = ["| difference | " + " | ".join([*tasks, "mean"]) + " |", "|---|" + "---|" * (len(tasks) + 1)]
    for name, row in result["paired"].items():
        ours, other = name.split(" - ")
        cells = " | ".join(cell(row.get(t), signed=True) for t in [*tasks, "mean"])
        lines.append(f"| {label(ours)} minus {label(other)} | {cells} |")
    return "\n".join(lines)


def cost_line(result: dict) -> str:
    """What encoding and training cost, in one sentence each; empty when the result does not say."""
    sentences = []
    if cost := result.get("cost"):
        sentences.append(
            f"Encoding on {cost['device']} with {cost['threads']} threads: {cost['users_per_second']:,.0f} users or "
            f"{cost['events_per_second']:,.0f} events a second with known texts "
            f"({cost['events_per_second_cold']:,.0f} events a second when every text is new); adding one event to a "
            f"cached user takes {cost['add_event_ms_known_text']:.1f} ms "
            f"({cost['add_event_ms_new_text']:.1f} ms with a new text)."
        )
    if training := result.get("training"):
        sentences.append(
            f"Training the adapter ({training['trained_parameters']:,} parameters): {training['steps']} steps in "
            f"{training['seconds'] / 60:.0f} minutes, at most {training['peak_rss_mib']:,} MiB of memory."
        )
    return " ".join(sentences)


def label(name: str) -> str:
    """A method's name for people."""
    for pattern, text in NUMBERED.items():
        if match := re.fullmatch(pattern, name):
            return text.format(match[1])
    return NAMES.get(name, name)


def cell(value: dict | None, signed: bool = False) -> str:
    """An accuracy, or a difference, with its interval; empty for None."""
    if value is None:
        return ""
    acc, low, high = (decimals(value[name], signed) for name in ("acc", "low", "high"))
    return f"{acc} [{low}, {high}]"


def decimals(value: float, signed: bool = False) -> str:
    """Three decimals; a difference has a sign, unless it is zero as it is printed."""
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return "0.000" if float(text) == 0 else text


def update_readme(readme: str | Path, results: Sequence[str | Path]) -> list[str]:
    """Replaces the text between `<!-- persona:NAME -->` markers by the tables of each NAME.json; returns the names.

    Raises `DataError` when a result has no pair of markers.
    """
    done = []
    for file in results:
        result = load_result(file)
        body = "\n\n".join(filter(None, (markdown_table(result), paired_table(result), cost_line(result))))
        replace_section(readme, Path(file).stem, body)
        done.append(Path(file).stem)
    return done


def replace_section(file: str | Path, name: str, body: str) -> None:
    """Puts `body` between the two lines `<!-- persona:NAME -->` of a Markdown file.

    Raises `DataError` when there is no such pair.
    """
    path, marker = Path(file), _MARKER.format(name=name)
    parts = path.read_text(encoding="utf-8").split(marker)
    if len(parts) != 3:
        raise DataError(f"{path} needs two lines {marker} around the place of the table, not {len(parts) - 1}")
    path.write_text(marker.join([parts[0], f"\n{body}\n", parts[2]]), encoding="utf-8")
