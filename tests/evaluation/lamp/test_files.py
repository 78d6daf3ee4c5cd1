"""Official files: what they become, every way in which they can be wrong, and how little memory they take."""

import json
import sys
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import pytest

from persona.errors import DataError, MissingExtraError, PersonaError
from persona.evaluation.lamp.files import official_paths, read_predictions, read_samples, write_predictions
from persona.evaluation.lamp.tasks import TASKS, read_task

RATING = read_task("LaMP_3")
HEADLINE = read_task("LaMP_4")
DAY = 86_400.0


def put(path, content):
    """The path, now of a file with this text or JSON."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def review(tmp_path):
    """`review(item, **fields)` is the sample of a LaMP_3 file with this item and these fields of the question."""

    def read(*items, **fields):
        question = {"id": "7", "input": "review: fine", "profile": list(items), **fields}
        question = {name: value for name, value in question.items() if value is not ...}
        return next(read_samples(put(tmp_path / "questions.json", [question]), None, RATING))

    return read


def item(**fields):
    """An item of LaMP_3; `...` takes a field away."""
    fields = {"id": "70", "text": "great stuff", "score": "5", **fields}
    return {name: value for name, value in fields.items() if value is not ...}


# --- samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["user", "time"])
@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_the_files_of_every_task_become_samples(tmp_path, official, records, task, split):
    raw, golds = records(task.name, split)
    samples = list(read_samples(*official(tmp_path, task.name, split), task))
    assert [s.id for s in samples] == ["110", "210", "310"] and [len(s.profile) for s in samples] == [4, 3, 2]
    assert [s.profile.user for s in samples] == (["800", "801", "802"] if split == "time" else ["110", "210", "310"])
    for sample, question, gold in zip(samples, raw, golds):
        assert (sample.input, sample.output) == (question["input"], gold["output"])
        items = question["profile"]
        if "date" in items[0]:
            items = sorted(items, key=lambda raw_item: raw_item["date"])
        assert [e.event_id for e in sample.profile.events] == [raw_item["id"] for raw_item in items]
        for event, raw_item in zip(sample.profile.events, items):
            assert event.source == "profile" and event.attributes == {name: raw_item[name] for name in task.fields}
            assert task.describe(event) in event.text and event.attributes[task.label] in event.text
            assert event.value == (float(raw_item["score"]) if task.name == "LaMP_3" else None)


@pytest.mark.parametrize(
    "name, text",
    [
        ("LaMP_1", "Counting bees with cheap cameras A camera at the hive counts who leaves and who returns."),
        ("LaMP_2", "dystopia: In a city without windows a boy draws the sun."),
        ("LaMP_2N", "sports: A late goal decided the match in the rain."),
        ("LaMP_3", "1: broke on the first day"),
        ("LaMP_4", "Team wins by a whisker A late goal decided the match in the rain."),
        ("LaMP_5", "Counting bees with cheap cameras A camera at the hive counts who leaves and who returns."),
        ("LaMP_6", "Printer is out of ink: Could somebody order the black one?"),
        ("LaMP_7", "coffee first"),
    ],
)
def test_a_text_begins_with_its_label_unless_it_holds_it(tmp_path, official, name, text):
    sample = next(read_samples(*official(tmp_path, name, "user"), read_task(name)))
    assert next(e.text for e in sample.profile.events if e.event_id == "00") == text


def test_items_without_dates_keep_their_places(review):
    sample = review(item(id="9"), item(id="8", date=None), item(id="7"))
    assert [(e.event_id, e.timestamp) for e in sample.profile.events] == [("9", 0.0), ("8", 1.0), ("7", 2.0)]


@pytest.mark.parametrize(
    "date, seconds",
    [
        ("1970-01-02", DAY),
        ("1969-12-31", -DAY),
        ("2016-02-29", datetime(2016, 2, 29, tzinfo=UTC).timestamp()),
        ("1971", 365 * DAY),
        (1971, 365 * DAY),
        ("1970-01-02T06:00:00", 1.25 * DAY),
        ("1970-01-02 06:00:00", 1.25 * DAY),
        ("1970-01-02T06:00:00Z", 1.25 * DAY),
        ("1970-01-02T06:00:00+06:00", DAY),
    ],
)
def test_dates_are_seconds_since_1970(review, date, seconds):
    assert review(item(date=date)).profile.events[0].timestamp == seconds


def test_numbers_become_strings_and_other_keys_do_no_harm(review):
    sample = review(item(id=70, score=4, text=1984, stars=[1]), id=7, user_id=12, extra={"a": None})
    (event,) = sample.profile.events
    assert (sample.id, sample.profile.user, event.event_id) == ("7", "12", "70")
    assert (event.value, event.text, event.attributes) == (4.0, "4: 1984", {"score": "4", "text": "1984"})
    assert review(item(score=4.0)).profile.events[0].attributes["score"] == "4.0"


def test_a_profile_may_be_empty(review):
    assert review().profile.events == ()


def test_a_file_without_questions(tmp_path):
    outputs = put(tmp_path / "outputs.json", {"task": "LaMP_3", "golds": []})
    assert list(read_samples(put(tmp_path / "questions.json", []), outputs, RATING)) == []


def test_a_byte_order_mark_and_blanks_come_before_the_bracket(tmp_path, official):
    questions, outputs = official(tmp_path, "LaMP_3", "user")
    for path in (questions, outputs):
        path.write_bytes(b"\xef\xbb\xbf \r\n\t" + path.read_bytes() + b"\n")
    assert len(list(read_samples(questions, outputs, RATING))) == 3


def test_letters_of_all_alphabets(review):
    assert review(item(text="größer 更大 😀")).profile.events[0].text == "5: größer 更大 😀"


# --- questions that are wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"id": ...}, r"questions.json, record 0 \(counted from 0\): id is missing; it must be a string or a number"),
        ({"id": None}, "record 0 .*: id is null"),
        ({"id": True}, "record 0 .*: id is a bool"),
        ({"id": ""}, "record 0 .*: id is empty"),
        ({"input": ...}, "questions.json, question '7': input is missing; it must be a string"),
        ({"input": 3}, "question '7': input is a int; it must be a string$"),
        ({"profile": ...}, "question '7': profile is missing; it must be a list"),
        ({"profile": {"id": "1"}}, "question '7': profile is a dict; it must be a list"),
        ({"user_id": None}, "question '7': user_id is null"),
        ({"user_id": "x" * 257}, "question '7': a user id has 1 to 256 characters; this one has 257"),
    ],
)
def test_a_question_that_is_wrong_is_named(review, fields, message):
    with pytest.raises(DataError, match=message):
        review(**fields)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("text", r"question '7', item 1 \(counted from 0\): must be a JSON object, not 'text'"),
        (item(id=...), r"question '7', item 1 \(counted from 0\): id is missing"),
        (item(text=...), "question '7', item '70': text is missing; it must be a string or a number"),
        (item(text=None), "question '7', item '70': text is null"),
        (item(text=["a"]), "question '7', item '70': text is a list"),
        (item(score=True), "question '7', item '70': score is a bool"),
        (item(score="good"), "question '7', item '70': score must be a number, not 'good'"),
        (item(score="nan"), "question '7', item '70': event.value is nan"),
    ],
)
def test_an_item_that_is_wrong_is_named(review, wrong, message):
    with pytest.raises(DataError, match=message):
        review(item(id="69"), wrong)


@pytest.mark.parametrize("date", ["soon", "", "2015-13-01", "2015-06", 20150601, 0, 2015.5, True, ["2015"], {"y": 1}])
def test_what_is_no_date(review, date):
    with pytest.raises(DataError, match="question '7', item '70': date must be YYYY-MM-DD, a year, or an ISO date"):
        review(item(date=date))


@pytest.mark.parametrize("missing", [..., None])
def test_some_dates_are_not_enough(review, missing):
    with pytest.raises(DataError, match="question '7', item '71': date is missing; all items of a profile"):
        review(item(date="2015-06-01"), item(id="71", date=missing))


def test_an_id_that_stands_there_twice(tmp_path):
    question = {"id": "7", "input": "review: fine", "profile": []}
    questions = put(tmp_path / "questions.json", [question, {**question, "id": 7}])
    samples = read_samples(questions, None, RATING)
    assert next(samples).id == "7"
    with pytest.raises(DataError, match=r"record 1 \(counted from 0\): a question before it has the id '7' too"):
        next(samples)


@pytest.mark.parametrize("record", ["a", 3, None, []])
def test_a_question_is_an_object(tmp_path, record):
    with pytest.raises(DataError, match=r"record 0 \(counted from 0\): must be a JSON object"):
        list(read_samples(put(tmp_path / "questions.json", [record]), None, RATING))


# --- files that are wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.999])
def test_a_file_cut_short(tmp_path, official, share):
    questions, outputs = official(tmp_path, "LaMP_3", "user")
    for path in (outputs, questions):
        whole = path.read_bytes()
        path.write_bytes(whole[: max(1, int(share * len(whole)))])
        with pytest.raises(DataError, match=rf"{path.name}: is not whole JSON \(parse error: premature EOF\)"):
            list(read_samples(questions, outputs, RATING))
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'[{"id": "1",]', "parse error: invalid object key"),
        (b"[] []", "parse error: trailing garbage"),
        (b'[{"id": "\xff"}]', "lexical error: invalid bytes in UTF8 string."),
        (b"[NaN]", "lexical error"),
    ],
)
def test_a_file_that_is_not_json(tmp_path, content, reason):
    (tmp_path / "questions.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"questions.json: is not whole JSON \({reason}[^\n]*\); fetch"):
        list(read_samples(tmp_path / "questions.json", None, RATING))


@pytest.mark.parametrize(
    "content, message",
    [
        ("<!DOCTYPE html><html></html>", r"begins with '<!DOCTYPE html>' \(a web page, .*; it must begin with "),
        ("id,input\n", "begins with 'id,input"),
        ('"text"', "begins with "),
        ("", "is empty; it must begin with "),
        (" \n", "is empty; it must begin with "),
    ],
)
def test_a_file_that_begins_otherwise(tmp_path, official, content, message):
    questions, outputs = official(tmp_path, "LaMP_3", "user")
    with pytest.raises(DataError, match=f"wrong.json: {message}"):
        list(read_samples(put(tmp_path / "wrong.json", content), outputs, RATING))
    with pytest.raises(DataError, match=f"wrong.json: {message}"):
        list(read_samples(questions, tmp_path / "wrong.json", RATING))


def test_questions_and_outputs_are_not_mistaken_for_each_other(tmp_path, official):
    questions, outputs = official(tmp_path, "LaMP_3", "user")
    with pytest.raises(DataError, match=r"dev_questions.json: begins with '\[.*; it must begin with \{"):
        read_predictions(questions, RATING)
    with pytest.raises(DataError, match=r"dev_outputs.json: begins with '\{.*; it must begin with \["):
        next(read_samples(outputs, None, RATING))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"none.json: cannot be read \(No such file or directory\)"):
        next(read_samples(tmp_path / "none.json", None, RATING))
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        read_predictions(tmp_path, RATING)


def test_a_missing_extra_is_named(tmp_path, official, monkeypatch):
    questions, _ = official(tmp_path, "LaMP_3", "user")
    monkeypatch.setitem(sys.modules, "ijson", None)  # what an uninstalled module looks like to `import`
    with pytest.raises(MissingExtraError, match=r"persona\[eval\]"):
        next(read_samples(questions, None, RATING))


# --- outputs and predictions ------------------------------------------------------------------------------------


def test_without_outputs_there_are_no_golds(tmp_path, official):
    questions, outputs = official(tmp_path, "LaMP_3", "user", part="test")
    assert outputs is None
    assert [s.output for s in read_samples(questions, outputs, RATING)] == [None, None, None]


def test_a_question_without_an_output_ends_the_samples_and_all_are_counted(tmp_path, official, records):
    asked, golds = records("LaMP_3", "user")
    golds = [golds[0], {**golds[1], "id": "a"}, *({"id": f"b{n}", "output": "5"} for n in range(3))]
    samples = read_samples(*official(tmp_path, "LaMP_3", "user", records=(asked, golds)), RATING)
    assert next(samples).id == "110"
    counted = (
        r"dev_outputs.json: .*dev_questions.json, but 2 \('210', '310'\) questions have no output and 4 \('a', 'b0', "
    )
    with pytest.raises(DataError, match=rf"{counted}'b1', \.\.\.\) outputs have no question"):
        next(samples)


def test_an_output_without_a_question_is_found_at_the_end(tmp_path, official, records):
    asked, golds = records("LaMP_3", "user")
    paths = official(tmp_path, "LaMP_3", "user", records=(asked, [*golds, {"id": "x", "output": "5"}]))
    samples = read_samples(*paths, RATING)
    assert [next(samples).id for _ in range(3)] == ["110", "210", "310"]
    with pytest.raises(DataError, match=r"but 0 questions have no output and 1 \('x'\) outputs have no question"):
        next(samples)


def test_ids_of_outputs_may_be_numbers_and_an_output_may_be_empty(tmp_path, official, records):
    asked, golds = records("LaMP_3", "user")
    golds = [{"id": int(gold["id"]), "output": ""} for gold in golds]
    samples = read_samples(*official(tmp_path, "LaMP_3", "user", records=(asked, golds)), RATING)
    assert [s.output for s in samples] == ["", "", ""]


@pytest.mark.parametrize(
    "document, message",
    [
        ({"golds": []}, "task is None; this must be a file of LaMP_3"),
        ({"task": "LaMP_4", "golds": []}, "task is 'LaMP_4'; this must be a file of LaMP_3"),
        ({"task": ["LaMP_3"], "golds": []}, r"task is \['LaMP_3'\]; this must"),
        ({"task": "LaMP_3"}, "p.json: golds is missing; it must be a list"),
        ({"task": "LaMP_3", "golds": {"1": "5"}}, "p.json: golds is a dict; it must be a list"),
        ({"task": "LaMP_3", "golds": ["5"]}, r"p.json, record 0 of golds \(counted from 0\): must be a JSON object"),
        ({"task": "LaMP_3", "golds": [{"output": "5"}]}, "record 0 of golds .*: id is missing"),
        ({"task": "LaMP_3", "golds": [{"id": "1"}]}, "record 0 of golds .*: output is missing; it must be a string"),
        ({"task": "LaMP_3", "golds": [{"id": "1", "output": [5]}]}, "output is a list; it must be a string"),
        (
            {"task": "LaMP_3", "golds": [{"id": "1", "output": "5"}, {"id": 1, "output": "4"}]},
            "record 1 of golds .*: a record before it has the id '1' too",
        ),
    ],
)
def test_predictions_that_are_wrong(tmp_path, document, message):
    with pytest.raises(DataError, match=message):
        read_predictions(put(tmp_path / "p.json", document), RATING)


def test_news_may_be_called_by_the_movies_number_but_movies_not_by_theirs(tmp_path):
    for name in ("LaMP_2", "LaMP_2N"):
        path = put(tmp_path / "p.json", {"task": name, "golds": [{"id": "1", "output": "sports"}]})
        assert read_predictions(path, read_task("2N")) == {"1": "sports"}
    with pytest.raises(DataError, match=r"task is 'LaMP_2N'; this must be a file of LaMP_2$"):
        read_predictions(path, read_task("2"))


def test_predictions_are_written_and_read(tmp_path):
    path = tmp_path / "new" / "predictions.json"
    predictions = {"110": "Größe zählt 😀\n", "210": "", "310": 'a "quote"'}
    write_predictions(path, HEADLINE, dict.fromkeys(predictions, "of an earlier run, which was much longer" * 9))
    write_predictions(path, HEADLINE, predictions)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "task": "LaMP_4",
        "golds": [{"id": name, "output": text} for name, text in predictions.items()],
    }
    assert "Größe zählt 😀" in path.read_text(encoding="utf-8")
    assert read_predictions(path, HEADLINE) == predictions
    assert [p.name for p in path.parent.iterdir()] == ["predictions.json"]


@pytest.mark.parametrize(
    "text, message", [(None, "output is null"), (3, "output is a int"), ("\ud83d", "not valid Uni")]
)
def test_a_prediction_that_is_wrong_leaves_the_file_alone(tmp_path, text, message):
    path = tmp_path / "predictions.json"
    write_predictions(path, HEADLINE, {"1": "before"})
    with pytest.raises(DataError, match=f"prediction '2' for .*predictions.json: .*{message}"):
        write_predictions(path, HEADLINE, {"1": "after", "2": text})
    assert read_predictions(path, HEADLINE) == {"1": "before"} and len(list(tmp_path.iterdir())) == 1


# --- places -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, split, part, questions, outputs",
    [
        ("5", "user", "dev", "LaMP_5/dev/dev_questions.json", "LaMP_5/dev/dev_outputs.json"),
        ("5", "user", "test", "LaMP_5/test/test_questions.json", None),
        ("5", "time", "test", "time/LaMP_5/test/test_questions.json", "time/LaMP_5/test/test_outputs.json"),
        ("2", "user", "train", "LaMP_2/new/train/train_questions.json", "LaMP_2/new/train/train_outputs.json"),
        ("2", "time", "dev", "time/LaMP_2/new/dev/dev_questions.json", "time/LaMP_2/new/dev/dev_outputs.json"),
        ("2N", "user", "dev", "LaMP_2/dev/dev_questions.json", "LaMP_2/dev/dev_outputs.json"),
        ("2N", "time", "dev", "time/LaMP_2/dev/dev_questions.json", "time/LaMP_2/dev/dev_outputs.json"),
    ],
)
def test_files_lie_as_on_the_server(name, split, part, questions, outputs):
    folder = Path("data")
    paths = official_paths(folder, read_task(name), split, part)
    assert paths == (folder / questions, outputs and folder / outputs)


def test_splits_and_parts_that_are_not_there():
    with pytest.raises(PersonaError, match="a split of LaMP is user or time, not 'users'"):
        official_paths(Path(), RATING, "users", "dev")
    with pytest.raises(PersonaError, match="a part of LaMP is train or dev or test, not 'validation'"):
        official_paths(Path(), RATING, "user", "validation")


# --- memory -----------------------------------------------------------------------------------------------------


def test_a_large_file_is_streamed(tmp_path):
    profile = [{"id": str(n), "text": f"review {n} " * 2000, "score": "5", "date": "2015-06-01"} for n in range(11)]
    with (tmp_path / "questions.json").open("w") as file:
        for number in range(300):
            record = json.dumps({"id": str(number), "input": "review: fine", "profile": profile})
            file.write(("," if number else "[") + record)
        file.write("]")
    assert (tmp_path / "questions.json").stat().st_size > 60_000_000
    tracemalloc.start()
    try:
        items = sum(len(sample.profile) for sample in read_samples(tmp_path / "questions.json", None, RATING))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert items == 3_300 and peak < 20_000_000
