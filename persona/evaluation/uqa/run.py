"""`run_uqa`: all runs that are asked for, stage by stage, and a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from persona.evaluation.report import cell, label
from persona.evaluation.uqa.stages import UQA, Run
from persona.evaluation.uqa.tasks import DIMENSIONS
from persona.injection.soft_prompt import Injection
from persona.training.recipe import Domain


def run_uqa(
    domain: Domain,
    llm: str | Path,
    out: str | Path,
    *,
    backbones: Sequence[str],
    heads: Sequence[str],
    seeds: Sequence[int],
    injections: Sequence[Injection] | None = None,
    name: str = "",
    until: str = "all",
    pretrain_steps: int | None = None,
    steps: int | None = None,
    baselines: bool = True,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Every backbone with every head, injection (the recipe's by default) and seed, up to the stage `until`.

    Returns the results and says the table. `name` marks runs whose recipe was changed. Each kind of injection has a
    learned prompt of its own, of the shape of the first run; the baselines' is a soft prompt. Finished stages are not
    run again.
    """
    bench = UQA(domain, llm, out, say)
    injections = injections or [domain.recipe.injection.kind]
    runs = [
        Run(backbone, head, seed, name, injection)
        for backbone in backbones
        for head in heads
        for injection in injections
        for seed in seeds
    ]
    for run in runs:
        bench.recipe(run)  # before anything long: names that do not exist
    for run in runs:
        bench.pretrain(run, pretrain_steps)
    if until == "pretrain":
        return []
    control = Run(backbones[0], "resampler", seeds[0], name)
    for run in runs:
        bench.align(run, steps)
    for injection in dict.fromkeys(["soft_prompt", *injections]) if baselines else ():
        bench.align_control(replace(control, injection=injection), steps)
    if until == "align":
        return []
    results = [bench.evaluate_baselines(control)] if baselines else []
    results += [bench.evaluate(run) for run in runs]
    say("\n" + table(results))
    return results


def table(results: Sequence[dict]) -> str:
    """A Markdown table: one line for each row of each result, with the dimensions, the mean and the prompt's tokens."""
    columns = [*DIMENSIONS, "mean"]
    lines = ["| | " + " | ".join(columns) + " | prompt tokens |", "|---" * (len(columns) + 2) + "|"]
    for result in results:
        for name, row in result["results"].items():
            title = label(name) if result["kind"] == "uqa-baselines" else f"{result['name']}: {label(name)}"
            cells = [cell(row.get(column)) for column in columns]
            if not any(cells):  # a floor of one sub-task, which `persona bench report` shows
                continue
            lines.append(f"| {title} | {' | '.join(cells)} | {row.get('tokens', {}).get('prompt', '')} |")
    return "\n".join(lines)
