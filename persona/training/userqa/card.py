"""The card of a UserQA dataset: what the Hub shows of it, and what its readers must know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import yaml

from persona.training.recipe import Recipe
from persona.training.userqa.triples import SPLITS, UserQAConfig
from persona.training.userqa.wordings import Rewriting, Wordings

if TYPE_CHECKING:
    from persona.training.userqa.dataset import Counts

TAG = "persona-userqa"
"""The tag by which we know a dataset of ours."""

BODY = """# UserQA: {name}

**This dataset holds users' records: their ids, what they did and when. Publish or share it only where that is allowed;
ids and texts are as in the records, nothing is anonymised.**

Triples of a user's history, an instruction and the answer, for training and evaluating instruction-aware user
embeddings (UserQA of InstructUE, arXiv 2510.11016).{description}

```python
datasets.load_dataset("FOLDER")  # this folder, or its name on the Hub
```

## How it was made

`{command}`, from the recipe `{name}`. The same command on the same records makes the same bytes.

- Questions are made by rule from each history and from what came after it. An answer about the past can be traced to
  the events of the history that support it, one about the future to the event that came; only the answer "no" has none.
- Splits are by user: no user of train is in validation or test, and the answers offered were learned from train alone.
  Training users are asked at {per_user} random points in time, validation and test users at evenly spread ones.
- `rank` is the place of the right answer among `options` by the cosine of its text vector ({encoder}, frozen) to the
  mean text vector of the history. Rank 1 is easy: likeness alone finds it. Of the easy triples of train a share of
  {easy_share:g} is kept and the others are left out; hard ones are all kept, and validation and test are not filtered.
- {wordings}

{table}

## Columns

| column | what it is |
|---|---|
| user | id of the user |
| cut | the point in time, in seconds since 1970 UTC: when the first event happened that the history does not hold |
| task | name of the question in the recipe |
| instruction | the question |
| answer | the right answer, one of `options` |
| options | the answers offered |
| about | past: answered by the history; future: by what came after |
| history | events before `cut`, oldest first: source, timestamp, text, item_id, value, attributes (as JSON) |
| support | past: indices into `history` of the events that make the answer right |
| support_future | future: the event that makes the answer right; never show it to a model |
| rank | see above; null for questions whether one item comes next |
"""


def card(
    recipe: Recipe,
    config: UserQAConfig,
    counts: Counts,
    encoder: str,
    rewriting: Rewriting | None,
    wordings: Mapping[str, Wordings],
) -> str:
    """README.md with the front matter that `datasets` and the Hub read."""
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in SPLITS if counts.total(split)]
    front = {
        "pretty_name": f"UserQA {recipe.name}",
        "task_categories": ["question-answering"],
        "tags": [TAG, "personalization", "user-embedding"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    body = BODY.format(
        name=recipe.name,
        description=f" The records: {recipe.description}" if recipe.description else "",
        command=_command(config, rewriting),
        per_user=config.per_user,
        encoder=encoder,
        easy_share=config.easy_share,
        wordings=_wordings(rewriting, wordings),
        table=counts_table(counts),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{body}"


def counts_table(counts: Counts) -> str:
    """Markdown table of the triples of each question and split, of the hard ones' share, and of what was left out."""
    lines = [f"| question | {' | '.join(SPLITS)} | hard: {', '.join(SPLITS)} | easy ones left out of train |"]
    lines.append("|---" * (len(SPLITS) + 3) + "|")
    for task in counts.tasks:
        numbers = [str(counts.written[split, task]) for split in SPLITS]
        ranked = [(counts.hard[split, task], counts.ranked[split, task]) for split in SPLITS]
        shares = ", ".join(f"{hard / of:.0%}" if of else "-" for hard, of in ranked)
        lines.append(f"| {task} | {' | '.join(numbers)} | {shares} | {counts.left_out[task]} |")
    return "\n".join(lines)


def _command(config: UserQAConfig, rewriting: Rewriting | None) -> str:
    """The command, without the paths and addresses of whoever ran it."""
    parts = ["persona data userqa RECIPE --data DIR --out FOLDER"]
    parts.append(f"--per-user {config.per_user} --easy-share {config.easy_share:g} --seed {config.seed}")
    if rewriting:
        parts.append(f"--rewrite-url URL --rewrite-model {rewriting.model} --rewrite-count {rewriting.count}")
    return " ".join(parts)


def _wordings(rewriting: Rewriting | None, wordings: Mapping[str, Wordings]) -> str:
    if not rewriting:
        return "Instructions are worded as in the recipe."
    made = "; ".join(f"{name}: {w}" for name, w in wordings.items())
    return (
        f"Instructions are worded as in the recipe or as {rewriting.model} rewrote it, drawn at random: wordings.json. "
        f"That LLM was sent the templates of the questions and nothing else, no record of any user. {made}."
    )
