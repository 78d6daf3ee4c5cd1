import math

import numpy as np
import pytest

from persona.errors import EventError, PersonaError
from persona.history import Event, History, event_from_dict, event_to_dict


def at(*times):
    return [Event("s", timestamp=time, text=str(place)) for place, time in enumerate(times)]


def texts(history):
    return [event.text for event in history.events]


def test_empty_history():
    history = History("u")
    assert len(history) == 0 and history.timed == ()
    assert len(history.until(5)) == 0 and len(history.last(3)) == 0


def test_one_event_needs_only_a_source():
    event = Event("s")
    assert (event.timestamp, event.text, event.item_id, event.value, event.event_id) == (None,) * 5
    assert event.attributes == {}
    assert texts(History("u", at(3))) == ["0"]


def test_events_are_sorted_untimed_first_and_equal_times_keep_their_order():
    assert texts(History("u", at(5, 1, None, 5, 1, None, -2))) == ["2", "5", "6", "1", "4", "0", "3"]


def test_until_never_splits_equal_times_and_keeps_untimed():
    history = History("u", at(1, 2, 2, 3, None))
    assert texts(history.until(2)) == ["4", "0"]
    assert texts(history.until(2.5)) == ["4", "0", "1", "2"]
    assert texts(history.until(-1)) == ["4"]


def test_last_takes_the_newest_timed_events():
    history = History("u", at(3, 1, 2, None))
    assert texts(history.last(2)) == ["3", "2", "0"]
    assert texts(history.last(0)) == texts(history.last(-1)) == ["3"]
    assert texts(history.last(99)) == ["3", "1", "2", "0"]


def test_ten_thousand_events():
    history = History("u", at(*range(10_000, 0, -1)))
    assert len(history) == 10_000
    assert [event.timestamp for event in history.last(3).events] == [9998, 9999, 10_000]


@pytest.mark.parametrize("field", ["timestamp", "value"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, True, "3", [3], 10**400])
def test_what_is_not_a_finite_number_is_refused(field, number):
    with pytest.raises(EventError, match=field):
        Event("s", **{field: number})


@pytest.mark.parametrize("number", [3, np.int64(3), np.float32(3)])
def test_any_real_number_becomes_a_float(number):
    assert type(Event("s", value=number).value) is float
    assert Event("s", attributes={"a": number}).attributes == {"a": 3.0}


@pytest.mark.parametrize("field", ["source", "text", "item_id", "event_id"])
@pytest.mark.parametrize("value", [3, b"x", ["x"], True, "half \ud83d"])
def test_what_is_not_a_whole_string_is_refused(field, value):
    with pytest.raises(EventError, match=field):
        Event(**({"source": "s"} | {field: value}))


def test_empty_or_missing_source_is_refused():
    with pytest.raises(EventError, match="source is empty"):
        Event("")
    with pytest.raises(EventError, match="source must be a string"):
        Event(None)


@pytest.mark.parametrize(
    "attributes", [{"a": True}, {"a": math.nan}, {"a": [1]}, {1: "a"}, {"a": "\udc00"}, [("a", 1)]]
)
def test_bad_attributes_are_refused(attributes):
    with pytest.raises(EventError, match="attributes"):
        Event("s", attributes=attributes)


@pytest.mark.parametrize("user", ["أحمد", "👩‍👩‍👧‍👦", "x" * 256, "'; DROP TABLE", " ", "a\nb"])
def test_user_ids_are_any_unicode(user):
    assert History(user, at(1)).user == user


@pytest.mark.parametrize("user", ["", "x" * 257, "\ud83d", None, 7])
def test_bad_user_ids_are_refused(user):
    with pytest.raises(EventError, match="user id"):
        History(user)


def test_a_history_holds_events_only():
    with pytest.raises(EventError, match="not an Event"):
        History("u", ({"source": "s"},))


def test_errors_are_value_errors():
    assert issubclass(EventError, PersonaError) and issubclass(PersonaError, ValueError)


@pytest.mark.parametrize(
    "event",
    [Event("s"), Event("s", 0.0, "", "i", 0.0, {"a": None, "b": 2, "c": "👋"}, "e"), Event("s", text="שלום")],
)
def test_dict_round_trip(event):
    assert event_from_dict(event_to_dict(event)) == event


@pytest.mark.parametrize("data, message", [({"source": "s", "txt": "x"}, "txt"), ({}, "source"), ("s", "mapping")])
def test_dicts_that_are_no_event(data, message):
    with pytest.raises(EventError, match=message):
        event_from_dict(data)
