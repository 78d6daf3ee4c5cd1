"""UserQA as a dataset of the Hugging Face Hub: one parquet file a split, and a card."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from persona.encoders import TextEncoder
from persona.errors import DataError, MissingExtraError, PersonaError
from persona.history import Event
from persona.training.recipe import Domain
from persona.training.userqa.card import TAG, card
from persona.training.userqa.triples import SPLITS, Triple, UserQAConfig, triples
from persona.training.userqa.wordings import Rewriting, Wordings, reword, write_wordings

CARD, WORDINGS, DATA = "README.md", "wordings.json", "data"
"""What a dataset's folder holds; wordings only where an LLM was asked."""
ROW_GROUP = 1000
"""Triples written at a time."""


@dataclass
class Counts:
    """How many triples there are of each split and question."""

    tasks: Sequence[str]
    """Names of the recipe's questions, those that nobody can be asked among them."""
    written: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(split, question) -> triples in the dataset."""
    ranked: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Those of them that have a rank: all but those of next_item."""
    hard: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Those of them whose rank is not 1."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Question -> easy triples of the training split that are not in the dataset."""
    users: Counter[str] = field(default_factory=Counter)
    """Split -> users with a triple in the dataset."""

    def total(self, split: str) -> int:
        """Triples of a split."""
        return sum(count for (where, _), count in self.written.items() if where == split)

    def __str__(self) -> str:
        parts = [f"{split} {self.total(split)} of {self.users[split]} users" for split in SPLITS]
        return f"{', '.join(parts)}; {self.left_out.total()} easy ones left out of train"


def check_folder(out: Path, *, overwrite: bool = False) -> None:
    """Raises `PersonaError` unless `out` is new, empty, or a UserQA dataset that is to be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise PersonaError(f"{out} is a file; name a folder for the dataset")
    found = {path.name for path in out.iterdir()}
    if not found:
        return
    if CARD not in found or f"\n- {TAG}\n" not in (out / CARD).read_text(encoding="utf-8", errors="replace"):
        raise PersonaError(f"{out} holds files that are not a UserQA dataset; name another folder")
    if not overwrite:
        raise PersonaError(f"{out} holds a UserQA dataset already; replace it with --overwrite, or name another folder")
    if others := sorted(found - {CARD, WORDINGS, DATA}):
        raise PersonaError(f"{out} also holds {', '.join(others)}, which --overwrite would delete; move it elsewhere")


def write_userqa(
    domain: Domain,
    out: str | Path,
    config: UserQAConfig | None = None,
    *,
    rewriting: Rewriting | None = None,
    overwrite: bool = False,
    encoder: TextEncoder | None = None,
    say: Callable[[str], None] = print,
) -> Counts:
    """Writes the UserQA dataset of a domain to the folder `out`, whole or not at all; the same seed, the same bytes.

    `datasets.load_dataset(str(out))` reads it. With `rewriting` an LLM varies the questions' wordings, see `reword`;
    those of an earlier dataset in `out` are used again as far as they fit. A split without a triple has no file.
    `encoder` is the recipe's text encoder by default. Raises `PersonaError` as `check_folder` and `reword` do and when
    the folder cannot be written, `DataError` when no triple is left for train, and `MissingExtraError` without datasets
    and pyarrow.
    """
    try:
        from pyarrow.parquet import ParquetWriter

        schema = _features().arrow_schema
    except ImportError as error:
        raise MissingExtraError(f"a dataset cannot be written ({error}): pip install 'persona[train]'") from error
    out, config = Path(out).resolve(), config or UserQAConfig()
    check_folder(out, overwrite=overwrite)
    wordings = reword(rewriting, domain.recipe.questions, out / WORDINGS, say) if rewriting else {}
    encoder = encoder or TextEncoder(domain.recipe.encoder.text_encoder)
    counts = Counts(tuple(domain.recipe.questions))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
            new = Path(beside) / "new"
            (new / DATA).mkdir(parents=True)
            for split in SPLITS:
                rows = _rows(domain, split, config, encoder, wordings, counts)
                path = new / DATA / f"{split}-00000-of-00001.parquet"
                with ParquetWriter(path, schema, compression="zstd") as writer:
                    while group := list(islice(rows, ROW_GROUP)):
                        writer.write_table(_table(group))
                if not counts.total(split):
                    path.unlink()  # `load_dataset` takes no empty split
                if split == "train" and not counts.total(split):
                    raise DataError(
                        f"train would be empty, with {counts.left_out.total()} easy triples left out; check the "
                        "recipe's questions, and --easy-share"
                    )
            if rewriting:
                write_wordings(new / WORDINGS, rewriting, wordings)
            text = card(domain.recipe, config, counts, encoder.name, rewriting, wordings)
            (new / CARD).write_text(text, encoding="utf-8")
            if out.exists():
                out.rename(Path(beside) / "old")
            new.rename(out)
    except OSError as error:
        raise PersonaError(f"{out} cannot be written: {error}") from error
    return counts


def _rows(
    domain: Domain,
    split: str,
    config: UserQAConfig,
    encoder: TextEncoder,
    wordings: Mapping[str, Wordings],
    counts: Counts,
) -> Iterator[dict]:
    """The rows of a split, counted; of training's easy triples only a share."""
    prompts = {name: w.all for name, w in wordings.items()}
    draw, before = np.random.default_rng([config.seed, 6]), None
    for triple in triples(domain, split, config, encoder, prompts):
        task, rank = triple.question.task, triple.rank
        if split == "train" and rank == 1 and draw.random() >= config.easy_share:
            counts.left_out[task] += 1
            continue
        counts.written[split, task] += 1
        counts.ranked[split, task] += rank is not None
        counts.hard[split, task] += rank is not None and rank > 1
        counts.users[split] += triple.user != before  # triples come user by user
        before = triple.user
        yield _row(triple, domain.recipe.questions[task].kind.startswith("next_"))


def _row(triple: Triple, future: bool) -> dict:
    question, events = triple.question, triple.cut.history.events
    place = {id(event): number for number, event in enumerate(events)}  # by identity: equal events may occur twice
    return {
        "user": triple.user,
        "cut": triple.cut.future[0].timestamp,
        "task": question.task,
        "instruction": question.prompt,
        "answer": question.answer,
        "options": list(question.options),
        "about": "future" if future else "past",
        "history": [_event(e) for e in events],
        "support": [] if future else [place[id(e)] for e in question.support],
        "support_future": [_event(e) for e in question.support] if future else [],
        "rank": triple.rank,
    }


def _event(event: Event) -> dict:
    return {
        "source": event.source,
        "timestamp": event.timestamp,
        "text": event.text,
        "item_id": event.item_id,
        "value": event.value,
        "attributes": json.dumps(event.attributes, ensure_ascii=False, sort_keys=True),
    }


def _features():
    """The columns as `datasets` knows them."""
    from datasets import Features, List, Value

    text, number = Value("string"), Value("float64")
    event = {
        "source": text,
        "timestamp": number,
        "text": text,
        "item_id": text,
        "value": number,
        "attributes": text,
    }
    return Features(
        {
            "user": text,
            "cut": number,
            "task": text,
            "instruction": text,
            "answer": text,
            "options": List(text),
            "about": text,
            "history": List(event),
            "support": List(Value("int32")),
            "support_future": List(event),
            "rank": Value("int32"),
        }
    )


def _table(rows: Sequence[dict]):
    """Rows as an Arrow table."""
    from datasets import Dataset

    return Dataset.from_list(list(rows), features=_features()).data.table
