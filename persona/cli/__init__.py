"""`persona <verb>`. Heavy modules are imported by the verb that needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from persona.cli.bench import bench
from persona.cli.common import Change, Data, OverwriteLM, Recipe, ReportTo, Strict, open_domain, quiet, say
from persona.cli.embed import embed
from persona.cli.migrate import migrate
from persona.cli.refresh import refresh
from persona.cli.store import store
from persona.errors import MissingExtraError, PersonaError

app = typer.Typer(help="Gives any LLM call a user id.", no_args_is_help=True, pretty_exceptions_enable=False)
lm = typer.Typer(help="The reference LM that stands in where no hub model can be downloaded.", no_args_is_help=True)
data_app = typer.Typer(help="Raw records: read them, or draw some.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(lm, name="lm")
app.add_typer(bench, name="bench")
app.add_typer(store, name="store")
app.command()(embed)
app.command()(refresh)
app.command()(migrate)


@data_app.command("shop")
def data_shop(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    users: Annotated[int, typer.Option(help="Number of users.")] = 1500,
    seed: Annotated[int, typer.Option(help="Another seed draws other users of the same shop.")] = 0,
) -> None:
    """Draws the records of the generated shop that the demo adapter is trained on."""
    from persona.demo.shop import generate_shop

    generate_shop(out, users=users, seed=seed)
    say(f"wrote the records of {users} users to {out}")


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

    download_lamp(read_task(task), split, out, part or PARTS, say=say)


@data_app.command("check")
def data_check(recipe: Recipe, data: Data, strict: Strict = False) -> None:
    """Reads the records of a recipe, of either form, and says what it found, bad rows included."""
    from persona.history.config import read_mapping

    if "task" in read_mapping(recipe):
        _check_lamp(recipe, data, strict)
        return
    domain = open_domain(recipe, data, strict)
    say(f"users: {len(domain.train)} train, {len(domain.validation)} validation, {len(domain.test)} test")


def _check_lamp(recipe: Path, data: Path, strict: bool) -> None:
    from persona.evaluation.lamp.official import open_domain
    from persona.evaluation.lamp.recipe import load_lamp_recipe

    domain = open_domain(load_lamp_recipe(recipe), data, strict=strict)
    say(str(domain))
    say(f"questions: {len(domain.samples('validation')):,} validation, {len(domain.samples('test')):,} test")


@data_app.command("userqa")
def data_userqa(
    recipe: Recipe,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    per_user: Annotated[int, typer.Option(help="Points in time at which each training user is asked.")] = 4,
    easy_share: Annotated[
        float, typer.Option(help="Share kept of the training answers that text similarity finds; others all are.")
    ] = 0.3,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn.")] = 0,
    rewrite_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible LLM that rewrites the questions; it sees no user's records.")
    ] = None,
    rewrite_model: Annotated[str | None, typer.Option(help="Name of that LLM; its key is OPENAI_API_KEY.")] = None,
    rewrite_count: Annotated[int, typer.Option(help="Other wordings of each question to ask for.")] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier dataset in the folder.")] = False,
    strict: Strict = False,
) -> None:
    """Writes (history, instruction, answer) triples as a dataset: UserQA of InstructUE. It holds users' records."""
    quiet()
    from persona.training.userqa import Rewriting, UserQAConfig, check_folder, counts_table, write_userqa

    config = UserQAConfig(per_user, easy_share, seed)
    rewriting = None
    if rewrite_url is not None or rewrite_model is not None:
        rewriting = Rewriting(rewrite_url or "", rewrite_model or "", rewrite_count)
    check_folder(out, overwrite=overwrite)
    domain = open_domain(recipe, data, strict)
    counts = write_userqa(domain, out, config, rewriting=rewriting, overwrite=overwrite, say=say)
    typer.echo(counts_table(counts))
    say(f"wrote {out}: {counts}")


@lm.command("build")
def lm_build(
    recipe: Recipe,
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Where to save; `lm` beside the recipe by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the recipe's.")] = None,
    overwrite: OverwriteLM = False,
    strict: Strict = False,
    report_to: ReportTo = "none",
) -> None:
    """Trains a small Llama from scratch on the domain's own text."""
    from persona.training.reference_lm import build_reference_lm

    out = out or recipe.parent / "lm"
    build_reference_lm(open_domain(recipe, data, strict), out, steps=steps, overwrite=overwrite, report_to=report_to)
    say(f"saved the reference LM to {out}")


@lm.command("lamp")
def lm_lamp(
    recipe: Annotated[Path, typer.Argument(help="Recipe in LaMP's form.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Where to save.")],
    start: Annotated[Path | None, typer.Option(help="Reference LM to go on from, instead of from scratch.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the recipe's.")] = None,
    change: Change = None,
    overwrite: OverwriteLM = False,
    report_to: ReportTo = "none",
) -> None:
    """Trains a small Llama on a task in LaMP's form."""
    from persona.evaluation.lamp.lm import build_lamp_lm
    from persona.evaluation.lamp.official import open_domain
    from persona.evaluation.lamp.recipe import load_lamp_recipe

    domain = open_domain(load_lamp_recipe(recipe, change or ()), data)
    say(str(domain))
    build_lamp_lm(domain, out, start=start, steps=steps, overwrite=overwrite, report_to=report_to)
    say(f"saved the reference LM to {out}")


@app.command()
def train(
    recipe: Recipe,
    data: Data,
    llm: Annotated[str, typer.Option(help="Hugging Face name or path of the LLM, which stays frozen.")],
    out: Annotated[Path | None, typer.Option(help="Where to save; `weights` beside the recipe by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the recipe's.")] = None,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Train the control: a learned prompt that sees no user.")
    ] = False,
    change: Change = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that lies in --out.")] = False,
    strict: Strict = False,
    report_to: ReportTo = "none",
) -> None:
    """Trains an adapter, user encoder and projector, for a domain and an LLM."""
    from persona.training.trainer import train_adapter

    out = out or recipe.parent / ("control" if no_history else "weights")
    domain = open_domain(recipe, data, strict, change or ())
    train_adapter(
        domain,
        llm,
        out,
        steps=steps,
        without_history=no_history,
        resume=resume,
        overwrite=overwrite,
        report_to=report_to,
    )
    say(f"saved the adapter to {out}")


@app.command()
def demo(
    adapter: Annotated[Path, typer.Option(help="The demo adapter.")] = Path("adapters/demo"),
    question: Annotated[str, typer.Option(help="Asked for each user and for nobody.")] = "",
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
) -> None:
    """Three users of a generated shop, the same questions for each and for nobody, answered by vLLM; then a table."""
    quiet()
    from persona.demo.run import run_demo

    run_demo(adapter, question=question, engine=engine, say=say)


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
    cache_url: Annotated[
        str | None,
        typer.Option(help="Where servers share users' states: redis://HOST:6379/0, or `store` for the event store's."),
    ] = None,
    max_body: Annotated[int | None, typer.Option(help="Longest request body in bytes.")] = None,
    require_personalization: Annotated[
        bool, typer.Option("--require-personalization", help="Answer 503 or 400 rather than plainly for a named user.")
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
        cache_url=cache_url,
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
    serve_vllm(config, [*listen, *context.args], say=say)


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
    say(f"wrote {folder}; the LLM's own weights are linked (persona serve --adapter {adapter} makes one by itself)")


def _secret(file: Path | None) -> str | None:
    """The text of a file that holds a secret, without the white space around it."""
    try:
        return file and file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PersonaError(f"{file} cannot be read: {error}") from None


def main() -> None:
    """Entry point: errors meant for people are printed in one line, all others with their traceback."""
    try:
        app()
    except PersonaError as error:
        typer.secho(f"persona: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
