"""Figures of the results page as inline SVG: dots with intervals, and curves with labels at their ends.

Every figure is one panel, narrow enough for a phone; the page lays panels side by side where there is room. Drawn
without a window system. Colours are CSS variables of the page, so that figures follow its light and dark themes, and
each colour goes with a marker of its own.
"""

from __future__ import annotations

import html
import io
import math
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from persona.evaluation.result_files import Value

WIDTH = 400  # of a panel, in SVG units; a phone shows about 360 of them
POINTS = 72  # SVG units to an inch
LINE = 15  # height of one line of text with its gap
LABEL = 165  # most that a label beside the axes may take of the width
# Stand-ins that Matplotlib can draw with; `_svg` turns them into the page's colours.
INK, MUTED, GRID = "#0a0b10", "#0a0b11", "#0a0b12"
COLOURS = tuple(f"#0a0b{number:02x}" for number in range(6))
MARKERS = ("o", "D", "s", "^", "v", "P")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {c: f"c{n}" for n, c in enumerate(COLOURS)}
STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",  # real text: sharp, searchable, read aloud
    "text.parse_math": False,  # a run's name may hold a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
}


class Dots(NamedTuple):
    """One line of a dot plot: a dot for each value, such as one for each seed."""

    label: str
    style: int
    values: Sequence[Value]


class Curve(NamedTuple):
    """Values over x. Curves of one label (such as seeds of one run) share a style and are labelled once."""

    label: str
    style: int
    points: Sequence[tuple[float, Value]]


def limits(values: Iterable[Value]) -> tuple[float, float]:
    """The range that holds all values and intervals, with a margin, for panels that share an axis."""
    numbers = [n for value in values for n in value if not math.isnan(n)] or [0.0, 1.0]
    margin = 0.06 * (max(numbers) - min(numbers)) or 0.05
    return min(numbers) - margin, max(numbers) + margin


def dot_plot(title: str, rows: Sequence[Dots], axis: str, span: tuple[float, float], zero: bool = False) -> str:
    """SVG of one dot with its interval per value and one line per row.

    `zero` draws the line of no difference, and hollow dots where the interval holds 0.
    """
    gutter = 14 + max(_width(shorten(row.label)) for row in rows)
    sizes = [max(1.0, 0.6 * len(row.values)) for row in rows]
    middles = [sum(sizes[:line]) + size / 2 for line, size in enumerate(sizes)]
    with _drawing():
        figure, axes = _panel(left=gutter, right=12, height=LINE * sum(sizes) + 8)
        if zero:
            axes.axvline(0, color=MUTED, linewidth=1)
        for row, size, middle in zip(rows, sizes, middles):
            count = len(row.values)
            lines = [middle + 0.75 * size * ((seed + 0.5) / count - 0.5) for seed in range(count)]
            for filled in (True, False):
                points = [(y, v) for y, v in zip(lines, row.values) if filled == (not zero or v.excludes_zero)]
                _marks(axes, points, row.style, horizontal=True, filled=filled)
        axes.set(xlim=span, ylim=(sum(sizes) + 0.2, -0.2), xlabel=axis)
        axes.set_yticks(middles, [shorten(row.label) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", linewidth=0.6)
        _title(figure, title)
        return _svg(figure, title)


def curve_plot(title: str, curves: Sequence[Curve], axis: str, y_axis: str, span: tuple[float, float]) -> str:
    """SVG of curves over a logarithmic x axis, each labelled at its right end without overlap."""
    labels = list(dict.fromkeys(curve.label for curve in curves))
    gutter = 20 + max(_width(shorten(label)) for label in labels)
    plot_height = max(180, LINE * len(labels))
    with _drawing():
        figure, axes = _panel(left=48, right=gutter, height=plot_height)
        axes.set_xscale("log")
        places = [x for curve in curves for x, _ in curve.points]
        ratio = max(max(places) / min(places), 1.5)
        for number, curve in enumerate(curves):
            # Moved a little to the side, or the intervals of all curves would lie on one another.
            move = ratio ** (0.03 * (number - (len(curves) - 1) / 2) / max(1, len(curves) - 1))
            _marks(axes, sorted((x * move, value) for x, value in curve.points), curve.style, horizontal=False)
        axes.set(xlim=(min(places) / ratio**0.08, max(places) * ratio**0.08), ylim=span, xlabel=axis, ylabel=y_axis)
        ticks = _apart(places, ratio)
        axes.set_xticks(ticks, [short_number(x) for x in ticks])
        axes.set_xticks([], minor=True)
        axes.locator_params(axis="y", nbins=6)
        axes.grid(axis="y", linewidth=0.6)
        _end_labels(axes, curves, LINE / plot_height)
        _title(figure, title)
        return _svg(figure, title)


@lru_cache(maxsize=4096)  # the panels of a page share their labels
def shorten(text: str, width: float = LABEL) -> str:
    """The text in one line of at most `width` SVG units; its middle goes, since names differ at their ends."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    short, kept = text, min(len(text), 100)
    while _width(short) > width or len(short) > 100:
        kept -= 1
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    return short


def _width(text: str) -> float:
    """Width at the size of labels, in SVG units; letters that Matplotlib's font lacks, such as Chinese, are square."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        width = TextToPath().get_text_width_height_descent(text, FontProperties(size=10), ismath=False)[0]
    return width + 4 * sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def short_number(number: float) -> str:
    """1234567 as 1.2M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _panel(left: float, right: float, height: float) -> tuple[Figure, Axes]:
    """A figure of the one width, and its axes of `height` between gutters for text."""
    top, bottom = 34, 38
    total = top + height + bottom
    figure = Figure(figsize=(WIDTH / POINTS, total / POINTS), dpi=POINTS)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((left / WIDTH, bottom / total, (WIDTH - left - right) / WIDTH, height / total))
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    return figure, axes


def _title(figure: Figure, title: str) -> None:
    place = (8 / WIDTH, 1 - 8 / (figure.get_figheight() * POINTS))
    figure.text(*place, shorten(title, 0.7 * WIDTH), fontsize=11, fontweight="bold", va="top", ha="left")


def _marks(
    axes: Axes, points: Sequence[tuple[float, Value]], style: int, horizontal: bool, filled: bool = True
) -> None:
    """Markers with intervals, joined by a line unless horizontal; nothing for values that are not numbers."""
    points = [(place, value) for place, value in points if not math.isnan(value.value)]
    if not points:
        return
    places, numbers = [place for place, _ in points], [v.value for _, v in points]
    ends = [(v.value - v.low, v.high - v.value) for _, v in points]
    lengths = list(zip(*((0.0 if math.isnan(end) else max(0.0, end) for end in pair) for pair in ends)))
    axes.errorbar(
        *((numbers, places) if horizontal else (places, numbers)),
        **{"xerr" if horizontal else "yerr": lengths},
        fmt=MARKERS[style] + ("" if horizontal else "-"),
        color=COLOURS[style],
        markerfacecolor=COLOURS[style] if filled else "none",
        markersize=5,
        linewidth=1.1,
        elinewidth=1.4,
        capsize=0,
    )


def _end_labels(axes: Axes, curves: Sequence[Curve], gap: float) -> None:
    """Labels right of the axes, at least `gap` of the axes' height apart, each tied to the end of its curve."""
    low, high = axes.get_ylim()
    ends: dict[str, tuple[float, float]] = {}
    for curve in curves:
        x, value = max((p for p in curve.points if not math.isnan(p[1].value)), default=(math.nan, Value(math.nan)))
        if not math.isnan(x):
            ends.setdefault(curve.label, (x, value.value))
    names = sorted(ends, key=lambda name: ends[name][1])
    places = [(ends[name][1] - low) / (high - low) for name in names]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else 1.0)
    styles = {curve.label: curve.style for curve in curves}
    for name, place in zip(names, places):
        axes.annotate(
            shorten(name),
            xy=ends[name],
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": COLOURS[styles[name]],
                "linewidth": 0.7,
                "linestyle": ":",
                "relpos": (0, 0.5),
            },
        )


def _apart(places: Iterable[float], ratio: float) -> list[float]:
    """Those of the x values that leave room for their labels."""
    kept: list[float] = []
    for x in sorted(set(places)):
        if not kept or x >= kept[-1] * ratio**0.11:
            kept.append(x)
    return kept


@contextmanager
def _drawing() -> Iterator[None]:
    """Our style, and no warnings about missing letters: the reader's browser has the fonts."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element that can stand in a page beside others: own ids, the page's colours, a name."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # no metadata, with its links and dates
    figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    prefix = f"f{zlib.crc32(text.encode('utf-8', 'replace')):08x}-"
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
