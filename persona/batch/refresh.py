"""`refresh`: embeddings or states of all users by many actors of Ray Data, resumable, in bounded memory."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona.batch.function import EmbedUsers
from persona.batch.work import FilesToParts, StoreToCache, StoreToParts, Work
from persona.encoders.embed_files import (
    check_apart,
    check_asked,
    file_manifest,
    is_whole,
    unknown_listing,
    unknown_sources,
)
from persona.encoders.part_files import PartFiles
from persona.errors import MissingExtraError, PersonaError
from persona.history.event_files import EventFiles
from persona.store import EventStore, open_embeddings

if TYPE_CHECKING:
    import pyarrow

IN_FLIGHT = 2
"""Parts that wait at an actor or are worked on there; all others wait in the driver, as numbers or ids."""


@dataclass(frozen=True)
class Refreshed:
    """What a run of `refresh` came to."""

    users: int
    """Users in the files or in the store."""
    refreshed: int
    """Users who were encoded."""
    skipped: int
    """Users who were up to date already. Of a store, these may be users whose actor was killed before it could tell."""
    unknown: Mapping[str, int]
    """Source that the encoder does not know to its number of events: of the files, or of what was read of a store."""

    def __str__(self) -> str:
        return f"{self.users} users, {self.refreshed} refreshed and {self.skipped} up to date already"


@dataclass
class _Plan:
    """What is to be done."""

    work: type[Work]
    arguments: dict[str, Any]
    """Of `work`, but for `embed`."""
    parts: list[pyarrow.Table]
    """One row each: what `work` takes."""
    users: int
    skipped: int
    unknown: Mapping[str, int]
    files: EventFiles | None = None
    """What all actors are to share."""


def refresh(
    encoder: str | Path,
    *,
    events: str | Path | None = None,
    store: str | None = None,
    tenant: str = "default",
    out: str | Path | None = None,
    cache: str | None = None,
    cache_ttl: float = 7 * 86400.0,
    instructions: Sequence[str] = ("",),
    dim: int | None = None,
    tokens: int | None = None,
    actors: int = 1,
    gpus_per_actor: float = 0.0,
    batch_size: int = 256,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Refreshed:
    """Encodes all users, `batch_size` at a time in the order of their ids, each such part by one of `actors` actors.

    From `events` (Parquet, see `EventFiles`) to the folder `out`: the files that `embed_file` writes, which is why
    either goes on with what the other began; numbers may differ in their last digits, as texts are encoded together
    with others. From an event store (its URL, and `tenant`) to `out`: the same columns, each user's as of when its
    part was made; called again, it makes those parts anew whose users have changed. From an event store to `cache`
    (see `open_embeddings`): users' states, which servers read; those of the store's present revision stay.

    Uses the Ray that runs or that RAY_ADDRESS names, or else starts one for the time of the call. An actor takes one
    CPU and `gpus_per_actor` GPUs, all of which Ray must have when the run begins. A part whose actor dies is made by
    another, for as long as it takes: a part that needs more memory than there is is tried for ever. Files of events are
    held once by each machine, in Ray's object store; beyond them an actor holds one part and this process the numbers
    of parts, or the ids of a store's users. On several machines, folders and databases must have the same name
    everywhere.

    Raises `PersonaError` for a combination that makes no sense, a store without users, and whatever ends a part;
    further what `EmbedUsers`, `EventFiles`, `EventStore` and `PartFiles` raise; `MissingExtraError` without Ray.
    """
    _check(events, store, out, cache, actors, gpus_per_actor)
    check_asked(list(instructions), batch_size)
    if cache is not None and (list(instructions) != [""] or (dim, tokens, overwrite) != (None, None, False)):
        raise PersonaError("a cache holds users' states, which no instruction, dim or tokens change, and no overwrite")
    device = "cuda" if gpus_per_actor else "cpu"
    embed = EmbedUsers(encoder, instructions, dim=dim, tokens=tokens, device=device)
    if events is not None:
        plan = _files_to_parts(embed, events, out, batch_size, overwrite, say)
    else:
        plan = _from_store(embed, store, tenant, out, cache, cache_ttl, batch_size, overwrite)
    if plan.unknown:
        say(unknown_listing(plan.unknown))
    refreshed, skipped, unknown = 0, plan.skipped, Counter(plan.unknown)
    began, count = time.monotonic(), len(plan.parts)
    for number, done in enumerate(_run(plan, embed, actors, gpus_per_actor), 1):
        refreshed += done["refreshed"]
        skipped += done["skipped"]
        unknown.update(json.loads(done["unknown"]))
        if number % max(1, count // 20) == 0:
            rate = refreshed / (time.monotonic() - began)
            say(f"{number} of {count} parts: {refreshed} users refreshed, {rate:.1f} a second; {skipped} up to date")
    if unknown != plan.unknown:
        say(unknown_listing(unknown))
    if plan.work is StoreToParts:
        plan.arguments["made"].drop(count)  # of users who are gone
    return Refreshed(plan.users, refreshed, skipped, dict(unknown))


def _check(events, store, out, cache, actors: int, gpus_per_actor: float) -> None:
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("a refresh by several actors needs Ray: pip install 'persona[ray]'") from error
    if (events is None) == (store is None):
        raise PersonaError("users come from Parquet files of events or from an event store: give one of both")
    if (out is None) == (cache is None):
        raise PersonaError("users go to a folder of Parquet or to a shared cache: give one of both")
    if events is not None and cache is not None:
        raise PersonaError("a cache is kept by the revisions of an event store, which files do not have: give a store")
    if actors < 1:
        raise PersonaError(f"there is at least 1 actor, not {actors}")
    if gpus_per_actor < 0:
        raise PersonaError(f"an actor takes 0 GPUs or more, not {gpus_per_actor:g}")


def _files_to_parts(
    embed: EmbedUsers, events: str | Path, out: str | Path, batch_size: int, overwrite: bool, say: Callable[[str], None]
) -> _Plan:
    check_apart(events, out)
    files, each = EventFiles(events), len(embed.instructions)
    say(f"read {files}")
    manifest = file_manifest(files, embed.revision, embed.instructions, embed.dim, embed.tokens, batch_size)
    made = PartFiles(Path(out).resolve(), manifest)
    made.prepare(overwrite)
    firsts = range(0, len(files), batch_size)
    every = [{"number": n, "first": f, "users": min(batch_size, len(files) - f)} for n, f in enumerate(firsts)]
    parts = [part for part in every if not is_whole(made, part["number"], part["users"] * each, say)]
    skipped = len(files) - sum(part["users"] for part in parts)
    unknown = unknown_sources(files.sources, embed.sources)
    return _Plan(FilesToParts, {"made": made}, [_table(p) for p in parts], len(files), skipped, unknown, files)


def _from_store(
    embed: EmbedUsers,
    url: str,
    tenant: str,
    out: str | Path | None,
    cache: str | None,
    cache_ttl: float,
    batch_size: int,
    overwrite: bool,
) -> _Plan:
    with EventStore(url) as store:
        pages = enumerate(store.user_pages(batch_size, tenant=tenant))
        parts = [_table({"number": number, "ids": page, "users": len(page)}) for number, page in pages]
        if not parts:
            raise PersonaError(f"the event store has no events of the tenant {tenant!r}")
        if cache is not None:
            open_embeddings(cache, store, ttl=cache_ttl).check()
    users = sum(part["users"][0].as_py() for part in parts)
    arguments = {"store": url, "tenant": tenant}
    if cache is not None:
        return _Plan(StoreToCache, {**arguments, "cache": cache, "ttl": cache_ttl}, parts, users, 0, {})
    manifest = {
        "revision": embed.revision,
        "instructions": list(embed.instructions),
        "dim": embed.dim,
        "tokens": embed.tokens,
        "batch_size": batch_size,
        "events": {},
        "tenant": tenant,
    }
    made = PartFiles(Path(out).resolve(), manifest)
    made.prepare(overwrite)
    return _Plan(StoreToParts, {**arguments, "made": made}, parts, users, 0, {})


def _table(part: dict[str, Any]) -> pyarrow.Table:
    """One row, as ids take a third of the memory in Arrow's strings."""
    import pyarrow

    return pyarrow.table({key: [value] for key, value in part.items()})


def _run(plan: _Plan, embed: EmbedUsers, actors: int, gpus_per_actor: float) -> Iterator[dict[str, Any]]:
    """What becomes of each part, in the order in which they are done."""
    if not plan.parts:
        return
    import ray

    with _started(actors, gpus_per_actor):
        arguments = {"embed": embed, **plan.arguments}
        if plan.files is not None:
            arguments["users"], plan.files = ray.put(plan.files), None
        strategy = ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=IN_FLIGHT)
        # A table is a block: what an actor gets, and gets again after it died.
        parts = ray.data.from_blocks(plan.parts).map(
            plan.work,
            fn_constructor_kwargs=arguments,
            compute=strategy,
            num_cpus=1,
            num_gpus=gpus_per_actor or None,
        )
        parts.context.enable_progress_bars = parts.context.print_on_execution_start = False
        for done in parts.iter_rows():
            if done["error"]:
                raise PersonaError(done["error"])
            yield done


@contextmanager
def _started(actors: int, gpus_per_actor: float) -> Iterator[None]:
    """Ray, with enough for all actors; one that was started for this is stopped at the end."""
    import ray

    own = not ray.is_initialized()
    if own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        local = {"address": "local", "num_cpus": max(actors, os.cpu_count() or 1), "include_dashboard": False}
        try:
            ray.init(
                **({} if os.environ.get("RAY_ADDRESS") else local), log_to_driver=False, logging_level=logging.ERROR
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PersonaError(f"Ray cannot be started or reached: {error}") from error
    try:
        found = ray.cluster_resources()
        for name, needed in (("CPU", actors), ("GPU", actors * gpus_per_actor)):
            if found.get(name, 0) < needed:
                raise PersonaError(
                    f"{actors} actors need {needed:g} {name}s, Ray has {found.get(name, 0):g}: take fewer actors"
                )
        yield
    finally:
        if own:
            ray.shutdown()
