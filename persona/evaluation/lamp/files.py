"""The official files of LaMP: questions as a stream of samples, gold outputs, and predictions in the same format.

The data are not part of persona: `download_lamp` fetches them, under their own licence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from persona.errors import DataError, EventError, MissingExtraError, PersonaError
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import Task
from persona.history import Event, History

SOURCE = "profile"
"""Source of the events."""
SPLITS = ("user", "time")
"""Users of one part are in no other; or users are in all parts, and what is asked about is newest in test."""
PARTS = ("train", "dev", "test")
"""Parts of each split."""


def official_paths(folder: Path, task: Task, split: str, part: str) -> tuple[Path, Path | None]:
    """Where the questions and the outputs of a part lie in a folder that is laid out like the official server.

    The outputs are None for the user split's test part, which are not public. Raises `PersonaError` for a split that
    is not "user" or "time", and for a part that is not "train", "dev" or "test".
    """
    for name, value, known in (("split", split, SPLITS), ("part", part, PARTS)):
        if value not in known:
            raise PersonaError(f"a {name} of LaMP is {' or '.join(known)}, not {value!r}")
    if split == "time":
        folder = folder / "time"
    folder = folder / task.name.removesuffix("N") / ("new" if task.name == "LaMP_2" else "") / part
    public = (split, part) != ("user", "test")
    return folder / f"{part}_questions.json", folder / f"{part}_outputs.json" if public else None


def read_samples(questions: Path, outputs: Path | None, task: Task) -> Iterator[Sample]:
    """The samples of a questions file, in its order, with their gold outputs if there is an outputs file.

    One question is in memory at a time. An item's `text` begins with its label where retrieval does not read the
    label, as in "5: great stuff"; its time is its date, or its place in the profile (0, 1, ...) if no item has a date.
    Raises `DataError` on the way: for a file that is not whole JSON, naming question, item and field for a record that
    is not sound, and, after all samples or instead of the first one without an output, when the ids of the two files
    differ. Raises `MissingExtraError` without ijson.
    """
    golds = None if outputs is None else read_predictions(outputs, task)
    unanswered: list[str] = []
    for question_id, question in _questions(questions):
        gold = None if golds is None else golds.pop(question_id, None)
        if golds is not None and gold is None:
            unanswered.append(question_id)
        if not unanswered:
            yield _sample(f"{questions}, question {question_id!r}", question_id, question, gold, task)
    if unanswered or golds:
        raise DataError(
            f"{outputs}: its ids must be those of {questions}, but {_count(unanswered)} questions have no output and "
            f"{_count(golds or ())} outputs have no question; take both files of the same part"
        )


def read_predictions(path: Path, task: Task) -> dict[str, str]:
    """Question id to text, of a file of predictions or of gold outputs.

    Raises `DataError` for a file that is not whole JSON or of another task, and for a wrong or repeated record.
    """
    with open_json(path, "{") as file:
        (document,) = import_ijson().items(file, "")
    # The movies took the number of the news in later versions; the news files still bear it.
    names = (task.name, "LaMP_2") if task.name == "LaMP_2N" else (task.name,)
    if document.get("task") not in names:
        raise DataError(f"{path}: task is {document.get('task')!r}; this must be a file of {task.name}")
    predictions: dict[str, str] = {}
    for place, record in enumerate(_field(f"{path}", document, "golds", list)):
        where = f"{path}, record {place} of golds (counted from 0)"
        question_id = _id(where, record)
        if question_id in predictions:
            raise DataError(f"{where}: a record before it has the id {question_id!r} too; an id has one output")
        predictions[question_id] = str(_field(where, record, "output", str, int, Decimal))
    return predictions


def write_predictions(path: Path, task: Task, predictions: Mapping[str, str]) -> None:
    """Writes predictions, question id to text, in the official format; the file appears whole or not at all.

    Raises `DataError` naming the id for a prediction that is not a string, or one that UTF-8 cannot hold.
    """
    golds = [{"id": question_id, "output": text} for question_id, text in predictions.items()]
    for gold in golds:
        where = f"prediction {gold['id']!r} for {path}"
        try:
            _field(where, gold, "output", str).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: is not valid Unicode ({error.reason} at character {error.start})") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    document = json.dumps({"task": task.name, "golds": golds}, ensure_ascii=False, indent=1)
    unfinished.write_text(f"{document}\n", encoding="utf-8")
    unfinished.replace(path)


def import_ijson() -> ModuleType:
    """The streaming JSON parser; raises `MissingExtraError` naming the extra without it."""
    try:
        import ijson
    except ImportError as error:
        raise MissingExtraError("the files of LaMP need ijson: pip install 'persona[eval]'") from error
    return ijson


@contextmanager
def open_json(path: Path, first: str) -> Iterator[BinaryIO]:
    """The file, open at `first`, the bracket it must begin with after a byte order mark and blanks, if any.

    Raises `DataError` for a file that cannot be read or begins otherwise, and when ijson, inside, finds it damaged.
    """
    ijson = import_ijson()
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
            if begin[:1] != first.encode():
                found = f"begins with {begin[:15].decode(errors='replace')!r}" if begin else "is empty"
                page = " (a web page, which is what the server sends for a wrong address)" * begin.startswith(b"<")
                raise DataError(f"{path}: {found}{page}; it must begin with {first}")
            file.seek(len(head) - len(begin))
            yield file
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); `persona data lamp` fetches files of a task"
        ) from None
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = re.split(r"\n|\\n", str(error))[0].removeprefix("b'")  # a drawing of the place follows
        raise DataError(f"{path}: is not whole JSON ({reason}); fetch or write it again") from None


def _questions(path: Path) -> Iterator[tuple[str, dict]]:
    """The ids, which are unique, and the raw records."""
    seen: set[str] = set()
    with open_json(path, "[") as file:
        for place, question in enumerate(import_ijson().items(file, "item")):
            where = f"{path}, record {place} (counted from 0)"
            question_id = _id(where, question)
            if question_id in seen:
                raise DataError(f"{where}: a question before it has the id {question_id!r} too; ids must be unique")
            seen.add(question_id)
            yield question_id, question


def _sample(where: str, question_id: str, question: dict, gold: str | None, task: Task) -> Sample:
    text, items = _field(where, question, "input", str), _field(where, question, "profile", list)
    user = _id(where, question, "user_id") if "user_id" in question else question_id
    places = [f"{where}, item {_id(f'{where}, item {n} (counted from 0)', item)!r}" for n, item in enumerate(items)]
    times = _times(places, items)
    events = [_event(place, item, time, task) for place, item, time in zip(places, items, times)]
    try:
        return Sample(question_id, text, History(user, tuple(events)), gold)
    except EventError as error:
        raise DataError(f"{where}: {error}") from None


def _event(where: str, item: dict, time: float, task: Task) -> Event:
    fields = {name: str(_field(where, item, name, str, int, Decimal)) for name in task.fields}
    try:
        value = float(fields[task.label]) if task.kind == "rating" else None
    except ValueError:
        raise DataError(f"{where}: {task.label} must be a number, not {fields[task.label]!r}") from None
    try:
        return Event(SOURCE, time, task.labelled(fields), value=value, attributes=fields, event_id=_id(where, item))
    except EventError as error:
        raise DataError(f"{where}: {error}") from None


def _times(places: list[str], items: list[dict]) -> list[float]:
    """Seconds since 1970-01-01 UTC, or places in the profile if there are no dates at all."""
    undated = [place for place, item in zip(places, items) if item.get("date") is None]
    if len(undated) == len(items):
        return [float(place) for place in range(len(items))]
    if undated:
        raise DataError(f"{undated[0]}: date is missing; all items of a profile have a date or none has")
    return list(map(_seconds, places, items))


def _seconds(where: str, item: dict) -> float:
    date = item["date"]
    try:
        moment = datetime.fromisoformat(f"{date}-01-01" if re.fullmatch(r"\d{4}", str(date)) else date)
    except (TypeError, ValueError):
        raise DataError(f"{where}: date must be YYYY-MM-DD, a year, or an ISO date and time, not {date!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _id(where: str, record, name: str = "id") -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be a JSON object, not {record!r}"[:300])
    value = str(_field(where, record, name, str, int))
    if not value:
        raise DataError(f"{where}: {name} is empty; records are told apart by it")
    return value


def _field(where: str, record: Mapping, name: str, *kinds: type):
    """The field, which must be there and of one of these kinds."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, kinds):
        found = "missing" if name not in record else "null" if value is None else f"a {type(value).__name__}"
        wanted = "a list" if list in kinds else "a string" + " or a number" * (len(kinds) > 1)
        raise DataError(f"{where}: {name} is {found}; it must be {wanted}")
    return value


def _count(ids: Collection[str]) -> str:
    """How many ids, and which, up to three."""
    return f"{len(ids)} ({', '.join(map(repr, list(ids)[:3]))}{', ...' * (len(ids) > 3)})" if ids else "0"
