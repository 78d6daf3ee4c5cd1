"""What an actor does with one part of the users. Each part is made whole or not at all, so it can be made twice."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from persona.batch.function import EmbedUsers
from persona.encoders.embed_files import READ, unknown_sources
from persona.encoders.part_files import PartFiles
from persona.encoders.state_bytes import state_to_bytes
from persona.errors import PersonaError
from persona.history import History
from persona.store import EmbeddingStore, EventStore, Stored, open_embeddings, space_name

if TYPE_CHECKING:
    import ray

REVISIONS = b"persona.revisions"
"""Key in the metadata of a part that was made of an event store: digest of its users and of their revisions."""
ROUNDS = 3
"""How often a user is encoded again who changes all the time, before it is left to the next run or request."""


class Work:
    """A part as a dict -> how many of its users were `refreshed` and `skipped`, as they were up to date; the number of
    events by `unknown` source, as JSON; and the message of the error that ended it, or "".
    """

    def __init__(self, embed: EmbedUsers):
        torch.set_num_threads(1)  # an actor has one core; results may depend on the number, too
        self.embed = embed

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """See the class. What is no `PersonaError` is raised."""
        try:
            refreshed, unknown = self.do(part)
        except PersonaError as error:
            return {"refreshed": 0, "skipped": 0, "unknown": "{}", "error": str(error)}
        skipped = part["users"] - refreshed
        return {"refreshed": refreshed, "skipped": skipped, "unknown": json.dumps(unknown), "error": ""}

    def do(self, part: dict[str, Any]) -> tuple[int, Mapping[str, int]]:
        """Number of users refreshed, and of events by unknown source."""
        raise NotImplementedError


class FilesToParts(Work):
    """Users number `first` to `first + users` of `EventFiles`, which all actors of a machine share, to a part file."""

    def __init__(self, embed: EmbedUsers, made: PartFiles, users: ray.ObjectRef):
        import ray

        super().__init__(embed)
        self.made, self.users = made, ray.get(users)

    def do(self, part: dict[str, Any]) -> tuple[int, Mapping[str, int]]:
        """Always makes the part."""
        histories = self.users.histories(part["first"], part["first"] + part["users"])
        self.made.write(part["number"], self.embed.rows(histories))
        return len(histories), {}


class StoreWork(Work):
    """Work on the users `ids` of a tenant of an event store."""

    def __init__(self, embed: EmbedUsers, store: str, tenant: str):
        super().__init__(embed)
        self.url, self.tenant = store, tenant

    @cached_property
    def store(self) -> EventStore:
        """Opened at the first part, so that an error of it is a part's."""
        return EventStore(self.url)

    def histories(self, users: Sequence[str]) -> list[History]:
        """What the encoder reads of users, as a server reads it: one event more, which says that there are more."""
        found = self.store.histories(users, last=self.embed.max_events + 1, tenant=self.tenant)
        return [found[user] for user in users]

    def unknown(self, histories: Iterable[History]) -> Mapping[str, int]:
        """Number of events by unknown source."""
        return unknown_sources(Counter(e.source for h in histories for e in h.events), self.embed.sources)


class StoreToParts(StoreWork):
    """Users to a part file, unless it is there and was made of the same users and revisions."""

    def __init__(self, embed: EmbedUsers, store: str, tenant: str, made: PartFiles):
        super().__init__(embed, store, tenant)
        self.made = made

    def do(self, part: dict[str, Any]) -> tuple[int, Mapping[str, int]]:
        """Users who were forgotten since the run began get no row."""
        revisions = {u: r for u, r in self.store.revisions(part["ids"], tenant=self.tenant).items() if r}
        digest = hashlib.sha256(json.dumps(sorted(revisions.items())).encode()).hexdigest().encode()
        found = self.made.metadata(part["number"])
        if (found and (found.metadata or {}).get(REVISIONS) == digest) or not revisions:
            return 0, {}
        # Read after the revisions: a part may be newer than it says, and is made again, but never older.
        histories = self.histories(list(revisions))
        self.made.write(part["number"], self.embed.rows(histories).replace_schema_metadata({REVISIONS: digest}))
        return len(histories), self.unknown(histories)


class StoreToCache(StoreWork):
    """States of users to the shared cache, for servers to read; of those whose state is of an older revision."""

    def __init__(self, embed: EmbedUsers, store: str, tenant: str, cache: str, ttl: float):
        super().__init__(embed, store, tenant)
        self.cache_url, self.ttl, self.space = cache, ttl, space_name(embed.revision)

    @cached_property
    def cache(self) -> EmbeddingStore:
        """Opened at the first part."""
        return open_embeddings(self.cache_url, self.store, ttl=self.ttl)

    def do(self, part: dict[str, Any]) -> tuple[int, Mapping[str, int]]:
        """Encodes `READ` users at a time, so that an actor never holds more states."""
        users = part["ids"]
        revisions = self.store.revisions(users, tenant=self.tenant)
        kept = self.cache.revisions(users, self.space, tenant=self.tenant)
        stale = [user for user in users if revisions[user] and kept.get(user) != revisions[user]]
        unknown: Counter[str] = Counter()
        for start in range(0, len(stale), READ):
            histories, changed = self._put(stale[start : start + READ])
            unknown.update(self.unknown(histories))
            for _ in range(ROUNDS - 1):
                if changed:
                    _, changed = self._put(changed)
        return len(stale), unknown

    def _put(self, users: Sequence[str]) -> tuple[list[History], list[str]]:
        """Keeps the users' states; returns what they were made of, and who has changed meanwhile."""
        revisions = {u: r for u, r in self.store.revisions(users, tenant=self.tenant).items() if r}
        histories = self.histories(list(revisions))
        states = self.embed.encoder.read(histories, READ)
        values = {h.user: Stored(revisions[h.user], state_to_bytes(s, h.events)) for h, s in zip(histories, states)}
        self.cache.put(values, self.space, tenant=self.tenant)
        now = self.store.revisions(list(values), tenant=self.tenant)
        for user, revision in now.items():
            if revision != revisions[user]:  # perhaps forgotten meanwhile, before we wrote
                self.cache.forget(user, tenant=self.tenant)
        return histories, [user for user, revision in now.items() if revision and revision != revisions[user]]
