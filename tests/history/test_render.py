"""Lines of text: gaps for what is missing, and nothing but fields in a template."""

import pytest

from persona.errors import RecipeError
from persona.history import Event, History, SourceSpec
from persona.history.render import render_event, render_history

FULL = Event("s", 1.0, "  a\n film ", "i1", 4.0, {"age": 30.0, "city": "Bonn {x}", "tier": None})
BARE = Event("s", 1.0)


def line(template, event=FULL):
    return render_event(event, SourceSpec("item", template))


@pytest.mark.parametrize(
    "template, full, bare",
    [
        ("{text}", "a film", ""),
        ("bought {text}", "bought a film", "bought"),
        ("{text} {value:g}", "a film 4", ""),
        ("{text} {value}", "a film 4.0", ""),
        ("age {age:.0f} {city} {tier} in {item_id}", "age 30 Bonn {x} in i1", "age in"),
        ("{nothing:>9.2f}[{value:>5g}]", "[ 4]", "[]"),
        ("{value:.{places}f} {{text}}", "4.000000 {text}", "{text}"),
        ("{city!r} {tier!r}", "'Bonn {x}'", ""),
    ],
)
def test_a_line_is_filled_and_gaps_stay_gaps(template, full, bare):
    assert line(template.replace("{places}", "6")) == full
    assert line(template, BARE) == bare


def test_an_attribute_goes_before_a_field_of_the_event():
    assert line("{text}", Event("s", text="old", attributes={"text": "new"})) == "new"


@pytest.mark.parametrize("template", ["{text.__class__}", "{text[0]}", "{city.__init__.__globals__}", "{value.real}"])
def test_a_template_reaches_into_no_object(template):
    assert line("a" + template) == "a"


def test_a_name_with_dots_and_brackets_is_a_field():
    assert line("{a.b} {c[0]}", Event("s", attributes={"a.b": "x", "c[0]": 2.5})) == "x 2.5"


@pytest.mark.parametrize("template", ["{text:g}", "{value:d}", "{text!x}", "{text", "}"])
def test_a_template_that_does_not_fit_names_source_and_template(template):
    with pytest.raises(RecipeError) as error:
        line(template)
    assert "sources.s" in str(error.value) and repr(template) in str(error.value)


def test_a_history_leaves_out_sources_without_a_spec():
    history = History("u", (Event("b", 2.0, "two"), Event("a", 1.0, "one"), Event("z", 3.0, "three")))
    assert render_history(history, {"a": SourceSpec("text"), "b": SourceSpec("text", "- {text}")}) == "one\n- two"
