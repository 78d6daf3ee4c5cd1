"""Rows and batches: what an event becomes before any weight is applied."""

import math

import pytest
import torch

from persona.encoders.config import EncoderConfig
from persona.encoders.events import EventEncoder
from persona.encoders.features import TIME_FEATURES, event_rows, make_batch, newest
from persona.encoders.vocabulary import Vocabulary
from persona.history import Event, History, SourceSpec, parse_config

SOURCES = {"buy": SourceSpec("item"), "say": SourceSpec("text"), "who": SourceSpec("tabular")}


@pytest.fixture(scope="module")
def small():
    """A vocabulary of two users: items a and b, one city and an age."""
    events = (
        Event("buy", 1.0, text="apple", item_id="a", value=1.0),
        Event("buy", 2.0, text="pear", item_id="b", value=3.0),
        Event("say", 3.0, text="hello", item_id="a"),
        Event("who", attributes={"city": "Oslo", "age": 20.0, "note": None}),
    )
    other = (
        *events[:2],
        Event("buy", 9.0, text="rare", item_id="c"),
        Event("who", attributes={"city": "Oslo", "age": 40}),
    )
    return Vocabulary.fit([History("u", events), History("v", other)], SOURCES)


def test_the_vocabulary_keeps_what_was_met_twice(small):
    assert small.sources == {"buy": "item", "say": "text", "who": "tabular"}
    assert small.items == {"buy/a": 1, "buy/b": 2} and small.item_texts == ["apple", "pear"]
    assert small.categories == {"who/city/Oslo": 1}
    assert small.columns == {"who/city": 1, "who/age": 2, "who/note": 3}
    assert {key: pytest.approx(scale) for key, scale in small.scales.items()} == {
        "buy": (2.0, 1.0),
        "who/age": (30.0, 10.0),
    }
    assert parse_config(Vocabulary, small.to_dict(), "v") == small


def test_numbers_are_standard_scores_within_five(small):
    assert small.normalise("who/age", 40.0) == 1.0
    assert (small.normalise("who/age", 1e308), small.normalise("who/age", -1e308)) == (5.0, -5.0)
    assert small.normalise("never/seen", 7.0) == 0.0


def test_a_constant_number_has_a_scale():
    history = History("u", (Event("say", 1.0, value=4.0), Event("say", 2.0, value=4.0)))
    vocabulary = Vocabulary.fit([history], SOURCES)
    assert vocabulary.normalise("say", 4.0) == 0.0 and vocabulary.normalise("say", 5.0) == 5.0


def test_huge_numbers_in_training_do_not_break_the_scale():
    history = History("u", tuple(Event("say", float(i), value=v) for i, v in enumerate((1e308, 1e308, -1e308))))
    vocabulary = Vocabulary.fit([history], SOURCES)
    assert all(math.isfinite(vocabulary.normalise("say", v)) for v in (0.0, 1e308, -1e308))


def test_one_row_for_an_event_and_one_for_a_column(small):
    rows = event_rows(
        [
            Event("who", attributes={"city": "Oslo", "age": 40.0, "note": None, "shoe": 43.0, "pet": "cat"}),
            Event("buy", 1.0, text="apple", item_id="a", value=3.0),
            Event("buy", 2.0, item_id="unheard of"),
            Event("say", 3.0, text="hello", item_id="a"),
            Event("other", 4.0, text="x"),
        ],
        small,
    )
    assert [(r.source, r.item, r.column, r.category, r.number, r.text) for r in rows] == [
        (3, 0, 1, 1, None, "city: Oslo"),
        (3, 0, 2, 0, 1.0, ""),
        (3, 0, 3, 0, None, ""),
        (3, 0, 0, 0, 0.0, ""),
        (3, 0, 0, 0, None, "pet: cat"),
        (1, 1, 0, 0, 1.0, "apple"),
        (1, 0, 0, 0, None, ""),
        (2, 0, 0, 0, None, "hello"),
    ]


def test_a_column_may_be_told_by_its_vector_alone_if_it_has_one(small):
    rows = event_rows([Event("who", attributes={"city": "Oslo", "age": 40.0, "pet": "cat"})], small, named=False)
    assert [(r.column, r.category, r.text) for r in rows] == [(1, 1, "Oslo"), (2, 0, ""), (0, 0, "pet: cat")]


def test_time_features(small):
    day = 86_400.0
    rows = event_rows([Event("say"), Event("say", 0.0), Event("say", day / 4), Event("say", 7 * day)], small)
    assert rows[0].time == (0.0,) * TIME_FEATURES
    assert rows[1].time == pytest.approx((0, 0, 1, 0, 1))
    assert rows[2].time[:3] == pytest.approx((math.log1p(day / 4) / 10, 1, 0))
    assert rows[3].time[1:] == pytest.approx((0, 1, 0, 1), abs=1e-9)
    assert event_rows([Event("say", 5.0)], small, previous=2.0)[0].time[0] == pytest.approx(math.log1p(3) / 10)


def test_newest(small):
    history = History("u", (*(Event("say", float(t)) for t in range(5)), Event("who")))
    kept, cut = newest(history, 4)
    assert [e.timestamp for e in kept.events] == [None, 1, 2, 3, 4] and cut
    assert newest(history, 5) == (history, False)


def test_a_batch_is_padded_on_the_right(small, text_encoder):
    rows = [event_rows([Event("buy", 1.0, text="apple", item_id="a", value=3.0)], small), [], []]
    rows[2] = event_rows([Event("say", 1.0, text="hello"), Event("say", 2.0)], small)
    batch = make_batch(rows, text_encoder)
    assert batch.mask.tolist() == [[True, False], [False, False], [True, True]]
    assert torch.equal(batch.text[0, 0], text_encoder.vectors(["apple"])[0])
    assert torch.equal(batch.text[2, 0], text_encoder.vectors(["hello"])[0])
    assert batch.number[:, 0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert not batch.text[1].any() and not batch.text[2, 1].any() and not batch.time[1].any()
    assert make_batch([[], []], text_encoder).mask.shape == (2, 0)


def test_each_field_of_an_event_changes_its_vector(small, text_encoder):
    torch.manual_seed(0)
    module = EventEncoder(small, text_encoder.dim, EncoderConfig(width=32, heads=2, dropout=0.0)).eval()

    def vector(event):
        with torch.no_grad():
            return module(make_batch([event_rows([event], small)], text_encoder))[0, 0]

    plain = {"source": "buy", "timestamp": 1.0, "text": "apple", "item_id": "a", "value": 1.0}
    for change in ({"source": "say"}, {"timestamp": 40_000.0}, {"text": "pear"}, {"item_id": "b"}, {"value": None}):
        assert (vector(Event(**plain)) - vector(Event(**{**plain, **change}))).abs().max() > 1e-3, change
    for a, b in (({"city": "Oslo"}, {"city": None}), ({"age": 20.0}, {"age": 40.0}), ({"age": None}, {"age": 30.0})):
        assert (vector(Event("who", attributes=a)) - vector(Event("who", attributes=b))).abs().max() > 1e-3, (a, b)
