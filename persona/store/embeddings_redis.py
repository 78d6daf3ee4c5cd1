"""`RedisEmbeddings`: embeddings in Redis or Valkey, one binary value each, with a time to live."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import quote

from persona.errors import MissingExtraError, PersonaError
from persona.history.event import check_user
from persona.store.database import check_tenant
from persona.store.embeddings import Stored

_REVISION = struct.Struct(">q")
"""A value begins with the revision of the events, 8 bytes."""
_BATCH = 1000
"""Keys of one command or pipeline."""


class RedisEmbeddings:
    """An `EmbeddingStore` in Redis.

    A value expires `ttl` seconds after it was last written. The server should evict by `volatile-lru` or
    `volatile-ttl` when its memory is full: what has no time to live is the list of spaces, which `forget` reads.
    A single server or a replicated one; keys of one command may lie in several slots, which Redis Cluster refuses.

    `timeout`: seconds to wait for the server. Raises `PersonaError` for a URL that is none.
    """

    def __init__(self, url: str, *, ttl: float = 7 * 86400.0, timeout: float = 0.5):
        try:
            import redis
        except ImportError as error:
            raise MissingExtraError("Redis needs a driver: pip install 'persona[redis]'") from error
        if ttl < 1:
            raise PersonaError(f"values live for at least a second, not {ttl:g}")
        self._ttl, self._errors = round(ttl), (redis.RedisError, OSError)
        try:
            self._redis = redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)
        except ValueError:  # its message may quote the URL, and with it the password
            raise PersonaError("the given URL is not one of Redis such as redis://127.0.0.1:6379/0") from None
        address = self._redis.connection_pool.connection_kwargs
        self.name = address.get("path") or f"{address.get('host')}:{address.get('port')}"
        """For messages: where the server is."""

    def get(self, users: Sequence[str], space: str, *, tenant: str = "default") -> dict[str, Stored]:
        """See `EmbeddingStore`."""
        users, found = list(users), {}
        with self._for_people():
            for start in range(0, len(users), _BATCH):
                part = users[start : start + _BATCH]
                values = self._redis.mget([_key(tenant, user, space) for user in part])
                # A value that is too short to be one of ours is as good as none.
                found |= {user: _unpacked(v) for user, v in zip(part, values) if v and len(v) >= _REVISION.size}
        return found

    def revisions(self, users: Sequence[str], space: str, *, tenant: str = "default") -> dict[str, int]:
        """See `EmbeddingStore`."""
        users, found = list(users), {}
        with self._for_people():
            for start in range(0, len(users), _BATCH):
                part = users[start : start + _BATCH]
                with self._redis.pipeline(transaction=False) as pipeline:
                    for user in part:
                        pipeline.getrange(_key(tenant, user, space), 0, _REVISION.size - 1)
                    heads = pipeline.execute()
                found |= {user: _REVISION.unpack(h)[0] for user, h in zip(part, heads) if len(h) == _REVISION.size}
        return found

    def put(self, values: Mapping[str, Stored], space: str, *, tenant: str = "default") -> None:
        """See `EmbeddingStore`."""
        items = [(_key(tenant, user, space), stored) for user, stored in values.items()]
        with self._for_people():
            for start in range(0, len(items), _BATCH):
                with self._redis.pipeline(transaction=False) as pipeline:
                    pipeline.sadd(_spaces_key(tenant), space)  # first, so that `forget` never misses a value
                    for key, stored in items[start : start + _BATCH]:
                        pipeline.set(key, _REVISION.pack(stored.revision) + stored.value, ex=self._ttl)
                    pipeline.execute()

    def forget(self, user: str, *, tenant: str = "default") -> None:
        """See `EmbeddingStore`. What Redis has written to its own files goes when it writes them anew."""
        check_user(user)
        with self._for_people():
            if spaces := self._redis.smembers(_spaces_key(tenant)):
                self._redis.delete(*(_key(tenant, user, space.decode()) for space in spaces))

    def spaces(self, *, tenant: str = "default") -> dict[str, int]:
        """See `EmbeddingStore`. Looks at all keys of the server, a thousand at a time."""
        with self._for_people():
            names = sorted(space.decode() for space in self._redis.smembers(_spaces_key(tenant)))
            return {name: sum(map(len, self._keys(tenant, name))) for name in names}

    def drop(self, space: str, *, tenant: str = "default") -> int:
        """See `EmbeddingStore`. Looks at all keys of the server, a thousand at a time."""
        with self._for_people():
            count = sum(self._redis.unlink(*keys) for keys in self._keys(tenant, space))
            self._redis.srem(_spaces_key(tenant), space)
            return count

    def check(self) -> None:
        """See `EmbeddingStore`."""
        with self._for_people():
            self._redis.ping()

    def close(self) -> None:
        """Closes all connections; new ones are opened when it is used again."""
        self._redis.close()

    def _keys(self, tenant: str, space: str) -> Iterator[list[bytes]]:
        """All keys of a space, in lists; a key may be there twice only while the server's table grows."""
        suffix, page = f":{quote(space, safe='')}".encode(), []
        for key in self._redis.scan_iter(match=f"{_prefix(tenant)}*", count=_BATCH):
            if key.endswith(suffix):
                page.append(key)
            if len(page) == _BATCH:
                yield page
                page = []
        if page:
            yield page

    @contextmanager
    def _for_people(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise PersonaError(f"the Redis server {self.name} cannot be used: {error}") from error


def _prefix(tenant: str) -> str:
    check_tenant(tenant)
    return f"persona:{quote(tenant, safe='')}:"


def _key(tenant: str, user: str, space: str) -> str:
    """Ids are percent-encoded, so no two (tenant, user, space) have the same key, and none is a pattern."""
    check_user(user)
    return f"{_prefix(tenant)}{quote(user, safe='')}:{quote(space, safe='')}"


def _spaces_key(tenant: str) -> str:
    check_tenant(tenant)
    return f"persona-spaces:{quote(tenant, safe='')}"


def _unpacked(value: bytes) -> Stored:
    return Stored(_REVISION.unpack_from(value)[0], value[_REVISION.size :])
