"""Parquet files of events: what they say arrives as it stands, and whatever is wrong is named with its row."""

import hashlib
import json
import sys
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona.errors import DataError, MissingExtraError
from persona.history import Event, History
from persona.history.event_files import EventFiles

FAMILY = "👩‍👩‍👧‍👦"


def save(path, columns, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **kwargs)
    return path


def one(path, **columns):
    """A file with two rows, of which the second may be changed or be of another type."""
    return save(path, {"user": ["ana", "bob"], "source": ["page", "page"], **columns})


def test_all_columns_arrive_as_they_stand(tmp_path):
    facts = {"city": "Kraków", "age": 31.5, "shoe": None}
    columns = {
        "user": ["bob", FAMILY, "bob", "Ana"],
        "source": ["purchase", "search", "profile", "page"],
        "timestamp": [9.5, 2.0, None, 1.0],
        "text": ["oak violin", "שלום", None, ""],
        "item_id": ["sku1", None, None, None],
        "value": [4.0, None, None, -1e12],
        "attributes": [None, "{}", json.dumps(facts), None],
    }
    found = EventFiles(save(tmp_path / "e.parquet", columns))
    assert found.histories() == [
        History("Ana", (Event("page", 1.0, text="", value=-1e12),)),
        History("bob", (Event("profile", attributes=facts), Event("purchase", 9.5, "oak violin", "sku1", 4.0))),
        History(FAMILY, (Event("search", 2.0, text="שלום"),)),
    ]
    assert (len(found), found.rows) == (3, 4)
    assert found.sources == {"purchase": 1, "search": 1, "profile": 1, "page": 1}
    assert found.histories(1, 2) == found.histories()[1:2] and found.histories(3) == found.histories(5, 9) == []
    assert found.digests == {"e.parquet": hashlib.sha256((tmp_path / "e.parquet").read_bytes()).hexdigest()}


def test_rows_of_a_user_lie_anywhere_and_equal_times_keep_their_order(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"u{rng.integers(7)}", float(rng.integers(5)), str(i)) for i in range(300)]
    for number, part in enumerate((rows[:100], rows[100:101], rows[101:])):
        users, times, texts = zip(*part)
        columns = {"user": users, "timestamp": times, "text": texts, "source": ["page"] * len(part)}
        save(tmp_path / ("deep" if number == 1 else "") / f"{number}.parquet", columns, row_group_size=13)
    order = rows[:100] + rows[101:] + rows[100:101]  # "deep/1.parquet" comes after the others
    found = EventFiles(tmp_path).histories()
    assert [h.user for h in found] == sorted({user for user, _, _ in rows})
    for history in found:
        own = sorted((row for row in order if row[0] == history.user), key=lambda row: row[1])
        assert [e.text for e in history.events] == [text for _, _, text in own]


@pytest.mark.parametrize(
    "times",
    [
        pa.array([1_700_000_000, None], pa.int64()),
        pa.array([1_700_000_000.0, None], pa.float64()),
        pa.array([datetime(2023, 11, 14, 22, 13, 20), None], pa.timestamp("s")),
        pa.array([datetime(2023, 11, 14, 22, 13, 20), None], pa.timestamp("ns")),
        pa.array([datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC), None], pa.timestamp("ms", "UTC")),
        pa.array(
            [datetime(2023, 11, 15, 0, 13, 20, tzinfo=timezone(timedelta(hours=2))), None],
            pa.timestamp("us", "Europe/Kyiv"),
        ),
    ],
)
def test_times_are_seconds_or_timestamps(tmp_path, times):
    found = EventFiles(one(tmp_path / "e.parquet", timestamp=times)).histories()
    assert [h.events[0].timestamp for h in found] == [1_700_000_000.0, None]


def test_times_in_the_future_are_kept_and_counted(tmp_path):
    moment = 1_700_000_000
    one(tmp_path / "a.parquet")
    one(tmp_path / "b.parquet", timestamp=[moment, None])
    found = EventFiles(tmp_path)
    assert found.future == 0 and str(found) == "4 events of 2 users"
    one(tmp_path / "c.parquet", timestamp=[moment * 1000, moment])  # milliseconds
    one(tmp_path / "d.parquet", timestamp=pa.array([moment * 1000, None], pa.timestamp("ms")))
    found = EventFiles(tmp_path)
    assert found.future == 1 and found.rows == 8
    assert str(found).endswith("users. Dated in the future: 1 event; are timestamps in seconds?")


@pytest.mark.parametrize(
    "cells, expected",
    [
        (pa.array(['{"a": "x", "b": null}', None]), {"a": "x", "b": None}),
        (pa.array([[("a", "x"), ("b", None)], None], pa.map_(pa.string(), pa.string())), {"a": "x", "b": None}),
        (pa.array([[("a", 2)], None], pa.map_(pa.string(), pa.int32())), {"a": 2.0}),
        # null in a struct is what other rows have, so it says nothing
        (pa.array([{"a": "x", "b": None, "c": 1.5}, None]), {"a": "x", "c": 1.5}),
        (pa.array([None, None]), {}),
    ],
)
def test_attributes_are_json_maps_or_structs(tmp_path, cells, expected):
    found = EventFiles(one(tmp_path / "e.parquet", attributes=cells)).histories()
    assert [h.events[0].attributes for h in found] == [expected, {}]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_kinds_of_text(tmp_path, kind):
    users = pa.array(["ana", "bob"]).cast(kind)
    found = EventFiles(one(tmp_path / "e.parquet", user=users, text=pa.array(["x", None]).cast(kind))).histories()
    assert [(h.user, h.events[0].text) for h in found] == [("ana", "x"), ("bob", None)]


def not_utf8():
    offsets, content = np.array([0, 1, 3], np.int32), b"a\xff\xfe"
    return pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(content)])


@pytest.mark.parametrize(
    "columns, reason",
    [
        ({"user": ["ana", None]}, "user id must be a string"),
        ({"user": ["ana", ""]}, "user id has 1 to 256 characters; this one has 0"),
        ({"user": ["😀" * 256, "😀" * 257]}, "this one has 257"),
        ({"user": ["ana", "x" * 10_000_000]}, "this one has 10000000"),
        ({"source": ["page", None]}, r"event\.source must be a string"),
        ({"source": ["page", ""]}, r"event\.source is empty"),
        ({"timestamp": [1.0, float("nan")]}, r"event\.timestamp is nan"),
        ({"timestamp": [1.0, float("inf")]}, r"event\.timestamp is inf"),
        ({"value": [1.0, float("nan")]}, r"event\.value is nan"),
        ({"text": not_utf8()}, "cannot be read: .*utf-8"),
        ({"attributes": [None, "{broken"]}, "attributes cannot be read"),
        ({"attributes": [None, "[" * 100_000]}, "attributes cannot be read"),
        ({"attributes": [None, '{"a": 1, "a": 2}']}, "a key stands there twice"),
        ({"attributes": [None, "[1]"]}, "must be a mapping, not list"),
        ({"attributes": [None, "7"]}, "must be a mapping, not int"),
        ({"attributes": [None, '{"a": NaN}']}, r"attributes\['a'\] is nan"),
        ({"attributes": [None, '{"a": true}']}, r"attributes\['a'\] must be a number, not bool"),
        ({"attributes": [None, '{"a": {"b": 1}}']}, r"attributes\['a'\] must be a number, not dict"),
        ({"attributes": [None, '{"a": "\\ud800"}']}, "not valid Unicode"),
        ({"attributes": pa.array([None, {"a": [1]}])}, r"attributes\['a'\] must be a number, not list"),
        (
            {"attributes": pa.array([None, [("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int8()))},
            "a key stands there twice",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, columns, reason):
    one(tmp_path / "a.parquet")
    one(tmp_path / "b.parquet", **columns)
    with pytest.raises(DataError, match=rf"^b\.parquet, row 2: .*{reason}"):
        EventFiles(tmp_path)


def test_row_numbers_go_on_from_batch_to_batch(tmp_path):
    values = np.zeros(150_000)
    values[140_000] = np.inf
    names = ["u"] * len(values)
    with pytest.raises(DataError, match=r"e\.parquet, row 140001: event\.value is inf"):
        EventFiles(save(tmp_path / "e.parquet", {"user": names, "source": names, "value": values}))


@pytest.mark.parametrize(
    "columns, reason",
    [
        ({"user": [1, 2]}, "column 'user' is int64, not a string; cast it"),
        ({"item_id": [1, 2]}, "column 'item_id' is int64"),
        ({"value": ["1", "2"]}, "column 'value' is string, not a number"),
        ({"value": [True, False]}, "column 'value' is bool"),
        ({"timestamp": ["2020-01-01"] * 2}, "column 'timestamp' is string, not a number of seconds or a timestamp"),
        ({"attributes": [1, 2]}, "column 'attributes' is int64, not a JSON string"),
        ({"colour": ["red"] * 2}, "has a column 'colour'; the columns known are user, source, timestamp, text"),
    ],
)
def test_bad_columns_are_named(tmp_path, columns, reason):
    with pytest.raises(DataError, match=rf"e\.parquet: .*{reason}"):
        EventFiles(one(tmp_path / "e.parquet", **columns))


def test_missing_and_twofold_columns(tmp_path):
    with pytest.raises(DataError, match="has no column 'source'; its columns are user, text"):
        EventFiles(save(tmp_path / "e.parquet", {"user": ["a"], "text": ["b"]}))
    twice = pa.table([pa.array(["a"])] * 3, names=["user", "source", "user"])
    with pytest.raises(DataError, match="two columns are named 'user'"):
        EventFiles(save(tmp_path / "e.parquet", twice))


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="there is no such file or folder"):
        EventFiles(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no file whose name ends in \.parquet"):
        EventFiles(tmp_path)
    for content in (b"", b"PAR1", b"user,source\na,b\n"):
        (tmp_path / "e.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"e\.parquet: is not a whole Parquet file"):
            EventFiles(tmp_path)
    whole = one(tmp_path / "e.parquet").read_bytes()
    (tmp_path / "e.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"e\.parquet: is not a whole Parquet file"):
        EventFiles(tmp_path)
    empty = pa.table({"user": pa.array([], pa.string()), "source": pa.array([], pa.string())})
    with pytest.raises(DataError, match="holds no events"):
        EventFiles(save(tmp_path / "e.parquet", empty))


def test_an_empty_file_beside_others_holds_nobody(tmp_path):
    save(tmp_path / "a.parquet", {"user": pa.array([], pa.string()), "source": pa.array([], pa.string())})
    one(tmp_path / "b.parquet")
    assert [h.user for h in EventFiles(tmp_path).histories()] == ["ana", "bob"]


def test_pyarrow_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"persona\[train\]"):
        EventFiles(tmp_path)
