"""What is claimed of the tables of a run: means over users with intervals, and differences user by user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from persona.evaluation.instructed import Instructed
from persona.evaluation.intervals import interval, mean_over_users


def claims(tables: Mapping[str, dict]) -> Iterator[tuple[str, str]]:
    """Pairs of "table: row" whose difference is shown."""
    for name, rows in tables.items():
        for way in ("llm", "similarity", "probe"):
            for other in ("empty", "wrong", "another user's"):
                if f"{way}, right" in rows and f"{way}, {other}" in rows:
                    yield f"{name}: {way}, right", f"{name}: {way}, {other}"
    for other in ("contrastive", "autoregressive", "next_item", "no_instruction", "resampler"):
        for way in ("llm", "similarity", "probe"):
            row = f"{way}, right"
            if row in tables.get("both", {}) and row in tables.get(other, {}):
                # what was trained without instructions is asked without
                yield f"both: {row}", f"{other}: {f'{way}, empty' if other == 'no_instruction' else row}"
    for row in tables.get("controls", {}):
        yield f"both: {'probe' if row.startswith('probe') else 'llm'}, right", f"controls: {row}"
    for row in tables.get("noise", {}):
        share, way = row.split(": ")
        if share != "0%":
            yield f"noise: {row}", f"noise: 0%: {way}"


def robustness(rows: Mapping[str, np.ndarray], asked: Instructed) -> dict:
    """By how much less the right instruction loses to noise than none, and than text in other forms, by user."""
    result = {}
    for share in dict.fromkeys(name.split(": ")[0] for name in rows):
        if share == "0%":
            continue

        def lost(way: str, share=share) -> np.ndarray:
            return rows[f"{share}: {way}"] - rows[f"0%: {way}"]

        for way, others in {
            "llm": ("llm, empty", "text in the prompt"),
            "similarity": ("similarity, empty",),
            "probe": (
                "probe, empty",
                "probe of mean text embeddings",
                "probe of mean text embeddings, fitted on noise",
            ),
        }.items():
            for other in others:
                gained = lost(f"{way}, right") - lost(other)
                result[f"{share}: {way}, right - {other}"] = summary(gained, asked)["mean"]
    return result


def difference(tables: Mapping[str, dict], a: str, b: str, asked: Instructed) -> dict:
    """Mean difference of two rows on the tasks that both answer."""
    left, right = (tables[name][row] for name, row in (key.split(": ", 1) for key in (a, b)))
    if left.shape != right.shape:  # a probe answers some of the tasks
        index = [asked.tasks.index(task) for task in asked.probed]
        left, right = (v[:, index] if v.shape[1] == len(asked.tasks) else v for v in (left, right))
    return summary(left - right, asked)


def summary(values: np.ndarray, asked: Instructed) -> dict:
    """Mean and interval of each task and of their mean."""
    names = asked.tasks if values.shape[1] == len(asked.tasks) else asked.probed
    mean, (low, high) = mean_over_users(values), interval(values)
    return {
        name: {"acc": round(float(m), 4), "low": round(float(a), 4), "high": round(float(b), 4)}
        for name, m, a, b in zip([*names, "mean"], mean, low, high)
    }
