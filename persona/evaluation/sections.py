"""What the results page shows. Each section is a function of all results.

It returns the section's text, figures and tables, or one sentence that says why it has nothing to show.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from persona.evaluation.plots import Curve, Dots, curve_plot, dot_plot, limits
from persona.evaluation.report import decimals
from persona.evaluation.result_files import Result, Value

DIMENSIONS = ("sequence understanding", "action prediction", "interest perception")
METHODS = {
    "learned_prompt": "learned prompt",
    "shuffled_user": "shuffled user",
    "no_history": "no history",
    "chance": "chance",
    "majority": "majority answer (no LM)",
    "item_cosine": "item cosine (no LM)",
    "user_item_bias": "user + item bias (no LM)",
    "ease": "EASE (no LM)",
    "item_knn": "item kNN",
    "text_full": "full text",
}
OURS, CONTROL, TEXT, FLOOR = range(4)  # styles of `plots`
RUN_STYLES = (0, 4, 5, 3, 1, 2)  # in this order for the curves of several runs
ACCURACY = "accuracy (share of right answers)"
UNKNOWN = "n/a"
NOT_ANSWERED = "–"


class Cell(NamedTuple):
    """What stands in a table; `strong` where an interval excludes 0."""

    text: str
    interval: str = ""
    strong: bool = False


class Table(NamedTuple):
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


class Section(NamedTuple):
    title: str
    text: str
    figures: Sequence[str] = ()
    tables: Sequence[Table] = ()


def _headline(results: Sequence[Result]) -> tuple | str:
    listed = list(_listed(results))
    if not listed:
        return "no file has accuracies"
    measures = [m for m in (*DIMENSIONS, "mean") if any(m in r.rows[row] for r, row in listed)]
    rows = [
        [Cell(r.name), Cell(_method(row)), *_cells(r.rows[row], measures), Cell(_tokens(r.prompt_tokens(row)))]
        for r, row in listed
    ]
    text = (
        "Accuracy with 95% intervals. Of each run the K (number of user embeddings) of the best mean is listed, chosen "
        "on these same users, so that its mean is a little optimistic. The shuffled user is the control that gets "
        "another user's embeddings, the learned prompt one that gets no user at all. "
        f"{NOT_ANSWERED}: the method does not answer all of it; {UNKNOWN}: the file holds no number."
    )
    return text, (), [Table(["run", "method", *measures, "prompt tokens"], rows)]


def _seeds(results: Sequence[Result]) -> tuple | str:
    rows, groups = [], _groups(results)
    measures = [m for m in (*DIMENSIONS, "mean") if any(m in row for r in results for row in r.rows.values())]
    for name, those in groups.items():
        if len(those) < 2:
            continue
        for row in dict.fromkeys(row for r in those for row in r.rows):
            values = {m: [r.rows[row][m].value for r in those if m in r.rows.get(row, {})] for m in measures}
            known = {m: [v for v in vs if not math.isnan(v)] for m, vs in values.items()}
            cells = [Cell(f"{mean(v):.3f} ± {stdev(v):.3f}" if len(v) > 1 else NOT_ANSWERED) for v in known.values()]
            rows.append([Cell(name), Cell(_method(row)), Cell(str(sum(row in r.rows for r in those))), *cells])
    if not rows:
        return "no two files are seeds of one run, which have one name but for -s0, -s1, ... and one configuration"
    text = "Mean and standard deviation of the accuracy over the seeds of each run."
    return text, (), [Table(["run", "method", "seeds", *measures], rows)]


def _sub_tasks(results: Sequence[Result]) -> tuple | str:
    listed = list(_listed(results))
    tasks = _tasks(r.rows[row] for r, row in listed)
    if not tasks:
        return "no file has accuracies of sub-tasks"
    lines: dict[tuple[str, int], list[dict[str, Value]]] = {}
    for r, row in listed:
        lines.setdefault((_line_label(results, r, row), _style(row)), []).append(r.rows[row])
    shown = [m for m in ("mean", *tasks) if any(m in row for rows in lines.values() for row in rows)]
    span = limits(row[m] for rows in lines.values() for row in rows for m in shown if m in row)
    figures = []
    for m in shown:
        dots = [Dots(label, style, [row[m] for row in rows if m in row]) for (label, style), rows in lines.items()]
        figures.append(dot_plot(_words(m), [d for d in dots if d.values], ACCURACY, span))
    table = [[Cell(r.name), Cell(_method(row)), *_cells(r.rows[row], tasks)] for r, row in listed]
    text = "Dots are accuracies, lines their 95% intervals; several dots in one line are the seeds of one run."
    return text, figures, [Table(["run", "method", *map(_words, tasks)], table)]


def _by_tokens(results: Sequence[Result]) -> tuple | str:
    def points(r: Result, rows: Iterable[str]) -> list:
        return [(t, r.rows[row]) for row in rows if (t := r.prompt_tokens(row))]

    ours = [(r.group, style, points(r, r.ours.values())) for r, style in _styled(results)]
    others, baselines = [], _of_kind(results, "uqa-baselines")
    for r in baselines:
        prefix = f"{r.name}, " if len(baselines) > 1 else ""
        for kind in ("text", "retrieved"):
            rows = [row for row in r.rows if row.startswith(f"{kind}_")]
            others.append((f"{prefix}{kind}", TEXT, points(r, rows)))
        single = [row for row in r.rows if _style(row) == CONTROL]
        others += [(prefix + _method(row), CONTROL, points(r, [row])) for row in single]
    if not any(p for *_, p in ours) or not any(p for _, style, p in others if style == TEXT):
        return "it needs the prompt tokens of a uqa file and of text rows, which a uqa-baselines file has"
    text = "What a user costs in the prompt: embeddings at each K against the history as text at each length."
    return _figured(text, _panels([*ours, *others], "mean prompt length (tokens)"))


def _by_length(results: Sequence[Result]) -> tuple | str:
    if not any(len(r.lengths) > 1 for r in results):
        return "no file has accuracies at two lengths of history or more"
    lines = [(r.group, style, list(r.lengths.items())) for r, style in _styled(results)]
    text = "Accuracy when only the newest events of each user are given."
    return _figured(text, _panels(lines, "history (newest events)"))


def _by_k(results: Sequence[Result]) -> tuple | str:
    if not any(len(r.ours) > 1 for r in results):
        return "no file has two numbers of embeddings or more"
    lines = [(r.group, style, [(k, r.rows[row]) for k, row in r.ours.items()]) for r, style in _styled(results)]
    return _figured("Accuracy with the first K embeddings of each user.", _panels(lines, "user embeddings K (tokens)"))


def _by_size(results: Sequence[Result]) -> tuple | str:
    figures = []
    for key, axis in (("encoder_parameters", "user encoder (parameters)"), ("llm_parameters", "LLM (parameters)")):
        lines = [
            (r.group, style, [(size, r.rows[r.best])])
            for r, style in _styled(results)
            if r.best and (size := r.size(key))
        ]
        if len({points[0][0] for *_, points in lines}) > 1:
            figures += _panels(lines, axis)
    if not figures:
        return "no two runs state different numbers of parameters of encoder or LLM"
    return "Accuracy at the best K of each run against the size of its models.", figures


def _paired(results: Sequence[Result]) -> tuple | str:
    entries = [(r, *_sides(key), row) for r in results for key, row in r.paired.items()]
    if not entries:
        return "no file has paired differences"
    figures, span = [], limits([*(row["mean"] for *_, row in entries if "mean" in row), Value(0.0)])
    for other in dict.fromkeys(other for _, _, other, _ in entries):
        lines: dict[str, list[Value]] = {}
        for r, ours, against, row in entries:
            if against == other and "mean" in row:
                lines.setdefault(f"{r.group}, {_method(ours)}", []).append(row["mean"])
        if lines:
            dots = [Dots(label, OURS, values) for label, values in lines.items()]
            figures.append(
                dot_plot(f"ours minus {_method(other)}", dots, "difference in mean accuracy", span, zero=True)
            )
    measures = ["mean", *DIMENSIONS, *_tasks(row for *_, row in entries)]
    measures = [m for m in measures if any(m in row for *_, row in entries)]
    rows = [
        [Cell(r.name), Cell(f"{_method(ours)} minus {_method(other)}"), *_cells(row, measures, signed=True)]
        for r, ours, other, row in entries
    ]
    text = (
        "Differences in accuracy user by user, with 95% intervals. ▲ and ▼, and filled dots, mark those whose interval "
        "excludes 0. Of differences that are truly 0, about one in twenty is marked all the same."
    )
    return text, figures, [Table(["run", "difference", *map(_words, measures)], rows)]


def _ranking(results: Sequence[Result]) -> tuple | str:
    tables = []
    for r in _of_kind(results, "ranking"):
        metrics = list(dict.fromkeys(m for row in r.rows.values() for m in row))
        rows = [[Cell(_method(name)), *_cells(row, metrics)] for name, row in r.rows.items()]
        tables.append(Table(["model", *metrics], rows, r.name))
    text = "How well the next event is found among all items, with 95% intervals."
    return (text, (), tables) if tables else "no file is of kind ranking"


def _provenance(results: Sequence[Result]) -> tuple:
    keys = ("command", "seed", "git_hash", "data_sha256", "date", "n", "n-samples", "versions", "config")
    tables = []
    for r in results:
        facts = {"file": r.file, "kind": r.kind} | {key: r.data[key] for key in keys if key in r.data}
        tables.append(Table((), [[Cell(key.replace("_", " ")), Cell(_plain(v))] for key, v in facts.items()], r.name))
    return "How each result was made.", (), tables


SECTIONS: dict[str, Callable[[Sequence[Result]], tuple | str]] = {
    "Headline": _headline,
    "Several seeds": _seeds,
    "Accuracy by sub-task": _sub_tasks,
    "Accuracy against prompt tokens": _by_tokens,
    "Accuracy against history length": _by_length,
    "Accuracy against number of embeddings": _by_k,
    "Accuracy against model size": _by_size,
    "Paired differences": _paired,
    "Pre-training: ranking quality": _ranking,
    "Provenance": _provenance,
}


def build_sections(results: Sequence[Result]) -> tuple[list[Section], list[tuple[str, str]]]:
    """The sections that have something to show, and for each other one its title and the reason."""
    built = {title: build(results) for title, build in SECTIONS.items()}
    shown = [Section(title, *found) for title, found in built.items() if not isinstance(found, str)]
    return shown, [(title, found) for title, found in built.items() if isinstance(found, str)]


def _of_kind(results: Sequence[Result], kind: str) -> list[Result]:
    return [r for r in results if r.kind == kind]


def _groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Runs by their name without the seed."""
    groups: dict[str, list[Result]] = {}
    for r in _of_kind(results, "uqa"):
        groups.setdefault(r.group, []).append(r)
    return groups


def _styled(results: Sequence[Result]) -> list[tuple[Result, int]]:
    """Runs, each with the style that its group has in all curves."""
    order = list(_groups(results))
    return [(r, RUN_STYLES[order.index(r.group) % len(RUN_STYLES)]) for r in _of_kind(results, "uqa")]


def _listed(results: Sequence[Result]) -> Iterable[tuple[Result, str]]:
    """The rows of the main tables: of each run its best K and all controls, then every baseline."""
    for r in _of_kind(results, "uqa"):
        yield from ((r, row) for row in filter(None, (r.best, *(row for row in r.rows if row not in r.ours.values()))))
    for r in _of_kind(results, "uqa-baselines"):
        yield from ((r, row) for row in r.rows)


def _panels(lines: Iterable[tuple[str, int, list[tuple[float, dict[str, Value]]]]], axis: str) -> list[str]:
    """One panel for the mean and each dimension, or for each sub-task where no file has those."""
    lines = list(lines)
    rows = [row for *_, points in lines for _, row in points]
    measures = [m for m in ("mean", *DIMENSIONS) if any(m in row for row in rows)] or _tasks(rows)
    span = limits(row[m] for row in rows for m in measures if m in row)
    figures = []
    for m in measures:
        curves = [Curve(label, style, [(x, row[m]) for x, row in points if m in row]) for label, style, points in lines]
        if curves := [c for c in curves if any(not math.isnan(v.value) for _, v in c.points)]:
            figures.append(curve_plot(_words(m), curves, axis, "accuracy (share right)", span))
    return figures


def _figured(text: str, figures: list[str]) -> tuple | str:
    return (text, figures) if figures else "the files hold no number for it"


def _tasks(rows: Iterable[dict[str, Value]]) -> list[str]:
    """All measures that are sub-tasks, in the order of the files."""
    return list(dict.fromkeys(m for row in rows for m in row if m not in (*DIMENSIONS, "mean")))


def _method(row: str) -> str:
    """A row's name for people."""
    if match := re.fullmatch(r"soft_k(\d+)", row):
        return f"K = {match[1]}"
    if match := re.fullmatch(r"(text|retrieved)_(\d+)", row):
        return f"{match[1]}, {match[2]} tokens"
    return METHODS.get(row, _words(row))


def _line_label(results: Sequence[Result], r: Result, row: str) -> str:
    """A row's label in a figure: with the name of its run where the row alone would not say whose it is."""
    method = "best K" if row == r.best else _method(row)
    return method if r.kind != "uqa" and len(_of_kind(results, r.kind)) == 1 else f"{r.group}, {method}"


def _style(row: str) -> int:
    if row.startswith("soft_k"):
        return OURS
    if row in ("shuffled_user", "learned_prompt", "no_history"):
        return CONTROL
    return TEXT if row.startswith(("text_", "retrieved_")) else FLOOR


def _sides(key: str) -> tuple[str, str]:
    ours, _, other = key.partition(" - ")
    return ours, other


def _words(name: str) -> str:
    return name.replace("_", " ")


def _tokens(number: float | None) -> str:
    return NOT_ANSWERED if number is None else f"{number:.0f}"


def _cells(row: dict[str, Value], measures: Sequence[str], signed: bool = False) -> list[Cell]:
    return [_cell(row[m], signed) if m in row else Cell(NOT_ANSWERED) for m in measures]


def _cell(value: Value, signed: bool) -> Cell:
    """Three decimals; differences have a sign, and a mark where their interval excludes 0."""
    if math.isnan(value.value):
        return Cell(UNKNOWN)
    known = not (math.isnan(value.low) or math.isnan(value.high))
    interval = f"[{decimals(value.low, signed)}, {decimals(value.high, signed)}]" if known else ""
    text = decimals(value.value, signed)
    if signed and value.excludes_zero:
        return Cell(f"{'▲' if value.low > 0 else '▼'} {text}", interval, strong=True)
    return Cell(text, interval)


def _plain(value: object) -> str:
    """JSON as people would write it: `users: 95, cuts: 491`."""
    if isinstance(value, dict):
        return ", ".join(
            f"{k}: ({_plain(v)})" if isinstance(v, dict) else f"{k}: {_plain(v)}" for k, v in value.items()
        )
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)
