"""Runs every method on the same questions of the same test users and returns one JSON-ready result."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from persona.errors import DataError, PersonaError
from persona.evaluation.cost import encoding_cost
from persona.evaluation.floors import Floors
from persona.evaluation.intervals import interval, mean_over_users
from persona.evaluation.likelihood import option_scores
from persona.evaluation.methods import (
    Methods,
    Sample,
    cut_note,
    draw_sample,
    questions_cut,
    token_counts,
    tokens_of,
)
from persona.injection import PersonalizedLM
from persona.training.questions import YES
from persona.training.recipe import Domain

COMPARISONS = ("no_history", "learned_prompt", "shuffled_user", "text_same_budget", "text_full")


def run_table(
    domain: Domain,
    model: PersonalizedLM,
    control: PersonalizedLM | None,
    *,
    part: str = "test",
    seed: int = 0,
    cost: bool = True,
    progress: Callable[[str], None] = print,
) -> dict:
    """The table of `domain` on its test (or validation) users, with controls, floors, intervals and token counts.

    `control` is an adapter trained without histories, the learned prompt; without it that row is missing. Raises
    `DataError` when no user of the part can be asked anything.
    """
    if model.adapter.lora:
        raise PersonaError("this adapter has a LoRA, which would also change the rows that stand for the plain LLM")
    sample = draw_sample(domain, getattr(domain, part), seed)
    if len(sample.users) < 2:
        raise DataError(f"only {len(sample.users)} {part} users have {domain.recipe.split.min_events} events or more")
    tasks = list(domain.recipe.questions)
    progress(f"{len(sample.users)} {part} users, {len(sample.cuts)} cuts, {len(sample.asked)} questions")
    values, tokens, cut = floor_values(domain, sample, tasks, Floors(domain)), {}, {}
    methods = Methods(domain, model, control, sample)
    for name, requests in methods.all():
        owner = control if name == "learned_prompt" else model
        scores = option_scores(owner, requests)
        answers = [dict(zip(r.options, s)) for r, s in zip(requests, scores)]
        values[name] = user_accuracy(sample, answers, tasks)
        tokens[name], cut[name] = tokens_of(owner, requests), questions_cut(requests)
        progress(f"{name:>18}  mean {mean_over_users(values[name])[-1]:.3f}  tokens {tokens[name]:.0f}")
        if cut[name]:
            progress(cut_note(name, cut[name], len(requests)))
    return {
        "results": {name: _summary(v, tasks, seed) | _tokens(name, tokens, cut) for name, v in values.items()},
        "paired": _paired(values, f"ours_k{methods.counts[-1]}", tasks, seed),
        "n": sizes(sample, tasks),
        "cost": encoding_cost(model.encoder, [domain.histories[u] for u in sample.users]) if cost else {},
        "config": {
            "domain": domain.recipe.name,
            "part": part,
            "window": domain.recipe.window,
            "users": {"train": len(domain.train), "validation": len(domain.validation), "test": len(domain.test)},
            "llm_parameters": sum(p.numel() for p in model.llm.parameters()),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "interval": "percentile bootstrap over users, 95%, 2000 resamples",
        },
        **provenance(domain, seed),
    }


def user_accuracy(sample: Sample, answers: Sequence[dict[str, float]], tasks: Sequence[str]) -> np.ndarray:
    """Accuracy `[users, tasks]`, NaN where a user was not asked.

    A group of yes/no questions counts once: right when its true item has the highest odds of yes. Equal scores share
    the point, so that an answer by order alone is worth chance.
    """
    hits: dict[tuple[int, str], list[float]] = {}
    groups: dict[tuple, list[tuple[float, bool]]] = {}
    for asked, scores in zip(sample.asked, answers):
        question = asked.question
        if question.options[0] == YES:
            odds = scores[YES] - max(s for o, s in scores.items() if o != YES)
            group = groups.setdefault((asked.user, question.task, asked.cut, question.group), [])
            group.append((odds, question.answer == YES))
        else:
            choices = [(score, option == question.answer) for option, score in scores.items()]
            hits.setdefault((asked.user, question.task), []).append(_share(choices))
    for (user, task, *_), group in groups.items():
        hits.setdefault((user, task), []).append(_share(group))
    values = np.full((len(sample.users), len(tasks)), np.nan)
    for (user, task), those in hits.items():
        values[user, tasks.index(task)] = np.mean(those)
    return values


def _share(choices: Sequence[tuple[float, bool]]) -> float:
    """1 over the number of best choices if the right one is among them, else 0."""
    best = max(score for score, _ in choices)
    tied = [right for score, right in choices if score == best]
    return sum(tied) / len(tied)


def floor_values(domain: Domain, sample: Sample, tasks: Sequence[str], floors: Floors) -> dict[str, np.ndarray]:
    """Rows without an LM; NaN where a floor does not apply to a task."""
    values = {}
    for name, score in {
        "chance": lambda q, cut: dict.fromkeys(q.options, 0.0),
        "majority": lambda q, cut: floors.majority(q),
        "user_item_bias": lambda q, cut: floors.bias(q, cut, q.item_id),
        "item_cosine": lambda q, cut: floors.cosine(q, cut, q.item_id),
        "ease": lambda q, cut: floors.ease(q, cut, q.item_id),
    }.items():
        scored = [(a, score(a.question, sample.cuts[a.cut])) for a in sample.asked]
        part = [(a, {o: s.get(o, -np.inf) for o in a.question.options}) for a, s in scored if s is not None]
        some = Sample(sample.users, sample.cuts, [a for a, _ in part], sample.stranger)
        if part:
            values[name] = user_accuracy(some, [s for _, s in part], tasks)
    return values


def _summary(values: np.ndarray, tasks: Sequence[str], seed: int) -> dict:
    """Mean and interval of each task that a method answers, and of their mean if it answers all."""
    answered = [i for i in range(len(tasks)) if not np.isnan(values[:, i]).all()]
    kept = values[:, answered]
    mean, (low, high) = mean_over_users(kept), interval(kept, seed=seed)
    names = [tasks[i] for i in answered] + ["mean"]
    return {
        name: {"acc": round(float(mean[i]), 4), "low": round(float(low[i]), 4), "high": round(float(high[i]), 4)}
        for i, name in enumerate(names)
        if name != "mean" or len(answered) == len(tasks)
    }


def _tokens(name: str, tokens: dict[str, float], cut: dict[str, int]) -> dict:
    if name not in tokens:
        return {}
    return {"tokens": token_counts(tokens[name], tokens["no_history"], cut[name])}


def _paired(values: dict[str, np.ndarray], ours: str, tasks: Sequence[str], seed: int) -> dict:
    """Ours minus each comparison, user by user."""
    return {
        f"{ours} - {name}": _summary(values[ours] - values[name], tasks, seed) for name in COMPARISONS if name in values
    }


def sizes(sample: Sample, tasks: Sequence[str]) -> dict:
    """Users, cuts, and how many answers each task counts."""
    keys = {
        (a.cut, a.question.task, a.question.group if a.question.options[0] == YES else n)
        for n, a in enumerate(sample.asked)
    }
    counted = {task: sum(1 for _, t, _ in keys if t == task) for task in tasks}
    return {"users": len(sample.users), "cuts": len(sample.cuts), "answers": counted}


def provenance(domain: Domain, seed: int) -> dict:
    """How to get this result again: command, seed, code, data, versions, date."""
    digest = hashlib.sha256()
    for user in sorted(domain.histories):
        for event in domain.histories[user].events:
            digest.update(repr((user, event)).encode())
    return {
        "command": "persona " + " ".join(sys.argv[1:]),
        "seed": seed,
        "git_hash": git_hash(),
        "data_sha256": digest.hexdigest(),
        "versions": {name: version(name) for name in ("torch", "transformers", "persona")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_hash() -> str:
    """The commit of this code, marked where the working tree differs; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if status.strip() else "")
