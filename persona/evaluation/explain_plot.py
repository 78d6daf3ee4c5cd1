"""Draws an `Explanation`: a line for each event, its attention beside what is lost without it."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona.evaluation.explain import Explanation
from persona.evaluation.plots import LINE, POINTS, STYLE, limits, shorten
from persona.history import Event, SourceSpec
from persona.history.render import render_event

WIDTH = 720  # of the figure, in points
TEXT, ATTENTION, FALL, GAP, EDGE = 270, 150, 246, 36, 14  # widths of the columns and of what lies between them
TOP, BOTTOM = 94, 38  # heights above and below the bars
INK, MUTED, GRID = "#1b1f24", "#5b6470", "#d9dde3"  # as on the results page in daylight
LOOK, FOR, AGAINST = "#6b7480", "#0072b2", "#c04e00"
STYLE = STYLE | {
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "axes.labelsize": 9,
    "grid.color": GRID,
}


def plot_explanation(
    explanation: Explanation, path: str | Path, sources: Mapping[str, SourceSpec] | None = None, most: int = 30
) -> Path:
    """Writes a picture in the format of the file's ending (png, svg, pdf) and returns its path.

    Events stand in order of time, the newest last, written by the line templates of a recipe's `sources`; those of
    other sources by source and text. Of more than `most` events, those are drawn whose leave-one-out is farthest from
    0. A letter that Matplotlib's fonts (`font.family`) lack is drawn as a box. Raises `RecipeError` for a line template
    that does not fit an event, and Matplotlib's `ValueError` for a format that it cannot write.
    """
    drawn = _drawn(explanation.leave_one_out, most)
    lines = [shorten(event_line(explanation.events[i], sources or {}), TEXT - EDGE - 22) for i in drawn]
    path = Path(path)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        height = TOP + LINE * max(1, len(drawn)) + BOTTOM
        figure = Figure(figsize=(WIDTH / POINTS, height / POINTS), dpi=2 * POINTS, facecolor="white")
        _head(figure, explanation, len(drawn))
        looks = _bars(figure, TEXT, ATTENTION, explanation.attention[drawn], [LOOK] * len(drawn))
        looks.set_yticks(range(len(drawn)), lines)
        looks.set_xlim(0, 1.05 * max(explanation.attention[drawn], default=0) or 1)
        looks.set_xlabel("share of attention")
        falls = explanation.leave_one_out[drawn]
        colours = [FOR if fall > 0 else AGAINST for fall in falls]
        change = _bars(figure, TEXT + ATTENTION + GAP, FALL, falls, colours)
        change.set_yticks([])
        change.axvline(0, color=MUTED, linewidth=0.8)
        change.set_xlim(limits([(0.0,), *((fall,) for fall in falls)]))
        change.set_xlabel(f"fall of the {explanation.measure} without the event")
        figure.savefig(path)
    return path


def event_line(event: Event, sources: Mapping[str, SourceSpec]) -> str:
    """An event in one line that can be drawn: no control characters, none that turn the direction of text."""
    line = _clean(render_event(event, sources[event.source])) if event.source in sources else ""
    facts = ", ".join(f"{name} {value}" for name, value in event.attributes.items() if value is not None)
    return line or _clean(f"{event.source}: {event.text or event.item_id or facts}")


def _clean(text: str) -> str:
    visible = (" " if letter.isspace() else letter for letter in text if letter.isspace() or not _is_control(letter))
    return " ".join("".join(visible).split())


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter).startswith("C")


def _drawn(leave_one_out: np.ndarray, most: int) -> list[int]:
    """Indices of the `most` events that matter most, in order; the newer of two that matter alike."""
    newest_first = np.arange(len(leave_one_out))[::-1]
    ranked = newest_first[np.argsort(-np.abs(leave_one_out[newest_first]), kind="stable")]
    return sorted(ranked[:most].tolist())


def _head(figure: Figure, explanation: Explanation, drawn: int) -> None:
    """Question and answer, then the numbers in a line, then what the columns show."""
    height, total = figure.get_figheight() * POINTS, len(explanation.events)
    agreement = explanation.agreement
    read = f"the newest {total}" if explanation.truncated else f"{total}"
    numbers = [
        f"{explanation.measure} {explanation.score:.3g}",
        "agreement undefined"
        if agreement is None
        else f"agreement (Spearman) {agreement.correlation:+.2f}, p = {agreement.p_value:.2g}",
        f"attention elsewhere {explanation.elsewhere:.2f}",
        f"{drawn} of {read} events" if drawn < total else f"{read} events",
    ]

    def write(x: float, down: float, text: str, **style) -> None:
        figure.text(x / WIDTH, 1 - down / height, text, va="top", **style)

    for down, text in ((10, explanation.instruction), (27, f"→ {explanation.answer}")):
        write(EDGE, down, shorten(_clean(text), (WIDTH - 2 * EDGE) / 1.5), fontsize=12, fontweight="bold")
    write(EDGE, 47, "  ·  ".join(numbers), color=MUTED)
    write(TEXT, 74, "attention", fontweight="bold", color=LOOK)
    left = TEXT + ATTENTION + GAP
    write(left, 74, "spoke against", fontweight="bold", color=AGAINST)
    write(left + FALL, 74, "spoke for the answer", fontweight="bold", color=FOR, ha="right")


def _bars(figure: Figure, left: float, width: float, lengths: Sequence[float], colours: Sequence[str]) -> Axes:
    """Axes with a bar a line, the first on top."""
    height, count = figure.get_figheight() * POINTS, max(1, len(lengths))
    axes = figure.add_axes((left / WIDTH, BOTTOM / height, width / WIDTH, LINE * count / height))
    axes.barh(range(len(lengths)), lengths, color=colours, height=0.7)
    axes.set_ylim(count - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=4)
    axes.set_axisbelow(True)
    axes.grid(axis="x", linewidth=0.6)
    return axes
