"""`SqlEmbeddings`: embeddings beside the events, in the same database. They never expire."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import sqlalchemy as sa

from persona.history.event import check_user
from persona.store.database import check_tenant
from persona.store.embeddings import Stored
from persona.store.events import EventStore
from persona.store.schema import embeddings as _embeddings

_BATCH = 1000
"""Users of one query."""
_KEY = [_embeddings.c.tenant, _embeddings.c.user_id, _embeddings.c.space]


class SqlEmbeddings:
    """An `EmbeddingStore` in an event store's database, whose `forget` erases both in one transaction."""

    def __init__(self, events: EventStore):
        self.events, self._database = events, events.database

    def get(self, users: Sequence[str], space: str, *, tenant: str = "default") -> dict[str, Stored]:
        """See `EmbeddingStore`."""
        query = sa.select(_embeddings.c.user_id, _embeddings.c.revision, _embeddings.c.value)
        return {user: Stored(revision, value) for user, revision, value in self._rows(query, users, space, tenant)}

    def revisions(self, users: Sequence[str], space: str, *, tenant: str = "default") -> dict[str, int]:
        """See `EmbeddingStore`."""
        query = sa.select(_embeddings.c.user_id, _embeddings.c.revision)
        return dict(map(tuple, self._rows(query, users, space, tenant)))

    def put(self, values: Mapping[str, Stored], space: str, *, tenant: str = "default") -> None:
        """See `EmbeddingStore`."""
        _check(list(values), tenant)
        rows = [
            {"tenant": tenant, "user_id": user, "space": space, "revision": stored.revision, "value": stored.value}
            for user, stored in sorted(values.items())  # in the same order everywhere, so that no two writers deadlock
        ]
        insert = self._database.insert(_embeddings)
        new = {"revision": insert.excluded.revision, "value": insert.excluded.value}
        with self._database.begin(tenant) as connection:
            if rows:
                connection.execute(insert.on_conflict_do_update(index_elements=_KEY, set_=new), rows)

    def forget(self, user: str, *, tenant: str = "default") -> None:
        """See `EmbeddingStore`. `EventStore.forget` has done it already, and erases the bytes too."""
        _check([user], tenant)
        query = _embeddings.delete().where(_embeddings.c.tenant == tenant, _embeddings.c.user_id == user)
        with self._database.begin(tenant) as connection:
            connection.execute(query)

    def spaces(self, *, tenant: str = "default") -> dict[str, int]:
        """See `EmbeddingStore`."""
        check_tenant(tenant)
        query = sa.select(_embeddings.c.space, sa.func.count()).where(_embeddings.c.tenant == tenant)
        with self._database.begin(tenant) as connection:
            return dict(connection.execute(query.group_by(_embeddings.c.space)).all())

    def drop(self, space: str, *, tenant: str = "default") -> int:
        """See `EmbeddingStore`."""
        check_tenant(tenant)
        query = _embeddings.delete().where(_embeddings.c.tenant == tenant, _embeddings.c.space == space)
        with self._database.begin(tenant) as connection:
            return connection.execute(query).rowcount

    def check(self) -> None:
        """See `EmbeddingStore`."""
        self.events.check()

    def close(self) -> None:
        """Nothing: the connections are the event store's."""

    def _rows(self, query: sa.Select, users: Sequence[str], space: str, tenant: str) -> Iterator[sa.Row]:
        """What `query` gives of the users, so few at a time that no database has too many parameters."""
        _check(users, tenant)
        query = query.where(_embeddings.c.tenant == tenant, _embeddings.c.space == space)
        for start in range(0, len(users), _BATCH):
            with self._database.begin(tenant) as connection:
                part = query.where(_embeddings.c.user_id.in_(users[start : start + _BATCH]))
                yield from connection.execute(part).all()


def _check(users: Sequence[str], tenant: str) -> None:
    for user in users:
        check_user(user)
    check_tenant(tenant)
