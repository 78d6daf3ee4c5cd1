"""`persona <verb>`. Heavy modules are imported by the verb that needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from persona.errors import MissingExtraError, PersonaError

app = typer.Typer(help="Gives any LLM call a user id.", no_args_is_help=True, pretty_exceptions_enable=False)
lm = typer.Typer(help="The reference LM that stands in where no hub model can be downloaded.", no_args_is_help=True)
bench = typer.Typer(help="Tables with controls and intervals.", no_args_is_help=True)
data_app = typer.Typer(help="Raw records: read them, or draw some.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(lm, name="lm")
app.add_typer(bench, name="bench")

Recipe = Annotated[Path, typer.Argument(help="A recipe, such as adapters/movies/recipe.yaml.")]
Data = Annotated[Path, typer.Option(help="Folder of the raw records.")]
Change = Annotated[
    list[str] | None, typer.Option("--set", help="A field of the recipe to change, like encoder.width=128.")
]
Strict = Annotated[bool, typer.Option(help="Stop at the first bad row instead of counting it.")]
ReportTo = Annotated[str, typer.Option(help="Where transformers reports progress: none, tensorboard, wandb, ...")]


@data_app.command("shop")
def data_shop(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    users: Annotated[int, typer.Option(help="Number of users.")] = 1500,
    seed: Annotated[int, typer.Option(help="Another seed draws other users of the same shop.")] = 0,
) -> None:
    """Draws the records of the generated shop that the demo adapter is trained on."""
    from persona.demo.shop import generate_shop

    generate_shop(out, users=users, seed=seed)
    _say(f"wrote the records of {users} users to {out}")


@data_app.command("lamp")
def data_lamp(
    task: Annotated[str, typer.Option(help="1 to 7, or 2N.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    split: Annotated[str, typer.Option(help="user or time.")] = "time",
    part: Annotated[list[str] | None, typer.Option(help="train, dev or test; repeat for several.")] = None,
) -> None:
    """Downloads the official files of a LaMP task, which have a licence of their own."""
    from persona.evaluation.lamp.download import download_lamp
    from persona.evaluation.lamp.files import PARTS
    from persona.evaluation.lamp.tasks import read_task

    download_lamp(read_task(task), split, out, part or PARTS, say=_say)


@data_app.command("check")
def data_check(recipe: Recipe, data: Data, strict: Strict = False) -> None:
    """Reads the records of a recipe and says what it found, bad rows included."""
    domain = _domain(recipe, data, strict)
    _say(f"users: {len(domain.train)} train, {len(domain.validation)} validation, {len(domain.test)} test")


@lm.command("build")
def lm_build(
    recipe: Recipe,
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Where to save; `lm` beside the recipe by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of the recipe's.")] = None,
    strict: Strict = False,
    report_to: ReportTo = "none",
) -> None:
    """Trains a small Llama from scratch on the domain's own text."""
    from persona.training.reference_lm import build_reference_lm

    out = out or recipe.parent / "lm"
    build_reference_lm(_domain(recipe, data, strict), out, steps=steps, report_to=report_to)
    _say(f"saved the reference LM to {out}")


@lm.command("lamp")
def lm_lamp(
    recipe: Annotated[Path, typer.Argument(help="Recipe in LaMP's form.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Where to save.")],
    start: Annotated[Path | None, typer.Option(help="Reference LM to go on from, instead of from scratch.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of the recipe's.")] = None,
    report_to: ReportTo = "none",
) -> None:
    """Trains a small Llama on a task in LaMP's form."""
    from persona.evaluation.lamp.lm import build_lamp_lm
    from persona.evaluation.lamp.official import open_domain
    from persona.evaluation.lamp.recipe import load_lamp_recipe

    domain = open_domain(load_lamp_recipe(recipe), data)
    _say(str(domain))
    build_lamp_lm(domain, out, start=start, steps=steps, report_to=report_to)
    _say(f"saved the reference LM to {out}")


@app.command()
def train(
    recipe: Recipe,
    data: Data,
    llm: Annotated[str, typer.Option(help="Hugging Face name or path of the LLM, which stays frozen.")],
    out: Annotated[Path | None, typer.Option(help="Where to save; `weights` beside the recipe by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of the recipe's.")] = None,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Train the control: a learned prompt that sees no user.")
    ] = False,
    change: Change = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    strict: Strict = False,
    report_to: ReportTo = "none",
) -> None:
    """Trains an adapter, user encoder and projector, for a domain and an LLM."""
    from persona.training.trainer import train_adapter

    out = out or recipe.parent / ("control" if no_history else "weights")
    domain = _domain(recipe, data, strict, change or ())
    train_adapter(domain, llm, out, steps=steps, without_history=no_history, resume=resume, report_to=report_to)
    _say(f"saved the adapter to {out}")


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
    domain = _domain(recipe, data, False)
    model = PersonalizedLM.from_pretrained(adapter, llm)
    other = PersonalizedLM.from_pretrained(control, llm) if control else None
    for folder in filter(None, (adapter, control, model.adapter.base_model)):
        check_unseen(domain.fingerprints(getattr(domain, part)), folder)
    result = run_table(domain, model, other, part=part, seed=seed, progress=_say)
    training = adapter / "training.json"
    if training.exists():
        result["training"] = json.loads(training.read_text())
    typer.echo(f"\n{markdown_table(result)}\n\n{paired_table(result)}")
    _write(out, result)


@bench.command("uqa")
def bench_uqa(
    recipe: Recipe,
    data: Data,
    llm: Annotated[str, typer.Option(help="Hugging Face name or path of the LLM, which stays frozen.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; what lies there already is not made again.")],
    backbone: Annotated[list[str] | None, typer.Option(help="Backbone to run; repeat for several.")] = None,
    head: Annotated[list[str] | None, typer.Option(help="resampler, linear or mlp; repeat for several.")] = None,
    injection: Annotated[
        list[str] | None, typer.Option(help="soft_prompt, cross_attention or both; repeat for several.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of training; repeat for several.")] = None,
    change: Change = None,
    name: Annotated[str, typer.Option(help="Marks the runs of a changed recipe; part of their names.")] = "",
    stage: Annotated[str, typer.Option(help="all, or the last stage to run: pretrain, align, evaluate.")] = "all",
    pretrain_steps: Annotated[int | None, typer.Option(help="Steps of pre-training, not the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of alignment, not the recipe's.")] = None,
    baselines: Annotated[bool, typer.Option(help="Also the rows without user tokens.")] = True,
    strict: Strict = False,
) -> None:
    """Pre-trains, aligns and evaluates user embeddings as prompts: UQABench's seven sub-tasks, with controls."""
    from persona.evaluation.uqa.run import run_uqa

    quiet()
    if stage not in ("all", "pretrain", "align", "evaluate"):
        raise PersonaError(f"--stage is all, pretrain, align or evaluate, not {stage}")
    if change and not name:
        raise PersonaError("runs of a changed recipe need a --name of their own, or they would mix with the others")
    run_uqa(
        _domain(recipe, data, strict, change or ()),
        llm,
        out,
        backbones=backbone or ["sasrec"],
        heads=head or ["resampler"],
        seeds=seed or [0],
        injections=injection or ["soft_prompt"],
        name=name,
        until=stage,
        pretrain_steps=pretrain_steps,
        steps=steps,
        baselines=baselines,
        say=_say,
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
    steps: Annotated[int | None, typer.Option(help="Steps of each training, not the recipe's.")] = None,
    change: Change = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Instead of a run: write the methods that are text as lm-evaluation-harness tasks."),
    ] = None,
) -> None:
    """LaMP: text, PPlug, LoRA and our user tokens on one task, with controls; answers in the official format, too."""
    from persona.evaluation.lamp.bench import LampBench
    from persona.evaluation.lamp.methods import read_methods
    from persona.evaluation.lamp.table import lamp_table, markdown

    quiet()
    methods = read_methods(method or ["main"])
    run = LampBench(recipe, data, llm, out, changes=change or (), part=part, seed=seed, steps=steps, say=_say)
    if export:
        for name, chosen in methods.items():
            if chosen.model == "llm":
                _say(f"wrote {run.export(name, export)}")
        return
    result = lamp_table(run, list(methods))
    typer.echo(f"\n{markdown(result)}")
    _write(out / "results" / f"{result['name']}.json", result)


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
    results = evaluate_official(model, questions, limit=limit, seed=seed, progress=_say)
    for name, result in results.items():
        _say(f"{name:>14}  {result['overall']['accuracy']:.2f}")
    command = "persona " + " ".join(sys.argv[1:])
    _write(out, {"results": results, "seed": seed, "command": command, "git_hash": git_hash()})


@bench.command("readme")
def bench_readme(
    results: Annotated[list[Path], typer.Argument(help="Result files; NAME.json fills the markers persona:NAME.")],
    readme: Annotated[Path, typer.Option(help="File to update.")] = Path("README.md"),
) -> None:
    """Writes tables from result files into the README."""
    from persona.evaluation.report import update_readme

    _say(f"updated {readme}: {', '.join(update_readme(readme, results))}")


@bench.command("report")
def bench_report(
    results: Annotated[list[Path], typer.Argument(help="Result files of `persona bench uqa`, any number.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    markdown: Annotated[Path | None, typer.Option(help="Markdown file to write the tables to.")] = None,
) -> None:
    """Turns result files into one HTML page with tables and figures, which needs no network."""
    from persona.evaluation.page import write_page

    for warning in write_page(results, out, markdown):
        _say(f"warning: {warning}")
    _say(f"wrote {out}" + (f" and {markdown}" if markdown else ""))


@app.command()
def demo(
    adapter: Annotated[Path, typer.Option(help="The demo adapter.")] = Path("adapters/demo"),
    question: Annotated[str, typer.Option(help="Asked for each user and for nobody.")] = "",
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
) -> None:
    """Three users of a generated shop, the same questions for each and for nobody, answered by vLLM; then a table."""
    quiet()
    from persona.demo.run import run_demo

    run_demo(adapter, question=question, engine=engine, say=_say)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    adapter: Annotated[str, typer.Option(envvar="PERSONA_ADAPTER", help="Folder or hub name of the adapter.")],
    llm: Annotated[str | None, typer.Option(help="LLM, instead of the one the adapter names.")] = None,
    store: Annotated[str | None, typer.Option(help="Database URL of the event store.")] = None,
    keys: Annotated[Path | None, typer.Option(help="YAML file that maps tenants to their API keys.")] = None,
    secret_file: Annotated[
        Path | None, typer.Option(help="Secret that the tenants' cache salts are made from.")
    ] = None,
    jwt_key: Annotated[Path | None, typer.Option(help="File of the key that checks signed user tokens.")] = None,
    jwt_algorithm: Annotated[str | None, typer.Option(help="Signature algorithm of user tokens.")] = None,
    jwt_audience: Annotated[str | None, typer.Option(help="Audience that user tokens are made out to.")] = None,
    budget_ms: Annotated[float | None, typer.Option(help="Milliseconds that encoding a user may take.")] = None,
    max_body: Annotated[int | None, typer.Option(help="Longest request body in bytes.")] = None,
    require_personalization: Annotated[
        bool, typer.Option("--require-personalization", help="Answer 503 rather than plainly for a named user.")
    ] = False,
    injection: Annotated[
        str | None, typer.Option(help="Refuse an adapter of another kind: soft_prompt, cross_attention or both.")
    ] = None,
    upstream: Annotated[str | None, typer.Option(help="Be a gateway in front of the vLLM at this URL.")] = None,
    upstream_key_file: Annotated[Path | None, typer.Option(help="File of the API key for the upstream vLLM.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 8000 by default.")] = None,
) -> None:
    """Serves the LLM with user tokens: stock vLLM with our middleware, or a gateway in front of one.

    All further arguments are vLLM's, such as --max-model-len 4096 or --config FILE. Settings left out here are read
    from the environment (PERSONA_STORE, ...).
    """
    quiet()
    try:
        from persona.serving.server.config import ServerConfig
    except ImportError as error:
        raise MissingExtraError(f"the server cannot be imported ({error}): pip install 'persona[serve]'") from error
    from persona.serving.server.launch import read_adapter, serve_gateway, serve_vllm

    if injection and (own := read_adapter(adapter)[1].injection) != injection:
        raise PersonaError(f"{adapter} was trained for the injection {own}, not {injection}")
    config = ServerConfig.load(
        adapter=adapter,
        llm=llm,
        store=store,
        keys_file=keys,
        secret_file=secret_file,
        jwt_key_file=jwt_key,
        jwt_algorithm=jwt_algorithm,
        jwt_audience=jwt_audience,
        budget_ms=budget_ms,
        max_body=max_body,
        require_personalization=require_personalization or None,
        upstream=upstream,
        upstream_key=_secret(upstream_key_file),
    )
    if config.upstream:
        serve_gateway(config, context.args, host, port)
        return
    if upstream_key_file:
        raise PersonaError("--upstream-key-file is for a gateway; give --upstream URL too")
    listen = [f"--{name}={value}" for name, value in (("host", host), ("port", port)) if value is not None]
    serve_vllm(config, [*listen, *context.args], say=_say)


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="Folder or hub name of an adapter with cross-attention.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; an earlier export there is replaced.")],
    llm: Annotated[str | None, typer.Option(help="LLM, instead of the one the adapter names.")] = None,
) -> None:
    """Writes the checkpoint that vLLM serves for an adapter with cross-attention; persona serve does it by itself."""
    quiet()
    from persona.serving.export import export_adapter

    folder = export_adapter(adapter, out, llm)
    _say(f"wrote {folder}; the LLM's own weights are linked. Serve it with: persona serve --adapter {adapter}")


def _domain(recipe: Path, data: Path, strict: bool, changes: Sequence[str] = ()):
    from persona.training.recipe import Domain, load_recipe

    domain = Domain(load_recipe(recipe, changes), data, strict=strict)
    _say(str(domain.report))
    return domain


def _write(out: Path | None, result: dict) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        _say(f"wrote {out}")


def quiet() -> None:
    """Keeps libraries' loading bars and notes out of what people came to read; errors still show."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


def _secret(file: Path | None) -> str | None:
    """The text of a file that holds a secret, without the white space around it."""
    try:
        return file and file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PersonaError(f"{file} cannot be read: {error}") from None


def _say(text: str) -> None:
    typer.echo(text, err=True)


def main() -> None:
    """Entry point: errors meant for people are printed in one line, all others with their traceback."""
    try:
        app()
    except PersonaError as error:
        typer.secho(f"persona: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
