"""The picture of an explanation: what it says, and that no text in it can break it."""

import re
import warnings
from dataclasses import replace
from html import unescape

import numpy as np
import pytest

from persona.evaluation.explain import Agreement, Explanation
from persona.evaluation.explain_plot import AGAINST, FOR, plot_explanation
from persona.history import Event, SourceSpec

QUESTION = "What does this user buy most?"
HOSTILE = (
    "👩‍👩‍👧‍👦 שלום مرحبا",
    "$x_1$ costs $5 and 5$ \\frac{",
    "a\x00b\x07c\x1b[31m\tTab\nnewline",
    "\u202egnp.exe",
    "一二三四五" * 30,
    "W" * 500,
    "<b>&amp; %s {text}",
    "\u200b",
    "",
    None,
)


def explanation(events, leave_one_out=None, **changes):
    events = tuple(events)
    count = len(events)
    falls = np.linspace(-0.1, 0.2, count) if leave_one_out is None else np.array(leave_one_out)
    attention = np.full(count, 0.5 / max(count, 1))
    made = Explanation(QUESTION, "music", "cosine", events, attention, 0.5, falls, 0.41, Agreement(0.3, 0.04))
    return replace(made, **changes)


def texts(path):
    """What an SVG says, in order."""
    return [unescape(text).strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())]


def test_the_plot_says_what_is_in_the_explanation(tmp_path):
    events = [
        Event("search", 1.0, text="tea"),
        Event("profile", attributes={"age": 33.0, "city": None, "tier": "gold"}),
    ]
    path = plot_explanation(
        explanation(events), tmp_path / "two.svg", {"search": SourceSpec("text", "searched {text}")}
    )
    said = texts(path)
    assert QUESTION in said and "→ music" in said
    assert "cosine 0.41  ·  agreement (Spearman) +0.30, p = 0.04  ·  attention elsewhere 0.50  ·  2 events" in said
    assert said.index("searched tea") < said.index("profile: age 33.0, tier gold")
    undefined = texts(plot_explanation(explanation(events, agreement=None), tmp_path / "none.svg"))
    assert any("agreement undefined" in text for text in undefined) and "search: tea" in undefined


def test_the_colour_is_that_of_the_sign(tmp_path):
    events = [Event("search", float(i), text="tea") for i in range(3)]
    for falls, blue, orange in (([1, 2, -1], 2, 1), ([-1, -2, -3], 0, 3), ([0.5, 0.1, 0.2], 3, 0)):
        svg = plot_explanation(explanation(events, falls), tmp_path / "signs.svg").read_text()
        assert svg.count(FOR) - 1 == blue and svg.count(AGAINST) - 1 == orange  # the headings have the colours, too


def test_of_many_events_those_that_matter_are_drawn_in_order(tmp_path):
    events = [Event("search", float(i), text=f"thing {i}") for i in range(50)]
    falls = np.zeros(50)
    falls[[40, 3, 20]] = 0.3, -0.4, 0.2
    path = plot_explanation(explanation(events, falls, truncated=True), tmp_path / "many.svg", most=5)
    said = [text for text in texts(path) if text.startswith("search")]
    assert said == [f"search: thing {i}" for i in (3, 20, 40, 48, 49)]  # of those without effect, the newest
    assert any("5 of the newest 50 events" in text for text in texts(path))
    default = texts(plot_explanation(explanation(events), tmp_path / "default.svg"))
    assert sum(text.startswith("search") for text in default) == 30


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_hostile_text_and_no_events_are_drawn_without_a_warning(tmp_path, ending, caplog):
    events = [Event("$src$" if i % 2 else "search", float(i), text=text) for i, text in enumerate(HOSTILE)]
    sources = {"search": SourceSpec("text", "searched {text}")}
    hostile = explanation(events, instruction=" ".join(HOSTILE[:6]), answer=" ".join(HOSTILE[:5]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = plot_explanation(hostile, tmp_path / f"hostile.{ending}", sources)
        empty = plot_explanation(explanation([]), tmp_path / f"empty.{ending}")
        plot_explanation(explanation(events, np.zeros(len(events))), tmp_path / f"zeros.{ending}")
    assert drawn.stat().st_size > empty.stat().st_size > 1000 and not caplog.records
    if ending == "svg":
        said = texts(drawn)
        assert "searched abc[31m Tab newline" in said and "$src$: gnp.exe" in said
        assert not any(re.search("[\x00-\x08\x1b\u200b\u202e]", text) for text in said)
