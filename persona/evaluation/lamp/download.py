"""Downloads the official files of LaMP into the folder layout of its server. The data are not part of persona."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import http_get

from persona.errors import DataError, PersonaError
from persona.evaluation.lamp.files import PARTS, import_ijson, official_paths, open_json
from persona.evaluation.lamp.tasks import Task

BASE = "https://ciir.cs.umass.edu/downloads/LaMP"
"""The authors' server."""
NOTICE = (
    "The data of LaMP come from its authors and are not shipped with persona. Their licence is CC BY-NC-SA 4.0: no "
    "commercial use. If you use them, cite Salemi et al., LaMP: When Large Language Models Meet Personalization, "
    "arXiv 2304.11406."
)


def download_lamp(
    task: Task,
    split: str,
    out: Path,
    parts: Sequence[str] = PARTS,
    base: str = BASE,
    say: Callable[[str], None] = print,
) -> None:
    """Fetches the questions and outputs of a task's parts to where `official_paths(out, ...)` looks for them.

    `split` is "user" or "time". Files that are there already are not fetched again; a download that breaks off goes on
    from there at the next call. A file takes its name only when it is whole JSON. Raises `PersonaError` for LaMP_6,
    whose mails are not public, for an unknown split or part, and when the server cannot be reached or answers with an
    error; `DataError` when what it sends is not the file; `MissingExtraError` without ijson.
    """
    if task.name == "LaMP_6":
        raise PersonaError(
            "LaMP_6 cannot be downloaded: its mails are the Avocado Research Email Collection, LDC2015T03, which the "
            f"Linguistic Data Consortium licenses; the files made from it go to {out / 'LaMP_6'}"
        )
    import_ijson()  # so that a missing extra is known before, not after, hundreds of megabytes
    paths = [official_paths(Path(), task, split, part) for part in parts]
    say(NOTICE)
    for part, (questions, outputs) in zip(parts, paths):
        _fetch(f"{base}/{questions.as_posix()}", out / questions, "[", say)
        if outputs:
            _fetch(f"{base}/{outputs.as_posix()}", out / outputs, "{", say)
        else:
            say(f"the {part} outputs of the {split} split are not public: none fetched")


def _fetch(url: str, path: Path, first: str, say: Callable[[str], None]) -> None:
    """Fetches a JSON file that begins with `first`, by way of a file beside it."""
    if path.exists():
        say(f"{path} is there already: not fetched")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    start = unfinished.stat().st_size if unfinished.exists() else 0
    say(f"fetching {url}" + f", going on after {start} bytes" * (start > 0))
    try:
        with unfinished.open("ab") as file:
            # Ranges count the bytes as sent, so they must not be compressed. No token of the Hub goes along.
            http_get(url, file, resume_size=start, headers={"Accept-Encoding": "identity"})
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status != 416:
            raise _failed(url, path, unfinished, f"the server answers with status {status}") from None
        # There is nothing after what we have: it is the whole file, or a wrong one, which the check will tell.
    except (HTTPError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise _failed(url, path, unfinished, reason) from None
    try:
        with open_json(unfinished, first) as file:
            deque(import_ijson().basic_parse(file), maxlen=0)
    except DataError as error:
        unfinished.unlink()
        raise DataError(f"{url}: what came is not the file, and was removed. {error}") from None
    unfinished.replace(path)
    say(f"wrote {path}")


def _failed(url: str, path: Path, unfinished: Path, reason: str) -> PersonaError:
    """The error of a download that broke off; what came of it is kept, if anything did."""
    size = unfinished.stat().st_size if unfinished.exists() else 0
    if size:
        kept = f"{size} bytes are kept in {unfinished}, and the next call goes on from there"
    else:
        unfinished.unlink(missing_ok=True)
        kept = "no file was changed"
    return PersonaError(f"{url} cannot be fetched ({reason}); {kept}. The file can also be placed by hand at {path}")
