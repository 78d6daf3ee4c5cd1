"""The tables of UQA: accuracy per sub-task, dimension and overall, of user tokens and of all that they compete with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import numpy as np

from persona.errors import DataError
from persona.evaluation.cutting import beginning, size
from persona.evaluation.floors import Floors
from persona.evaluation.intervals import interval
from persona.evaluation.likelihood import Request, option_scores
from persona.evaluation.methods import Methods, cut_note, draw_sample, questions_cut, token_counts, tokens_of
from persona.evaluation.runner import floor_values, provenance, sizes, user_accuracy
from persona.evaluation.uqa.tasks import DIMENSIONS
from persona.history import History
from persona.history.render import render_history
from persona.injection import PersonalizedLM
from persona.training.recipe import Domain

SEED = 0
"""Of questions, controls and intervals: the same in every table, so that tables can be compared row by row."""
LENGTHS = (5, 20)
"""Newest events that the encoder may read, beside the whole window."""
TEXT_TOKENS = (128, 256)
"""Budgets of the text baselines, beside the whole window."""
COMPARED = ("learned_prompt", "no_history", "text_full")
"""Baselines that user tokens are compared with user by user, beside another user's tokens."""
VERSION = 1
"""Of every sub-task; raised when its questions change."""


def soft_table(
    domain: Domain,
    model: PersonalizedLM,
    run,
    baselines: dict | None,
    say: Callable[[str], None],
    control: PersonalizedLM | None = None,
) -> dict:
    """User tokens by number of tokens and by length of the history, beside another user's tokens.

    `control` is a learned prompt, where that of the baselines is of another kind of injection. `baselines` is the
    result of `baselines_table`, for differences user by user. Raises `DataError` when it is of other questions or
    other users.
    """
    table = Table(domain, model, say)
    if baselines is not None and (baselines["n"], baselines["configs"]) != (table.sizes, table.questions):
        raise DataError(
            "the baselines in this folder are of other questions or users; give the changed run its own --out"
        )
    methods, most = table.methods, model.encoder.config.tokens
    for count in methods.counts:
        table.ask(f"soft_k{count}", methods.soft(model, methods.states, count))
    table.ask("shuffled_user", methods.soft(model, [methods.states[i] for i in table.sample.stranger], most))
    if control is not None:
        table.learned_prompt(control)
    ours = f"soft_k{most}"
    lengths = {str(domain.recipe.window): table.summary(table.values[ours])}
    for length in (n for n in LENGTHS if n < domain.recipe.window):
        states = model.encoder.read([cut.history.last(length) for cut in table.sample.cuts])
        lengths[str(length)] = table.summary(table.score(methods.soft(model, states, most)))
    result = table.result("uqa", encoder_config=asdict(model.encoder.config), run=asdict(run))
    others = {"shuffled_user": table.values["shuffled_user"]}
    if baselines is not None:
        others |= {name: np.array(baselines["per_user"][name], float) for name in COMPARED}
    if run.injection != "soft_prompt":
        others.pop("learned_prompt", None)  # which is a soft prompt
    if control is not None:
        others["learned_prompt"] = table.values["learned_prompt"]
    paired = {f"{ours} - {name}": table.summary(table.values[ours] - values) for name, values in others.items()}
    lengths = dict(sorted(lengths.items(), key=lambda pair: int(pair[0])))
    return {**result, "paired": paired, "lengths": lengths}


def baselines_table(domain: Domain, control: PersonalizedLM, say: Callable[[str], None]) -> dict:
    """The LLM alone, the learned prompt (`control`), the history as text, and floors without an LLM."""
    table = Table(domain, control, say)
    table.values |= floor_values(domain, table.sample, table.tasks, Floors(domain))
    methods = table.methods
    table.ask("no_history", methods.plain())
    table.learned_prompt(control)
    for budget in TEXT_TOKENS:
        table.ask(f"text_{budget}", methods.text(methods.budget_texts(budget)))
    table.ask(f"retrieved_{TEXT_TOKENS[0]}", list(retrieved(methods, TEXT_TOKENS[0])))
    table.ask("text_full", methods.text(methods.texts))
    return table.result("uqa-baselines")


def retrieved(methods: Methods, budget: int) -> Iterator[Request]:
    """For each question the events that share most words with it (BM25), in time order, up to `budget` tokens.

    An event that alone is longer is passed over; where all are, the beginning of the best is taken.
    """
    import bm25s

    sample, sources, tokenizer = methods.sample, methods.domain.recipe.sources, methods.model.template.tokenizer
    lines = [render_history(cut.history, sources).split("\n") for cut in sample.cuts]
    sizes = [[size(line, tokenizer) for line in own] for own in lines]
    index: dict[int, bm25s.BM25] = {}
    for asked in sample.asked:
        own = lines[asked.cut]
        if asked.cut not in index:
            index[asked.cut] = bm25s.BM25()
            index[asked.cut].index(bm25s.tokenize(own, show_progress=False), show_progress=False)
        words = bm25s.tokenize([asked.question.prompt], show_progress=False, return_ids=False)[0]
        scores = index[asked.cut].get_scores(words) if words else np.zeros(len(own))
        ranked = sorted(range(len(own)), key=lambda i: (-scores[i], -i))  # the newest of equals first
        most = min(budget, methods.rooms[asked.cut])
        chosen, left = [], most
        for i in ranked:
            if sizes[asked.cut][i] <= left:
                chosen.append(i)
                left -= sizes[asked.cut][i]
        text = "\n".join(own[i] for i in sorted(chosen)) if chosen else beginning(own[ranked[0]], most, tokenizer)
        yield Request(f"{text}\n{asked.question.prompt}", asked.question.options, cut=not chosen)


class Table:
    """Rows of one result file: asks a model all questions of the test users and keeps the accuracy of each user."""

    def __init__(self, domain: Domain, model: PersonalizedLM, say: Callable[[str], None]):
        self.domain, self.model, self.say, self.start = domain, model, say, time.perf_counter()
        self.sample = draw_sample(domain, domain.test, SEED)
        self.tasks = list(domain.recipe.questions)
        self.sizes = sizes(self.sample, self.tasks)
        self.questions = {task: asdict(spec) for task, spec in domain.recipe.questions.items()}
        self.methods = Methods(domain, model, None, self.sample)
        self.values: dict[str, np.ndarray] = {}
        self.tokens: dict[str, float] = {}
        self.cut: dict[str, int] = {}
        self._plain = tokens_of(model, self.methods.plain())

    def score(self, requests: Sequence[Request], model: PersonalizedLM | None = None) -> np.ndarray:
        """Accuracy `[users, tasks]` of the table's model or another, NaN where a user was not asked."""
        scores = option_scores(model or self.model, requests)
        return user_accuracy(self.sample, [dict(zip(r.options, s)) for r, s in zip(requests, scores)], self.tasks)

    def learned_prompt(self, control: PersonalizedLM) -> None:
        """Adds the row of a model trained on empty histories."""
        nobody = control.encoder.read([History("nobody")])[0]
        states = [nobody] * len(self.sample.cuts)
        self.ask("learned_prompt", self.methods.soft(control, states, control.encoder.config.tokens), control)

    def ask(self, name: str, requests: Sequence[Request], model: PersonalizedLM | None = None) -> None:
        """Adds a row, of the table's model or another."""
        self.values[name], self.tokens[name] = self.score(requests, model), tokens_of(model or self.model, requests)
        self.cut[name] = questions_cut(requests)
        mean = self.summary(self.values[name])["mean"]["acc"]
        self.say(f"{name:>18}  mean {mean:.3f}  tokens {self.tokens[name]:.0f}")
        if self.cut[name]:
            self.say(cut_note(name, self.cut[name], len(requests)))

    def summary(self, values: np.ndarray) -> dict:
        """See `summary`."""
        return summary(values, self.tasks)

    def _row(self, name: str) -> dict:
        row = self.summary(self.values[name])
        if name in self.tokens:
            row["tokens"] = token_counts(self.tokens[name], self._plain, self.cut[name])
        return row

    def result(self, kind: str, **config) -> dict:
        """All rows, with lm-evaluation-harness's keys around them."""
        recipe, encoder = self.domain.recipe, self.model.encoder
        source = provenance(self.domain, SEED)
        return {
            "kind": kind,
            "results": {name: self._row(name) for name in self.values},
            "per_user": {name: _listed(values) for name, values in self.values.items()},
            "configs": self.questions,
            "n-samples": {task: {"original": n, "effective": n} for task, n in self.sizes["answers"].items()},
            "n": self.sizes,
            "higher_is_better": {task: {"acc": True} for task in self.tasks},
            "config": {
                "domain": recipe.name,
                "window": recipe.window,
                "letters": recipe.letters,
                "backbone": encoder.config.backbone,
                "head": encoder.config.head,
                "tokens": encoder.config.tokens,
                "backbone_parameters": sum(p.numel() for p in encoder.backbone.parameters()),
                "encoder_parameters": sum(p.numel() for p in encoder.parameters()),
                "llm_parameters": sum(p.numel() for p in self.model.llm.parameters()),
                "interval": "percentile bootstrap over users, 95%, 2000 resamples",
                **config,
            },
            "total_evaluation_time_seconds": round(time.perf_counter() - self.start, 1),
            **source,
            "versions_of_libraries": source["versions"],
            "versions": dict.fromkeys(self.tasks, VERSION),
        }


def summary(values: np.ndarray, tasks: Sequence[str]) -> dict:
    """Mean and interval over users of accuracies `[users, tasks]`: of each sub-task, of each dimension, and of all.

    A dimension is the mean of its sub-tasks, and `mean` that of all sub-tasks; what is incomplete is left out.
    """
    answered = [i for i in range(len(tasks)) if not np.isnan(values[:, i]).all()]
    groups = {tasks[i]: [i] for i in answered}
    for name, members in [*DIMENSIONS.items(), ("mean", tasks)]:
        index = [tasks.index(task) for task in members if task in tasks]
        if index and set(index) <= set(answered):
            groups[name] = index

    def statistic(part: np.ndarray) -> np.ndarray:
        means = np.full(part.shape[1], np.nan)
        means[answered] = np.nanmean(part[:, answered], axis=0)
        return np.array([means[index].mean() for index in groups.values()])

    mean, (low, high) = statistic(values), interval(values, statistic, seed=SEED)
    return {
        name: {"acc": round(float(a), 4), "low": round(float(b), 4), "high": round(float(c), 4)}
        for name, a, b, c in zip(groups, mean, low, high)
    }


def _listed(values: np.ndarray) -> list[list[float | None]]:
    """Accuracy `[users, tasks]` for JSON, None where a user was not asked."""
    return [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in values]
