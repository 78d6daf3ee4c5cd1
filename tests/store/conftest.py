"""Stores of each kind; every test of `store` runs on SQLite and on PostgreSQL."""

import pytest

from persona.store import EventStore, open_embeddings


@pytest.fixture
def path(tmp_path):
    """Where SQLite's file lies."""
    return tmp_path / "events.db"


@pytest.fixture(scope="session")
def prepared_url(postgres):
    """A PostgreSQL database that is set up."""
    url = postgres.database("events")
    EventStore(url).close()
    return url


@pytest.fixture
def postgres_url(postgres, prepared_url):
    """A PostgreSQL database without rows."""
    with postgres.connect("events") as connection:
        connection.execute("DELETE FROM persona_events")
        connection.execute("DELETE FROM persona_embeddings")
    return prepared_url


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, path):
    url = f"sqlite:///{path}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    with EventStore(url) as store:
        yield store


@pytest.fixture
def sqlite_store(path):
    with EventStore(f"sqlite:///{path}") as store:
        yield store


@pytest.fixture(params=["sqlite", "postgresql", "redis"])
def embeddings(request, path):
    """Embeddings in an event store of each kind, and in Redis."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else f"sqlite:///{path}"
    with EventStore(url) as store:
        where = "store"
        if request.param == "redis":
            server = request.getfixturevalue("redis_server")
            where = server.url
            server.empty()
        made = open_embeddings(where, store)
        yield made
        made.close()
