"""From answers to a result with lm-evaluation-harness keys: metrics, intervals over users, differences to ours."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np

from persona.evaluation.intervals import interval
from persona.evaluation.lamp.bench import LampBench
from persona.evaluation.lamp.floors import floor_answers
from persona.evaluation.lamp.methods import METHODS, check_methods, read_methods
from persona.evaluation.lamp.metrics import in_profile, per_sample, score
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS, Task
from persona.evaluation.runner import git_hash

OURS = {"paired": "ours", "paired_cross": "ours_cross"}
"""Keys of a result that hold differences, and the method that the others are taken from."""


def lamp_table(bench: LampBench, names: Sequence[str]) -> dict:
    """The result of these methods, and of the floors, as JSON can hold it."""
    task, samples = bench.domain.task, bench.samples
    check_methods(names, task)
    rows: dict[str, dict] = {}
    answers = floor_answers(bench.domain, samples)
    for name, given in answers.items():
        rows[name] = metrics(task, samples, given, bench.seed)
    for name in names:
        found = bench.predictions(name)
        answers[name] = found["answers"]
        cost = {"tokens": found["tokens"], "seconds": found["seconds"]}
        rows[name] = {**metrics(task, samples, answers[name], bench.seed), **cost}
        bench.say(f"{name:>22}  " + "  ".join(f"{k} {rows[name][k]['value']:.4f}" for k in shown(task)))
    paired = {
        key: {
            name: differences(task, samples, answers[ours], given, bench.seed)
            for name, given in answers.items()
            if ours in names and name != ours
        }
        for key, ours in OURS.items()
    }
    return {
        "name": bench.name,
        "kind": "lamp",
        "task": task.name,
        "results": rows,
        **paired,
        **about(bench, names),
    }


def shown(task: Task) -> list[str]:
    """The task's metrics."""
    return {"classification": ["accuracy", "macro_f1"], "rating": ["mae", "rmse"]}.get(task.kind, ["rouge1", "rougeL"])


def metrics(task: Task, samples: Sequence[Sample], answers: Mapping[str, str], seed: int = 0) -> dict:
    """Each metric as value, low and high; and, if profiles hold gold answers, without those samples."""
    golds = {sample.id: sample.output for sample in samples}
    values = score(task, answers, golds)
    sums, counts = by_user(task, samples, answers)
    row = {}
    for name, value in values.items():
        row[name] = {"value": round(value, 4)}
        column, finish = ("mse", np.sqrt) if name == "rmse" else (name, lambda mean: mean)
        if column in sums:  # macro-F1 is no mean over answers
            pairs = np.stack([sums[column], counts], axis=1)
            low, high = interval(pairs, lambda p, finish=finish: finish(p[:, 0].sum() / p[:, 1].sum()), seed=seed)
            row[name] |= {"low": round(float(low), 4), "high": round(float(high), 4)}
    clean = [sample for sample in samples if not in_profile(task, sample)]
    if clean and len(clean) < len(samples):
        kept = {sample.id: answers[sample.id] for sample in clean}
        without = score(task, kept, {sample.id: sample.output for sample in clean})
        row["gold_not_in_profile"] = {"n": len(clean), **{name: round(v, 4) for name, v in without.items()}}
    return row


def differences(task: Task, samples: Sequence[Sample], ours: Mapping, other: Mapping, seed: int) -> dict:
    """Ours minus the other, paired by question, of each metric that is a mean; intervals over users."""
    mine, counts = by_user(task, samples, ours)
    theirs, _ = by_user(task, samples, other)
    result = {}
    for name in mine:
        pairs = np.stack([mine[name] - theirs[name], counts], axis=1)
        low, high = interval(pairs, lambda p: p[:, 0].sum() / p[:, 1].sum(), seed=seed)
        mean = pairs[:, 0].sum() / counts.sum()
        result[name] = {"value": round(float(mean), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
    return result


def by_user(task: Task, samples: Sequence[Sample], answers: Mapping) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Sums `[users]` of each metric that is a mean, and the users' numbers of questions `[users]`."""
    users = {user: i for i, user in enumerate(dict.fromkeys(sample.profile.user for sample in samples))}
    owner = np.array([users[sample.profile.user] for sample in samples])
    values = [per_sample(task, answers[sample.id], sample.output) for sample in samples]
    sums = {name: np.bincount(owner, [v[name] for v in values], len(users)) for name in values[0]}
    return sums, np.bincount(owner, minlength=len(users)).astype(float)


def about(bench: LampBench, names: Sequence[str]) -> dict:
    """What is needed to get the result again."""
    recipe, samples = bench.domain.recipe, bench.samples
    ids = "\n".join(f"{sample.id} {sample.output}" for sample in samples)
    return {
        "config": {
            "llm": Path(bench.llm).name,
            "part": getattr(bench.domain, "asked", "test") if bench.part == "test" else bench.part,
            "split": recipe.official or recipe.split.by,
            "max_length": recipe.max_length,
            "beams": 1,
            "steps": bench.steps or recipe.training.steps,
            "changes": list(bench.changes),
            "methods": {name: repr(METHODS[name]) for name in names},
        },
        "n": {
            "questions": len(samples),
            "users": len({sample.profile.user for sample in samples}),
            "gold_in_profile": sum(in_profile(bench.domain.task, sample) for sample in samples),
            "mean_profile": round(float(np.mean([len(sample.profile) for sample in samples])), 1),
        },
        "data": {"questions_sha256": hashlib.sha256(ids.encode()).hexdigest()[:16]},
        "seed": bench.seed,
        "command": _command(names),
        "git_hash": git_hash(),
        "versions": {name: version(name) for name in ("torch", "transformers", "persona")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def markdown(result: dict) -> str:
    """A Markdown table of one result."""
    names = shown(TASKS[result["task"]])
    lines = ["| | " + " | ".join(names) + " | prompt tokens | s / example |", "|---" * (len(names) + 3) + "|"]
    for method, row in result["results"].items():
        cells = [interval_cell(row[name]) for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} | {row.get('tokens', '')} | {row.get('seconds', '')} |")
    return "\n".join(lines)


def interval_cell(value: dict) -> str:
    """`.123 [.100, .150]`, or the value alone."""
    text = f"{value['value']:.3f}"
    return f"{text} [{value['low']:.3f}, {value['high']:.3f}]" if "low" in value else text


def _command(names: Sequence[str]) -> str:
    """The command, with the rows that an earlier one has left in the folder."""
    given = sys.argv[1:]
    asked = [value for option, value in pairwise(given) if option == "--method"] or ["main"]
    kept = [f"--method {name}" for name in names if name not in read_methods(asked)]
    asked = ["--method main"] if kept and "--method" not in given else []
    return " ".join(["persona", *given, *asked, *kept])
