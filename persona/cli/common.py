"""What the verbs share: their common options, and how they speak."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[Path, typer.Argument(help="A recipe, such as adapters/movies/recipe.yaml.")]
Data = Annotated[Path, typer.Option(help="Folder of the raw records.")]
Change = Annotated[
    list[str] | None, typer.Option("--set", help="A field of the recipe to change, like encoder.width=128.")
]
Strict = Annotated[bool, typer.Option(help="Stop at the first bad row instead of counting it.")]
ReportTo = Annotated[str, typer.Option(help="Where transformers reports progress: none, tensorboard, wandb, ...")]
OverwriteLM = Annotated[bool, typer.Option("--overwrite", help="Replace an LLM that lies in --out.")]


def open_domain(recipe: Path, data: Path, strict: bool, changes: Sequence[str] = ()):
    """The domain of a recipe and its records; says what was read."""
    from persona.training.recipe import Domain, load_recipe

    domain = Domain(load_recipe(recipe, changes), data, strict=strict)
    say(str(domain.report))
    return domain


def write(out: Path | None, result: dict) -> None:
    """Writes a result as JSON, if it has a place."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        say(f"wrote {out}")


def quiet() -> None:
    """Keeps libraries' loading bars and notes out of what people came to read; errors still show."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


def say(text: str) -> None:
    """Tells people, on the error stream: what is piped on is a verb's own output.

    Of processes that accelerate launch or torchrun started together only the first speaks.
    """
    if "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0":
        typer.echo(text, err=True)
