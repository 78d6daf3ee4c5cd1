"""`PartFiles`: a folder of Parquet files that are written one by one, each of them there whole or not at all."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from persona.errors import PersonaError

if TYPE_CHECKING:
    import pyarrow

MANIFEST = "_manifest.json"
"""Settings and digests of a run. Named so that pandas, pyarrow and Spark, which read the folder, pass over it."""
TEMPORARY = ".writing-"
"""What the names of files begin with that are not whole."""
ABANDONED = 3600.0
"""Seconds after which nobody on another machine is taken to be still writing such a file."""


class PartFiles:
    """part-00000.parquet... in `folder`, made by a run of the settings `manifest`.

    Several processes may write parts at once. Methods raise `PersonaError` where they cannot read or write.
    """

    def __init__(self, folder: str | Path, manifest: Mapping):
        self.folder, self.manifest = Path(folder), dict(manifest)

    def prepare(self, overwrite: bool = False) -> None:
        """Makes the folder fit for the run: new, or holding whole parts of such a run alone; `overwrite` empties it.

        Raises `PersonaError` for a folder that holds anything else, or parts made with other settings.
        """
        with self._for_people("written"):
            self._prepare(overwrite)

    def path(self, number: int) -> Path:
        """Where a part lies."""
        return self.folder / f"part-{number:05d}.parquet"

    def metadata(self, number: int) -> pyarrow.parquet.FileMetaData | None:
        """What the file of a part says of itself; None for one that is missing or damaged."""
        import pyarrow.parquet

        with self._for_people("read"):
            try:
                return pyarrow.parquet.read_metadata(self.path(number))
            except (pyarrow.ArrowException, FileNotFoundError):
                return None

    def write(self, number: int, table: pyarrow.Table) -> None:
        """Writes a part, in the place of an older one."""
        import pyarrow.parquet

        with self._for_people("written"):
            _write(self.path(number), lambda file: pyarrow.parquet.write_table(table, file, compression="zstd"))

    def drop(self, first: int) -> None:
        """Erases the parts from number `first` on."""
        with self._for_people("written"):
            for path in list(self.folder.iterdir()):
                found = re.fullmatch(r"part-(\d{5,})\.parquet", path.name)
                if found and int(found[1]) >= first:
                    path.unlink()

    @contextmanager
    def _for_people(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PersonaError(f"{self.folder} cannot be {what}: {error}") from error

    def _prepare(self, overwrite: bool) -> None:
        out = self.folder
        if out.exists() and not out.is_dir():
            raise PersonaError(f"{out} is a file; name a folder for the embeddings")
        out.mkdir(parents=True, exist_ok=True)
        for path in out.glob(f"{TEMPORARY}*"):
            with suppress(FileNotFoundError):  # its process has just finished it
                if _abandoned(path):
                    path.unlink()
        path = out / MANIFEST
        if not path.exists():
            if found := sorted(path.name for path in out.iterdir() if not path.name.startswith(TEMPORARY)):
                listing = ", ".join(found[:5]) + ", ..." * (len(found) > 5)
                raise PersonaError(f"{out} holds {listing}, but no {MANIFEST} of an earlier run; name another folder")
        elif overwrite:
            self.drop(0)
        elif differences := _differences(path, self.manifest):
            raise PersonaError(
                f"{out} holds embeddings that were made otherwise: {'; '.join(differences)}. "
                "Replace them with --overwrite, or name another folder"
            )
        else:
            return
        text = json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n"
        _write(path, lambda file: file.write(text.encode()))


def _abandoned(path: Path) -> bool:
    """Whether the process that wrote a file that is not whole was killed."""
    pid, _, rest = path.name.removeprefix(TEMPORARY).partition("@")
    if not rest.startswith(f"{socket.gethostname()}-"):
        return time.time() - path.stat().st_mtime > ABANDONED
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False


def _differences(path: Path, manifest: Mapping) -> list[str]:
    """What differs in an earlier manifest, in words."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        files = dict(before["events"])
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST} is damaged"]
    now = manifest["events"]
    changed = sorted(name for name in now | files if now.get(name) != files.get(name))
    plain = [key for key in manifest if key != "events" and before.get(key) != manifest[key]]
    found = [f"{key} was {before.get(key)!r} and is {manifest[key]!r}" for key in plain]
    if changed:
        listing = ", ".join(changed[:5]) + ", ..." * (len(changed) > 5)
        found.append(f"files of events changed, came or went: {listing}")
    return found


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}@{socket.gethostname()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
