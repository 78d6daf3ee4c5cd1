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

    In `short` only the differences.
    """
    lines = []
    for (backbone, reader), kinds in with_all_kinds(runs, baselines).items():
        parts = [_differences(kinds, baselines), [caption(kinds, baselines)]]
        if not short:
            shown = [run for kind in KINDS for run in kinds[kind]]
            parts = [_rows(kinds, baselines), *parts, [commands([baselines, *shown])]]
        lines += [f"**{backbone}, {reader}**", "", *("\n".join(part) + "\n" for part in parts)]
    return "\n".join(lines).strip() or "(not run yet)"


def overview(kinds: dict[str, list[dict]], tasks: list[str]) -> list[tuple[str, dict]]:
    """(title, row) of ours by soft prompt and by cross-attention with their controls, means over seeds."""
    most, found = _most(kinds), []
    for kind in ("soft_prompt", "cross_attention"):
        for name in (most, *CONTROLS):
            if of := [run for run in kinds[kind] if name in run["results"]]:
                title = f"{KINDS[kind]}{_label(name, most)[0]}"
                title = f"**ours, {title}, K = {most[6:]}**" if name == most else title
                row = {**summary(_over_seeds(of, name), tasks), "tokens": of[0]["results"][name]["tokens"]}
                found.append((f"{title}, {len(of)} seed{'s' if len(of) > 1 else ''}", row))
    return found


def with_all_kinds(runs: list[dict], baselines: dict) -> dict[tuple, dict[str, list[dict]]]:
    """Runs by (backbone, head) and kind, for those that were run with all kinds."""
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for run in runs:
        own = run["config"]["run"]
        if not own["label"]:
            kinds = groups.setdefault((own["backbone"], own["head"]), {})
            kinds.setdefault(own.get("injection", "soft_prompt"), []).append(run)
    found = {key: kinds for key, kinds in groups.items() if len(kinds) == len(KINDS)}
    for kinds in found.values():
        _check([baselines, *(run for own in kinds.values() for run in own)])
    return found


def _most(kinds: dict[str, list[dict]]) -> str:
    return f"soft_k{kinds['soft_prompt'][0]['config']['tokens']}"


def _rows(kinds: dict[str, list[dict]], baselines: dict) -> list[str]:
    tasks, most = list(baselines["n"]["answers"]), _most(kinds)
    names = [name for name in kinds["soft_prompt"][0]["results"] if name.startswith("soft_k")]
    lines = [head(["injection", "user tokens", "seeds", *COLUMNS, "mean of each seed"])]
    for kind in KINDS:
        own = sorted(kinds[kind], key=lambda run: run["config"]["run"]["seed"])
        for name in [*names, *CONTROLS]:
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
    return lines


def _differences(kinds: dict[str, list[dict]], baselines: dict) -> list[str]:
    tasks, most = list(baselines["n"]["answers"]), _most(kinds)
    lines = [head(["difference", *COLUMNS])]
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
    return lines


def caption(kinds: dict[str, list[dict]], baselines: dict) -> str:
    """What is needed to read a table of means over seeds."""
    n, config = baselines["n"], baselines["config"]
    trained = {kind: runs[0]["training"]["trained_parameters"] for kind, runs in kinds.items()}
    sizes = ", ".join(f"{KINDS[kind]} {trained[kind]:,}" for kind in KINDS)
    return (
        f"Accuracy, mean over {n['users']} users who took no part in training and over the seeds of training, with "
        f"bootstrap 95% intervals over users; {n['cuts']} cuts, {sum(n['answers'].values())} questions of seed "
        f"{baselines['seed']}. The LLM has {config['llm_parameters'] / 1e6:.1f} M parameters and is frozen; the window "
        f"is {config['window']} events. Trained parameters: {sizes}; "
        f"{kinds['soft_prompt'][0]['training']['steps']} steps each."
    )


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
