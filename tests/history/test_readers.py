import gzip
import json
import os
import sys
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from persona.errors import DataError, MissingExtraError, RecipeError
from persona.history import ColumnSpec, Event, JoinSpec, ReaderSpec, read_histories
from persona.history.report import ReadReport

RECORDS = [
    {"user": "1", "item": "007", "rating": "4.5", "time": "100", "title": "Toy Story"},
    {"user": "أحمد 👋", "item": "8", "rating": "", "time": "300", "title": "שלום 👩‍👩‍👧‍👦"},
    {"user": "1", "item": "9", "rating": "nan", "time": "50", "title": ""},
]
EXPECTED = {
    "1": (
        Event("s", 50, " [9]", "9", None, {"name": None}),
        Event("s", 100, "Toy Story [007]", "007", 4.5, {"name": "Toy Story"}),
    ),
    "أحمد 👋": (Event("s", 300, "שלום 👩‍👩‍👧‍👦 [8]", "8", None, {"name": "שלום 👩‍👩‍👧‍👦"}),),
}


def spec(path, **more):
    return ReaderSpec(**({"source": "s", "path": path, "user": "user"} | more))


def read(folder, *specs, strict=False):
    histories, report = read_histories(specs, folder, strict=strict)
    return {user: history.events for user, history in histories.items()}, report


def lines(separator, records, header=None):
    rows = [header or list(records[0]), *(list(record.values()) for record in records)]
    return "".join(separator.join(row) + "\n" for row in rows)


def write(path, text):
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_records(path, records):
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        write(path, "".join(json.dumps(record) + "\n" for record in records))
    elif name.endswith(".inter"):
        header = ["user:token", "item:token", "rating:float", "time:float", "title:token_seq"]
        write(path, lines("\t", records, header))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif name == "folder":
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    else:
        write(path, lines("\t" if ".tsv" in name else ",", records))


FORMATS = ["a.csv", "a.tsv", "a.jsonl", "a.inter", "a.csv.gz", "a.jsonl.gz", "a.inter.gz", "a.parquet", "folder"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_histories(tmp_path, name):
    write_records(tmp_path / name, RECORDS)
    reader = spec(
        name,
        timestamp="time",
        item_id="item",
        value="rating",
        text="{title} [{item}]",
        attributes={"name": "title"},
        format="datasets" if name == "folder" else None,
    )
    events, report = read(tmp_path, reader, strict=True)
    assert events == EXPECTED
    assert (report.rows, report.events, report.users, report.bad_rows) == (3, 3, 2, 0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "folder"])
def test_typed_records(tmp_path, name):
    records = [
        {"user": 1, "n": 2, "x": 0.5, "tags": ["a", "b"]},
        {"user": 12345678901234567, "n": None, "x": None, "tags": []},
    ]
    write_records(tmp_path / name, records)
    reader = spec(name, item_id="n", value="x", text="{tags}", format="datasets" if name == "folder" else None)
    events, _ = read(tmp_path, reader, strict=True)
    assert events == {"1": (Event("s", None, "a, b", "2", 0.5),), "12345678901234567": (Event("s"),)}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_ids_that_became_floats_are_the_integers_they_were(tmp_path, name):
    write(tmp_path / "a.csv", "user,item\n7,8\n7.0,8.0\n")
    records = [{"user": 7.0, "item": 8.0}, {"user": None, "item": 8.0}, {"user": 8.5, "item": None}]
    write_records(tmp_path / name, [*records, {"user": -1e16, "item": float("inf")}])
    events, report = read(tmp_path, spec("a.csv", item_id="item"), spec(name, item_id="item"))
    assert {user: [e.item_id for e in own] for user, own in events.items()} == {
        "7": ["8", "8"],
        "7.0": ["8.0"],
        "8.5": [None],
        "-10000000000000000": ["inf"],
    }
    assert report.bad_rows == 1


def test_keys_of_a_join_that_became_floats(tmp_path):
    write(tmp_path / "a.csv", "user,item\nu,7\n")
    write_records(tmp_path / "b.parquet", [{"item": 7.0, "title": "x"}, {"item": None, "title": "y"}])
    events, _ = read(tmp_path, spec("a.csv", text="{title}", join=[JoinSpec("b.parquet", "item")]))
    assert [e.text for e in events["u"]] == ["x"]


def test_a_list_of_users_gives_the_event_to_each_of_them_once(tmp_path):
    cells = ['["ann", "bob"]', '["bob", 7, "bob"]', "[]", '["ann", ""]', '["ann", null]', '["ann", ["bob"]]', '"ann"']
    write(tmp_path / "a.jsonl", "".join(f'{{"user": {cell}, "n": {n}}}\n' for n, cell in enumerate(cells)))
    events, report = read(tmp_path, spec("a.jsonl", item_id="n"))
    assert {user: [e.item_id for e in own] for user, own in events.items()} == {
        "ann": ["0", "6"],
        "bob": ["0", "1"],
        "7": ["1"],
    }
    assert {key[1:]: (bad.count, [e.split()[0] for e in bad.examples]) for key, bad in report.bad.items()} == {
        ("user", "is missing"): (3, ["a.jsonl:3", "a.jsonl:4", "a.jsonl:5"]),
        ("user", "is not an id"): (1, ["a.jsonl:6"]),
    }
    assert (report.rows, report.events, report.users, report.bad_rows) == (7, 3, 3, 4)
    with pytest.raises(DataError, match=r"^a\.jsonl, line 3: user is missing"):
        read(tmp_path, spec("a.jsonl"), strict=True)


def test_a_list_of_users_in_parquet_and_one_with_an_impossible_id(tmp_path):
    records = [{"user": ["ann", "bob"]}, {"user": []}, {"user": ["ann", "x" * 300]}]
    write_records(tmp_path / "a.parquet", records)
    events, report = read(tmp_path, spec("a.parquet"))
    assert events == {"ann": (Event("s"),), "bob": (Event("s"),)} and report.bad_rows == 2


def test_dates_in_parquet(tmp_path):
    moment = datetime(2020, 1, 1, 12, tzinfo=UTC)
    record = {"user": "u", "a": moment, "b": moment.replace(tzinfo=None), "c": date(2020, 1, 1)}
    write_records(tmp_path / "a.parquet", [record])
    for column, expected in [("a", 1577880000), ("b", 1577880000), ("c", 1577836800)]:
        events, _ = read(tmp_path, spec("a.parquet", timestamp=column), strict=True)
        assert events["u"][0].timestamp == expected


def test_splits_of_a_dataset(tmp_path):
    splits = {name: datasets.Dataset.from_list([{"user": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "folder"))
    assert set(read(tmp_path, spec("folder", format="datasets"))[0]) == {"train", "test"}
    assert set(read(tmp_path, spec("folder", format="datasets", split="test"))[0]) == {"test"}
    with pytest.raises(DataError, match="has no split 'dev'; its splits are train, test"):
        read(tmp_path, spec("folder", format="datasets", split="dev"))


def test_a_folder_that_is_no_dataset(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder: cannot be loaded"):
        read(tmp_path, spec("folder", format="datasets"))


@pytest.mark.parametrize("name, module, format", [("a.parquet", "pyarrow", None), ("a", "datasets", "datasets")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name, module, format):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)  # what an uninstalled module looks like to `import`
    with pytest.raises(MissingExtraError, match=r"persona\[train\]"):
        read(tmp_path, spec(name, format=format))


@pytest.mark.parametrize(
    "format, cell, expected",
    [
        ("unix", "-1.5", -1.5),
        ("unix_ms", "1500", 1.5),
        ("iso", "1970-01-01T00:01:00", 60),
        ("iso", "1970-01-01T01:01:00+01:00", 60),
        ("iso", "1970-01-02", 86400),
        ("%d/%m/%Y", "02/01/1970", 86400),
        ("%Y-%m-%d %H:%M %z", "1970-01-01 02:00 +0200", 0),
    ],
)
def test_time_formats(tmp_path, format, cell, expected):
    write(tmp_path / "a.csv", f"user,time\nu,{cell}\n")
    events, _ = read(tmp_path, spec("a.csv", timestamp="time", time_format=format), strict=True)
    assert events["u"][0].timestamp == expected


@pytest.mark.parametrize(
    "format, cell", [("unix", "soon"), ("unix", "inf"), ("iso", "1"), ("%Y", "x"), ("unix", "nan"), ("iso", "")]
)
def test_times_that_cannot_be_read(tmp_path, format, cell):
    write(tmp_path / "a.csv", f"user,time\nu,{cell}\n")
    events, report = read(tmp_path, spec("a.csv", timestamp="time", time_format=format))
    assert events == {} and report.bad_rows == 1


def test_an_unknown_time_format(tmp_path):
    write(tmp_path / "a.csv", "user,time\nu,1\n")
    with pytest.raises(RecipeError, match="time_format 'seconds'"):
        read(tmp_path, spec("a.csv", timestamp="time", time_format="seconds"))


def test_future_and_equal_times_are_kept(tmp_path):
    write(tmp_path / "a.csv", "user,time,n\nu,9e10,1\nu,5,2\nu,5,3\n")
    histories, report = read_histories([spec("a.csv", timestamp="time", item_id="n")], tmp_path, strict=True)
    assert [e.item_id for e in histories["u"].events] == ["2", "3", "1"]
    assert [e.item_id for e in histories["u"].until(5).events] == []
    assert report.future == 1 and "Dated in the future: 1 event" in str(report)


def test_exact_copies_are_kept_and_counted(tmp_path):
    write(tmp_path / "a.csv", "user,time,n,tag\nu,5,1,x\nv,5,1,x\nu,5,2,x\nu,6,1,x\nu,5,1,y\nu,7,,\n")
    write(tmp_path / "b.csv", "user,time,n,tag\nu,5,1,x\nu,5,1,x\nu,7,,\n")
    of = partial(spec, timestamp="time", item_id="n", attributes={"tag": "tag"})
    histories, report = read_histories([of("*.csv")], tmp_path)
    assert len(histories["u"]) == 8 and report.copies == 3
    assert str(report).endswith("Exact copies of another event, kept: 3; is a file there twice?")
    assert "copies" not in str(read_histories([of("a.csv")], tmp_path)[1])


BAD = '''user,time,x,tag
u,1,2,ok
,2,2,no user
u,,2,no time
u,later,2,odd time
u,5,many,odd number
u,6,1_000,odd number
u,7,inf,infinite
u,8,,unknown number is fine
u,9,NaN,unknown number is fine
u,10,2
"a line break,
in a cell",11,2,"said ""hi"""
{long},12,2,long user
u,13,2,"open quote
'''


def test_bad_rows_are_counted_and_shown(tmp_path):
    write(tmp_path / "a.csv", BAD.replace("{long}", "x" * 300))
    events, report = read(tmp_path, spec("a.csv", timestamp="time", value="x", text="{tag}"))
    assert [e.timestamp for e in events["u"]] == [1, 8, 9]
    assert events["a line break,\nin a cell"][0].text == 'said "hi"'
    assert {key[1:]: (bad.count, bad.examples) for key, bad in report.bad.items()} == {
        ("user", "is missing"): (1, ["a.csv:3"]),
        ("time", "is missing"): (1, ["a.csv:4"]),
        ("time", "is not a number"): (1, ["a.csv:5 ('later')"]),
        ("x", "is not a number"): (2, ["a.csv:6 ('many')", "a.csv:7 ('1_000')"]),
        ("x", "is infinite"): (1, ["a.csv:8 ('inf')"]),
        ("the row", "has more or fewer cells than the header"): (1, ["a.csv:11 ('3 and 4')"]),
        ("the row", "is not an event"): (1, ["a.csv:14 ('a user id has 1 to 256 characters; this one has 300')"]),
        ("the row", "is not valid CSV"): (1, report.bad["a.csv", "the row", "is not valid CSV"].examples),
    }
    assert report.bad["a.csv", "the row", "is not valid CSV"].examples[0].startswith("a.csv:15 ")
    assert (report.rows, report.events, report.bad_rows) == (13, 4, 9)
    summary = "13 rows gave 4 events of 2 users. 9 bad rows left out: 2 in a.csv where x is not a number"
    assert str(report).startswith(summary)


def test_ten_reasons_are_shown_and_more_are_counted():
    report = ReadReport()
    for n in range(10):
        report.add_bad("a.csv", n, f"x{n}", "is missing")
    assert all(f"where x{n} is missing" in str(report) for n in range(10)) and "more" not in str(report)
    report.add_bad("a.csv", 10, "x10", "is missing")
    assert str(report).endswith("; and 1 more reason.")
    report.add_bad("a.csv", 11, "x11", "is missing")
    assert str(report).endswith("; and 2 more reasons.")


@pytest.mark.parametrize(
    "line, cells, message", [(2, ",1", "user is missing"), (3, "u,1\nu,x", r"time is not a number \('x'\)")]
)
def test_strict_raises_at_the_first_bad_row(tmp_path, line, cells, message):
    write(tmp_path / "a.csv", f"user,time\n{cells}\nu,y\n")
    with pytest.raises(DataError, match=f"^a.csv, line {line}: {message}"):
        read(tmp_path, spec("a.csv", timestamp="time"), strict=True)


def test_bad_json(tmp_path):
    good = ['{"user": "u", "x": NaN}', "", '{"user": "u"}', '{"user": "u", "x": "2"}']
    bad = ["{broken", "[1]", '{"user": "\\ud83d"}', '{"user": "u", "x": true}', '{"user": true}', '{"user": {"a": 1}}']
    bad += ['{"user": "u", "x": 1' + "0" * 400 + "}"]
    write(tmp_path / "a.jsonl", "\n".join([*good, *bad]))
    events, report = read(tmp_path, spec("a.jsonl", value="x"))
    assert [e.value for e in events["u"]] == [None, None, 2]
    assert (report.events, report.bad_rows) == (3, len(bad))
    assert {(field, reason): bad.examples[0].split()[0] for (_, field, reason), bad in report.bad.items()} == {
        ("the row", "is not valid JSON"): "a.jsonl:5",
        ("the row", "is not a JSON object"): "a.jsonl:6",
        ("the row", "is not an event"): "a.jsonl:7",
        ("x", "is not a number"): "a.jsonl:8",
        ("user", "is not an id"): "a.jsonl:9",
        ("user", "is not text"): "a.jsonl:10",
    }


def test_a_half_emoji_in_a_text_is_a_bad_row(tmp_path):
    write(tmp_path / "a.jsonl", '{"user": "u", "t": "cut \\ud83d"}\n{"user": "u", "t": "whole \\ud83d\\udc4b"}\n')
    events, report = read(tmp_path, spec("a.jsonl", text="{t}"))
    assert [e.text for e in events["u"]] == ["whole 👋"] and report.bad_rows == 1


RATINGS = "user,item,title\nu,1,raw title\nu,2,\nu,3,x\n"
ITEMS = "item:token\ttitle:token_seq\tyear:float\tclass:token_seq\n1\tjoined\t1995\tDrama War\n2\tb\t\t\n"


def test_a_join_adds_columns_and_the_raw_row_wins(tmp_path):
    write(tmp_path / "a.csv", RATINGS)
    write(tmp_path / "a.item", ITEMS)
    attributes = {"genre": ColumnSpec("class", split=" "), "year": ColumnSpec("year", "number"), "classes": "class"}
    reader = spec("a.csv", text="{title}/{year}", attributes=attributes, join=[JoinSpec("*.item", "item")])
    events, report = read(tmp_path, reader)
    assert events["u"] == (
        Event("s", text="raw title/1995", attributes={"genre": "Drama", "year": 1995.0, "classes": "Drama War"}),
        Event("s", attributes={"genre": None, "year": None, "classes": None}),
    )
    assert report.bad[("a.csv", "item", "is not in *.item")].examples == ["a.csv:4 ('3')"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_list_is_split_already(tmp_path, name):
    lists = [["rock", "pop"], [" big band | swing", "x"], [], None, ["", "pop"]]
    write_records(tmp_path / name, [{"user": "u", "tags": tags} for tags in lists])
    attributes = {"first": ColumnSpec("tags", split="|"), "all": "tags"}
    events, _ = read(tmp_path, spec(name, attributes=attributes), strict=True)
    assert [e.attributes["first"] for e in events["u"]] == ["rock", "big band | swing", None, None, None]
    assert [e.attributes["all"] for e in events["u"]][:2] == ["rock, pop", " big band | swing, x"]


def test_the_first_of_a_list_of_numbers(tmp_path):
    write(tmp_path / "a.jsonl", '{"user": "u", "n": [2.5, 3]}\n{"user": "u", "n": [{"a": 1}]}\n')
    events, report = read(tmp_path, spec("a.jsonl", attributes={"n": ColumnSpec("n", "number", split=",")}))
    assert [e.attributes["n"] for e in events["u"]] == [2.5]
    assert report.bad[("a.jsonl", "n", "is not text")].count == 1


def test_a_join_that_gives_nothing_needed_loses_nothing(tmp_path):
    write(tmp_path / "a.csv", RATINGS)
    write(tmp_path / "a.item", ITEMS)
    events, _ = read(tmp_path, spec("a.csv", text="{title}", join=[JoinSpec("a.item", "item")]), strict=True)
    assert [e.text for e in events["u"]] == ["raw title", None, "x"]


def test_bad_rows_of_a_joined_file_are_counted_once(tmp_path):
    write(tmp_path / "a.csv", RATINGS)
    write(tmp_path / "a.item", ITEMS + "1\tother\t1\tx\n1\tjoined\t1995\tDrama War\n\tno key\t1\tx\nshort\n")
    reader = spec("a.csv", text="{year}", join=[JoinSpec("a.item", "item")])
    _, report = read(tmp_path, reader, reader)
    bad = {(field, reason): bad.examples for (file, field, reason), bad in report.bad.items() if file == "a.item"}
    assert bad == {
        ("item", "appears twice with different cells"): ["a.item:4 ('1')"],
        ("item", "is missing"): ["a.item:6"],
        ("the row", "has more or fewer cells than the header"): ["a.item:7 ('1 and 4')"],
    }


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.inter"])
@pytest.mark.parametrize(
    "wrong",
    [
        *({field: "nix"} for field in ("user", "timestamp", "value", "item_id", "event_id")),
        {"text": "{title} {nix}"},
        {"attributes": {"a": "nix"}},
        {"join": [JoinSpec("a.csv", "nix")]},
    ],
)
def test_a_missing_column_is_named_with_those_there(tmp_path, name, wrong):
    write_records(tmp_path / "a.csv", RECORDS)
    write_records(tmp_path / name, RECORDS)
    with pytest.raises(DataError, match=f"^{name}: has no column 'nix'; its columns are user, item, rating, time"):
        read(tmp_path, spec(name, **wrong))


def test_a_column_that_only_later_json_lines_have(tmp_path):
    write(tmp_path / "a.jsonl", '{"user": "u"}\n{"user": "u", "note": "late"}\n')
    assert [e.text for e in read(tmp_path, spec("a.jsonl", text="{note}"))[0]["u"]] == [None, "late"]


def test_templates_are_columns_and_nothing_else(tmp_path):
    write(tmp_path / "a.jsonl", '{"user": "u", "a.b": "dot", "n": 1.234}\n{"user": "u", "a.b": null, "n": null}\n')
    events, _ = read(tmp_path, spec("a.jsonl", text="{{{a.b}}} {n:.1f}"), strict=True)
    assert [e.text for e in events["u"]] == ["{dot} 1.2", None]
    with pytest.raises(DataError, match=r"has no column 'user\.__class__'"):
        read(tmp_path, spec("a.jsonl", text="{user.__class__}"))
    with pytest.raises(RecipeError, match="does not parse"):
        read(tmp_path, spec("a.jsonl", text="{user"))


def test_globs_read_all_files_into_the_same_users(tmp_path):
    for n in (2, 1):
        write(tmp_path / f"part-{n}.csv", f"user,time,n\nu,7,{n}\n")
    events, report = read(tmp_path, spec("part-*.csv", timestamp="time", item_id="n"))
    assert [e.item_id for e in events["u"]] == ["1", "2"] and report.rows == 2


def test_no_file_and_no_folder(tmp_path):
    write(tmp_path / "there.csv", "user\n")
    with pytest.raises(DataError, match=r"no file matches '\*\.tsv'; the folder holds there\.csv"):
        read(tmp_path, spec("*.tsv"))
    with pytest.raises(DataError, match="there is no such folder"):
        read(tmp_path / "none", spec("*.tsv"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"", "a.csv, line 1: is empty"),
        ("a.csv", b"user,user\n", "two columns are named 'user'"),
        ("a.csv", "user\né\n".encode("latin-1"), "a.csv: is not UTF-8"),
        ("a.jsonl", b'{"user": "\xff"}\n', "a.jsonl: is not UTF-8"),
        ("a.parquet", b"PAR1 no parquet PAR1", "a.parquet: is not a whole parquet file"),
        ("a.xyz", b"user\n", "cannot tell the format"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path, spec(name))


def test_a_cut_gzip_file(tmp_path):
    write(tmp_path / "a.csv.gz", "user\n" + "\n".join(str(n * n) for n in range(5000)))
    content = (tmp_path / "a.csv.gz").read_bytes()
    for damaged in (content[: len(content) // 2], b"user\nu\n"):
        (tmp_path / "a.csv.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.csv\.gz: is not a whole gzip file"):
            read(tmp_path, spec("a.csv.gz"))


def test_a_parquet_file_damaged_in_the_middle(tmp_path):
    write_records(tmp_path / "a.parquet", [{"user": f"user {n * n}"} for n in range(5000)])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[10:2000] = b"\xff" * 1990
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: "):
        read(tmp_path, spec("a.parquet"))


@pytest.mark.parametrize("name, content", [("a.csv", "user\n"), ("a.jsonl", ""), ("a.jsonl", "\n")])
def test_files_without_rows_give_no_histories(tmp_path, name, content):
    write(tmp_path / name, content)
    events, report = read(tmp_path, spec(name))
    assert events == {} and str(report) == "0 rows gave 0 events of 0 users."


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    write(tmp_path / "a.csv", "\ufeffuser\r\nu\r\n")
    assert set(read(tmp_path, spec("a.csv"))[0]) == {"u"}


def test_ten_thousand_rows(tmp_path):
    write(tmp_path / "a.csv", "user,time\n" + "".join(f"u,{n}\n" for n in range(10_000, 0, -1)))
    events, _ = read(tmp_path, spec("a.csv", timestamp="time"))
    assert [e.timestamp for e in events["u"]] == list(range(1, 10_001))


@pytest.mark.skipif("PERSONA_ML100K" not in os.environ, reason="PERSONA_ML100K names no MovieLens 100K folder")
def test_movielens_100k():
    attributes = {"genre": ColumnSpec("class", split=" "), "year": ColumnSpec("release_year", "number")}
    join = [JoinSpec("ml-100k.item", "item_id")]
    common = {"user": "user_id", "timestamp": "timestamp", "item_id": "item_id", "value": "rating"}
    ratings = spec("ml-100k.inter", **common, text="{movie_title}", attributes=attributes, join=join)
    profile = spec("ml-100k.user", source="profile", user="user_id", attributes={"age": ColumnSpec("age", "number")})
    histories, report = read_histories([ratings, profile], Path(os.environ["PERSONA_ML100K"]))
    assert (report.rows, report.users, report.future) == (100_943, 943, 0)
    # Items 267 ("unkonwn", 9 ratings) and 1412 ("V", 6 ratings) have no year that is a number.
    bad = {key: bad.count for key, bad in report.bad.items()}
    assert bad == {("ml-100k.inter", "release_year", "is not a number"): 15}
    assert histories["1"].events[0].attributes == {"age": 24.0}
