"""Official files: what they hold, and every way in which they can be wrong."""

import json
import sys

import pyarrow
import pytest

from persona.errors import DataError, EventError, MissingExtraError
from persona.evaluation.uqa.official import IDS, TEXT, TOKENS, OfficialFile, to_history
from persona.history import Event

QUESTION = "用户近期最感兴趣的类目是什么？"
ITEM, CATE = IDS["item"], IDS["cate"]


def schema_with(path, column, kind):
    """The schema of a file with another type for one column."""
    schema = pyarrow.ipc.open_file(path).schema
    return schema.set(schema.get_field_index(column), pyarrow.field(column, kind))


def test_an_align_file_holds_users_and_questions(write, make_row):
    file = OfficialFile(write([make_row([n, 60 + n], f"{QUESTION}{n}", "B") for n in range(5)], chunk=2))
    assert len(file) == 5 and file.has_questions
    row = file[3]  # of the second record batch
    assert (row.item, row.cate, row.seller) == ([3, 63], [[3], [63 % 8]], [[3], [63 % 11]])
    assert (row.title_bpe, row.seller_bpe) == ([[3, 0], [13, 0]], [[3, 4], [13, 4]])
    assert (row.question, row.answer) == (f"{QUESTION}3", "B")
    assert [r.item[0] for r in file] == [0, 1, 2, 3, 4]


def test_a_pretrain_file_has_no_questions(write, make_row):
    file = OfficialFile(write([make_row([1])]))
    assert not file.has_questions and (file[0].question, file[0].answer) == (None, None)


def test_a_file_without_rows(write):
    assert len(OfficialFile(write([]))) == 0


@pytest.mark.parametrize("row", [-1, 1])
def test_rows_that_are_not_there(write, make_row, row):
    with pytest.raises(IndexError, match="has the rows 0 to 0"):
        OfficialFile(write([make_row([1])]))[row]


def test_a_file_is_mapped_and_not_read(write, make_row):
    path = write([make_row(range(500)) for _ in range(20)])
    before = pyarrow.total_allocated_bytes()
    file = OfficialFile(path)
    assert path.stat().st_size > 1_000_000 and pyarrow.total_allocated_bytes() - before < 10_000
    assert len(file[19].item) == 500


@pytest.mark.parametrize("integer", [pyarrow.int32(), pyarrow.uint64()])
@pytest.mark.parametrize("listed", [pyarrow.list_, pyarrow.large_list])
def test_all_lists_of_integers_are_read(write, make_row, integer, listed):
    rows = [make_row([1, 2], QUESTION)]
    schema = schema_with(write(rows), CATE, listed(listed(integer)))
    schema = schema.set(schema.get_field_index(TEXT), pyarrow.field(TEXT, pyarrow.large_string()))
    assert OfficialFile(write(rows, schema))[0].cate == [[1], [2]]


# --- files that are wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [*IDS.values(), *TOKENS.values()])
def test_a_missing_column_is_named(write, make_row, column):
    path = write([make_row([1])])
    schema = pyarrow.ipc.open_file(path).schema
    path = write([make_row([1])], schema.remove(schema.get_field_index(column)))
    with pytest.raises(DataError, match=f"has no columns named '{column}'; it needs one"):
        OfficialFile(path)


def test_a_column_that_stands_there_twice_is_named(write, make_row):
    path = write([make_row([1])])
    table = pyarrow.ipc.open_file(path).read_all()
    table = table.append_column(CATE, table[CATE])
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=f"has 2 columns named '{CATE}'"):
        OfficialFile(path)


@pytest.mark.parametrize(
    "column, kind, cell, message",
    [
        (CATE, pyarrow.list_(pyarrow.int64()), [1], r"'uni_seq_cate_id' must be list<list<int>>, not list<.*int64>"),
        (ITEM, pyarrow.int64(), 1, "'uni_seq_item_id' must be .* not int64"),
        (ITEM, pyarrow.list_(pyarrow.list_(pyarrow.string())), [["1"]], "'uni_seq_item_id' must be .*string"),
        (CATE, pyarrow.list_(pyarrow.list_(pyarrow.float32())), [[1.0]], "'uni_seq_cate_id' must be .*float"),
        (TEXT, pyarrow.list_(pyarrow.string()), ["x"], "'text' must be a string, not list"),
        (TEXT, pyarrow.binary(), b"x", "'text' must be a string, not binary"),
    ],
)
def test_a_column_of_the_wrong_type_is_named(write, make_row, column, kind, cell, message):
    row = make_row([1], QUESTION)
    schema = schema_with(write([row]), column, kind)
    with pytest.raises(DataError, match=message):
        OfficialFile(write([{**row, column: cell}], schema))


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.7, 0.99])
def test_a_file_cut_short(write, make_row, share):
    path = write([make_row(range(50), QUESTION) for _ in range(10)])
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"align_data_eval.arrow: is not a whole Arrow IPC file"):
        OfficialFile(path)


def test_a_file_cut_in_its_middle(write, make_row):
    path = write([make_row(range(50), QUESTION) for _ in range(10)])
    whole = path.read_bytes()
    path.write_bytes(whole[:2_000] + whole[-3_000:])
    with pytest.raises(DataError, match="is not a whole Arrow IPC file"):
        OfficialFile(path)


@pytest.mark.parametrize("content", [b"user,item\n1,2\n" * 100, b"PAR1" + bytes(200) + b"PAR1"])
def test_another_format(tmp_path, content):
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(DataError, match="is not a whole Arrow IPC file"):
        OfficialFile(tmp_path / "a.arrow")


def test_a_stream_is_not_a_file(write, make_row):
    path = write([make_row([1])])
    table = pyarrow.ipc.open_file(path).read_all()
    with pyarrow.ipc.new_stream(path.with_name("stream.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="is not a whole Arrow IPC file"):
        OfficialFile(path.with_name("stream.arrow"))


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.arrow", tmp_path):
        with pytest.raises(DataError, match="there is no such file"):
            OfficialFile(path)


def test_a_missing_extra_is_named(write, make_row, monkeypatch):
    path = write([make_row([1])])
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what an uninstalled module looks like to `import`
    with pytest.raises(MissingExtraError, match=r"persona\[train\]"):
        OfficialFile(path)


# --- rows that are wrong ----------------------------------------------------------------------------------------

USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "not JSON",
        "[" * 100_000,
        "3",
        '"ab"',
        "{}",
        "[]",
        json.dumps([USER]),
        json.dumps([USER, ASSISTANT, USER]),
        json.dumps([ASSISTANT, USER]),
        json.dumps([USER, {"role": "assistant"}]),
        json.dumps([USER, {**ASSISTANT, "content": 3}]),
        json.dumps([{**USER, "content": None}, ASSISTANT]),
        json.dumps([USER, "A"]),
        json.dumps({"user": QUESTION, "assistant": "A"}),
    ],
    ids=lambda text: repr(text)[:20],
)
def test_a_text_that_is_not_two_turns_names_its_row_and_spares_the_others(write, make_row, text):
    good = make_row([1], QUESTION)
    file = OfficialFile(write([good, {**good, TEXT: text}]))
    assert file[0].answer == "A"
    with pytest.raises(DataError, match=r"align_data_eval.arrow, row 1 \(counted from 0\): text is not the JSON"):
        file[1]


@pytest.mark.parametrize("column", [*IDS.values(), *TOKENS.values()])
def test_columns_of_different_lengths(write, make_row, column):
    row = make_row([1, 2, 3])
    file = OfficialFile(write([make_row([1]), {**row, column: row[column][:2]}]))
    with pytest.raises(DataError, match=r"row 1 .*has [23] clicks and uni_seq_item_id [23]"):
        file[1]


@pytest.mark.parametrize("bag", [[], [1, 2], None])
def test_a_click_has_one_item(write, make_row, bag):
    with pytest.raises(DataError, match=r"row 0 .*a click in uni_seq_item_id must have exactly one id"):
        OfficialFile(write([{**make_row([1, 2]), ITEM: [[1], bag]}]))[0]


def test_a_null_is_no_id(write, make_row):
    with pytest.raises(DataError, match=r"row 0 .*uni_seq_cate_id has a null for an id"):
        OfficialFile(write([{**make_row([1, 2]), CATE: [[1], [2, None]]}]))[0]


# --- histories --------------------------------------------------------------------------------------------------


def test_a_history_has_ids_attributes_and_order(write, make_row):
    row = {**make_row([40, 5]), CATE: [[12, 7], []], IDS["brand"]: [[3], None]}
    history = to_history(OfficialFile(write([row]))[0], "ana")
    assert history.user == "ana"
    first = {"cate": "cate 12 7", "brand": "brand 3", "shop": "shop 0", "seller": "seller 7"}
    second = {"cate": None, "brand": None, "shop": "shop 5", "seller": "seller 5"}
    assert history.events == (
        Event("click", 0.0, item_id="40", attributes=first),
        Event("click", 1.0, item_id="5", attributes=second),
    )


def test_titles_are_decoded_where_there_are_some(write, make_row):
    row = {**make_row([1, 2]), TOKENS["title_bpe"]: [[7, 8], []]}
    history = to_history(OfficialFile(write([row]))[0], "ana", decode=lambda ids: f"title of {ids}")
    assert [e.text for e in history.events] == ["title of [7, 8]", None]


@pytest.mark.parametrize("missing", [[], None])
def test_users_without_clicks_and_with_one(write, make_row, missing):
    nobody = dict.fromkeys((*IDS.values(), *TOKENS.values()), missing)
    file = OfficialFile(write([nobody, make_row([9])]))
    empty, one = (to_history(row, "ana") for row in file)
    assert len(empty) == 0 and [e.item_id for e in one.events] == ["9"]


def test_the_newest_512_clicks_are_kept(write, make_row):
    file = OfficialFile(write([make_row(range(512)), make_row(range(600))]))
    exact, longer = (to_history(row, "ana", decode=str).events for row in file)
    assert len(exact) == len(longer) == 512
    assert (exact[0].item_id, longer[0].item_id, longer[-1].item_id) == ("0", "88", "599")
    assert (longer[0].timestamp, longer[-1].timestamp) == (0.0, 511.0)
    assert (longer[0].attributes["cate"], longer[0].text) == ("cate 0", "[38, 0]")  # of item 88: 88 % 8 and 88 % 50


def test_a_user_needs_a_name(write, make_row):
    with pytest.raises(EventError, match="user id"):
        to_history(OfficialFile(write([make_row([1])]))[0], "")
