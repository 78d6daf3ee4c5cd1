"""A note beside trained weights of whom they have seen, so that nobody is ever taken for a test user by mistake."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path

from persona.errors import DataError
from persona.history import History

TRAINED_ON = "trained_on.json"


def fingerprint(*what: object) -> str:
    """16 hex digits of whatever tells one user, or one question, from all others."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def user_fingerprint(history: History) -> str:
    """Of a user's id and first timed event: a growing history keeps it, a namesake has another."""
    return fingerprint(history.user, history.timed[:1])


def write_trained_on(fingerprints: Iterable[str], folder: str | Path) -> None:
    """Notes beside a trained LM or adapter what it has learned from."""
    (Path(folder) / TRAINED_ON).write_text(json.dumps(sorted(set(fingerprints)), indent=0) + "\n")


def trained_on(folder: str | Path) -> set[str]:
    """What is noted in `folder`; nothing where there is no note."""
    file = Path(folder) / TRAINED_ON
    return set(json.loads(file.read_text())) if file.exists() else set()


def check_unseen(fingerprints: Collection[str], folder: str | Path, what: str = "users") -> None:
    """Raises `DataError` if what lies in `folder` was trained on any of these; without a note nothing is known."""
    if known := trained_on(folder).intersection(fingerprints):
        raise DataError(
            f"{folder} was trained on {len(known)} of the {len(set(fingerprints))} {what} to be asked: the records or "
            "the split have changed since. Train again, or bring the records that it was trained with"
        )
