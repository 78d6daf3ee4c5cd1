"""The table of soft prompt, cross-attention and both: one encoder, the same users and questions, several seeds."""

from __future__ import annotations

import numpy as np
from report_rows import commands, head

from persona.errors import DataError
from persona.evaluation.report import cell, label
from persona.evaluation.uqa.table import summary
from persona.evaluation.uqa.tasks import DIMENSIONS

KINDS = {"soft_prompt": "soft prompt", "cross_attention": "cross-attention", "both": "both"}
COLUMNS = [*DIMENSIONS, "next_item", "mean"]
DIFFERENCES = [
    (("cross_attention", "most"), ("soft_prompt", "most")),
    (("both", "most"), ("soft_prompt", "most")),
    (("both", "most"), ("cross_attention", "most")),
    (("cross_attention", "soft_k1"), ("soft_prompt", "soft_k1")),
    (("cross_attention", "soft_k1"), ("soft_prompt", "most")),
]
"""Pairs of (kind, row) whose difference is shown; "most" is the row with all tokens."""
WITHOUT_TOKENS = ("text_full", "item_cosine", "ease")
"""Baselines, of which the last two know nothing but the next item."""
CONTROLS = ("shuffled_user", "learned_prompt")


def injections(runs: list[dict], baselines: dict, *, short: bool = False) -> str:
    """Means over seeds of the encoder that was run with all kinds, and their differences user by user.

    In `short` only the rows with one token and with all tokens.
    """
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for run in runs:
        own = run["config"]["run"]
        if not own["label"]:
            kinds = groups.setdefault((own["backbone"], own["head"]), {})
            kinds.setdefault(own.get("injection", "soft_prompt"), []).append(run)
    lines = []
    for (backbone, reader), kinds in groups.items():
        if len(kinds) == len(KINDS):
            _check([baselines, *(run for own in kinds.values() for run in own)])
            lines += [f"**{backbone}, {reader}**", "", *_tables(kinds, baselines, short), ""]
    return "\n".join(lines).strip() or "(not run yet)"


def _tables(kinds: dict[str, list[dict]], baselines: dict, short: bool) -> list[str]:
    tasks = list(baselines["n"]["answers"])
    most = f"soft_k{kinds['soft_prompt'][0]['config']['tokens']}"
    names = [name for name in kinds["soft_prompt"][0]["results"] if name.startswith("soft_k")]
    lines = [head(["injection", "user tokens", "seeds", *COLUMNS, "mean of each seed"])]
    for kind in KINDS:
        own = sorted(kinds[kind], key=lambda run: run["config"]["run"]["seed"])
        for name in ["soft_k1", most] if short else [*names, *CONTROLS]:
            of = [run for run in own if name in run["results"]]
            if kind == "soft_prompt" and name == "learned_prompt":
                of = [baselines]
            if of:
                title, count = _label(name, most)
                if of == [baselines]:
                    title += f" ({baselines['config']['backbone']})"
                row = summary(_over_seeds(of, name), tasks)
                each = ", ".join(f"{run['results'][name]['mean']['acc']:.3f}" for run in of)
                cells = " | ".join(cell(row.get(column)) for column in COLUMNS)
                lines.append(f"| {KINDS[kind]}{title} | {count} | {len(of)} | {cells} | {each} |")
    lines += ["", head(["difference", *COLUMNS])]
    for left, right in DIFFERENCES:
        (first, one), (second, two) = ((kinds[k], most if name == "most" else name) for k, name in (left, right))
        seeds = {run["config"]["run"]["seed"] for run in first} & {run["config"]["run"]["seed"] for run in second}
        if not seeds:
            continue
        values = [
            _over_seeds([run for run in part if run["config"]["run"]["seed"] in seeds], name)
            for part, name in ((first, one), (second, two))
        ]
        row = summary(values[0] - values[1], tasks)
        titles = [f"{KINDS[k]}, K = {name[6:]}" for k, name in ((left[0], one), (right[0], two))]
        cells = " | ".join(cell(row.get(column), signed=True) for column in COLUMNS)
        lines.append(f"| {titles[0]} minus {titles[1]}, {len(seeds)} seeds | {cells} |")
    for kind in ("soft_prompt", "cross_attention"):
        for other in WITHOUT_TOKENS:
            theirs = np.array(baselines["per_user"][other], float)
            row = summary(_over_seeds(kinds[kind], most) - theirs, tasks)
            cells = " | ".join(cell(row.get(column), signed=True) for column in COLUMNS)
            lines.append(f"| {KINDS[kind]}, K = {most[6:]} minus {label(other)} | {cells} |")
    trained = {k: runs[0]["training"]["trained_parameters"] for k, runs in kinds.items()}
    sizes = ", ".join(f"{KINDS[k]} {trained[k]:,}" for k in KINDS)
    shown = [run for k in KINDS for run in kinds[k]]
    lines += [
        "",
        f"Accuracy, mean over {baselines['n']['users']} users who took no part in training and over the seeds of "
        "training, with bootstrap 95% intervals over users; questions have seed 0. Trained parameters: "
        f"{sizes}; {shown[0]['training']['steps']} steps each.",
        "",
        commands([baselines, *shown]),
    ]
    return lines


def _check(results: list[dict]) -> None:
    """Raises `DataError` unless all are of the same questions to the same users."""
    for result in results[1:]:
        for key in ("configs", "n", "data_sha256"):
            if result[key] != results[0][key]:
                raise DataError(
                    f"{result['name']} has another {key} than {results[0]['name']}; they cannot be compared"
                )


def _over_seeds(runs: list[dict], name: str) -> np.ndarray:
    """Accuracy `[users, tasks]` of a row, mean over runs."""
    return np.mean([np.array(run["per_user"][name], float) for run in runs], axis=0)


def _label(name: str, most: str) -> tuple[str, str]:
    if name.startswith("soft_k"):
        return "", name[6:]
    return {"shuffled_user": ", another user's tokens", "learned_prompt": ", learned, no user in it"}[name], most[6:]
