"""`persona bench`: tables with controls and intervals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from persona.cli.common import Change, Data, Recipe, Strict, open_domain, quiet, say, write
from persona.errors import PersonaError

bench = typer.Typer(help="Tables with controls and intervals.", no_args_is_help=True)


@bench.command("table")
def bench_table(
    recipe: Recipe,
    data: Data,
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    control: Annotated[Path | None, typer.Option(help="Folder of an adapter trained with --no-history.")] = None,
    llm: Annotated[str | None, typer.Option(help="LLM, instead of the one the adapter names.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    part: Annotated[str, typer.Option(help="test or validation users.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of questions, controls and intervals.")] = 0,
) -> None:
    """Asks users who took no part in training, with every control, and prints and writes the table."""
    from persona.encoders.hub import read_json
    from persona.evaluation.report import markdown_table, paired_table
    from persona.evaluation.runner import run_table
    from persona.injection import PersonalizedLM
    from persona.training.trained_on import check_unseen

    quiet()
    if part not in ("test", "validation"):
        raise PersonaError(f"--part is test or validation, not {part}")
    if control and not read_json(control / "training.json").get("without_history"):
        raise PersonaError(f"{control} was trained with histories; the control is trained with --no-history")
    domain = open_domain(recipe, data, False)
    model = PersonalizedLM.from_pretrained(adapter, llm)
    other = PersonalizedLM.from_pretrained(control, llm) if control else None
    for folder in filter(None, (adapter, control, model.adapter.base_model)):
        check_unseen(domain.fingerprints(getattr(domain, part)), folder)
    result = run_table(domain, model, other, part=part, seed=seed, progress=say)
    training = adapter / "training.json"
    if training.exists():
        result["training"] = json.loads(training.read_text())
    typer.echo(f"\n{markdown_table(result)}\n\n{paired_table(result)}")
    write(out, result)


@bench.command("uqa")
def bench_uqa(
    recipe: Recipe,
    data: Data,
    llm: Annotated[str, typer.Option(help="Hugging Face name or path of the LLM, which stays frozen.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; what lies there already is not made again.")],
    backbone: Annotated[list[str] | None, typer.Option(help="Backbone to run; repeat for several.")] = None,
    head: Annotated[list[str] | None, typer.Option(help="resampler, linear or mlp; repeat for several.")] = None,
    injection: Annotated[
        list[str] | None, typer.Option(help="soft_prompt, cross_attention or both, instead of the recipe's.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of training; repeat for several.")] = None,
    change: Change = None,
    name: Annotated[str, typer.Option(help="Marks the runs of a changed recipe; part of their names.")] = "",
    stage: Annotated[str, typer.Option(help="all, or the last stage to run: pretrain, align, evaluate.")] = "all",
    pretrain_steps: Annotated[int | None, typer.Option(min=1, help="Steps of pre-training, not the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of alignment, not the recipe's.")] = None,
    baselines: Annotated[bool, typer.Option(help="Also the rows without user tokens.")] = True,
    strict: Strict = False,
) -> None:
    """Pre-trains, aligns and evaluates user embeddings as prompts: UQABench's seven sub-tasks, with controls.

    The recipe's questions bear the sub-tasks' names: direct_feature, match_feature, next_item, next_attribute,
    long_term_interest, short_term_interest, interest_trajectory; adapters/movies/uqa.yaml has them all.
    """
    from persona.evaluation.uqa.run import run_uqa

    quiet()
    if stage not in ("all", "pretrain", "align", "evaluate"):
        raise PersonaError(f"--stage is all, pretrain, align or evaluate, not {stage}")
    if change and not name:
        raise PersonaError("runs of a changed recipe need a --name of their own, or they would mix with the others")
    run_uqa(
        open_domain(recipe, data, strict, change or ()),
        llm,
        out,
        backbones=backbone or ["sasrec"],
        heads=head or ["resampler"],
        seeds=seed or [0],
        injections=injection,
        name=name,
        until=stage,
        pretrain_steps=pretrain_steps,
        steps=steps,
        baselines=baselines,
        say=say,
    )


@bench.command("lamp")
def bench_lamp(
    recipe: Annotated[Path, typer.Argument(help="Recipe in LaMP's form, of records or of official files.")],
    data: Data,
    llm: Annotated[str, typer.Option(help="Hugging Face name or path of a causal LLM, which stays frozen.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; what lies there already is not made again.")],
    method: Annotated[list[str] | None, typer.Option(help="A method, main or all; repeat for several.")] = None,
    part: Annotated[str, typer.Option(help="validation or test.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of training, retrieval and intervals.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each training, not the recipe's.")] = None,
    change: Change = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Instead of a run: write the methods that are text as lm-evaluation-harness tasks."),
    ] = None,
) -> None:
    """LaMP: text, PPlug, LoRA and our user tokens on one task, with controls; answers in the official format, too."""
    from persona.evaluation.lamp.bench import LampBench
    from persona.evaluation.lamp.methods import METHODS, read_methods
    from persona.evaluation.lamp.table import lamp_table, markdown

    quiet()
    methods = read_methods(method or ["main"])
    run = LampBench(recipe, data, llm, out, changes=change or (), part=part, seed=seed, steps=steps, say=say)
    if export:
        texts = [name for name, chosen in methods.items() if chosen.model == "llm"]
        if not texts:
            raise PersonaError(f"--export writes methods that are text alone; {', '.join(methods)} are not")
        for name in texts:
            say(f"wrote {run.export(name, export)}")
        return
    result = lamp_table(run, [name for name in METHODS if name in methods or run.answered(name)])
    typer.echo(f"\n{markdown(result)}")
    write(out / "results" / f"{result['name']}.json", result)


@bench.command("official")
def bench_official(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter that was trained on the official histories.")],
    file: Annotated[Path, typer.Option(help="An official align file, such as align_data_eval.arrow.")],
    llm: Annotated[str | None, typer.Option(help="LLM, instead of the one the adapter names.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the controls and intervals.")] = 0,
) -> None:
    """Asks the official questions of UQABench, scored as officially: one greedy token, accuracy x 100."""
    from persona.evaluation.runner import git_hash
    from persona.evaluation.uqa.official import OfficialFile
    from persona.evaluation.uqa.official_run import evaluate_official
    from persona.injection import PersonalizedLM

    quiet()
    questions = OfficialFile(file)
    model = PersonalizedLM.from_pretrained(adapter, llm)
    results = evaluate_official(model, questions, limit=limit, seed=seed, progress=say)
    for name, result in results.items():
        say(f"{name:>14}  {result['overall']['accuracy']:.2f}")
    command = "persona " + " ".join(sys.argv[1:])
    write(out, {"results": results, "seed": seed, "command": command, "git_hash": git_hash()})


@bench.command("readme")
def bench_readme(
    results: Annotated[list[Path], typer.Argument(help="Result files; NAME.json fills the markers persona:NAME.")],
    readme: Annotated[Path, typer.Option(help="File to update.")] = Path("README.md"),
) -> None:
    """Writes tables from result files into the README."""
    from persona.evaluation.report import update_readme

    say(f"updated {readme}: {', '.join(update_readme(readme, results))}")


@bench.command("report")
def bench_report(
    results: Annotated[list[Path], typer.Argument(help="Result files of `persona bench uqa`, any number.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    markdown: Annotated[Path | None, typer.Option(help="Markdown file to write the tables to.")] = None,
) -> None:
    """Turns result files into one HTML page with tables and figures, which needs no network."""
    from persona.evaluation.page import write_page

    for warning in write_page(results, out, markdown):
        say(f"warning: {warning}")
    say(f"wrote {out}" + (f" and {markdown}" if markdown else ""))
