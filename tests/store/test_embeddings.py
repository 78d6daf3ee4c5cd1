"""What every embedding store does: in SQLite, in PostgreSQL, in Redis."""

import pytest

from persona.errors import EventError, PersonaError
from persona.history import Event
from persona.store import EventStore, Stored, open_embeddings, space_name

OLD, NEW = space_name("0a1b"), space_name("2c3d")
VALUE = Stored(7 << 24, bytes(range(256)) * 9)


def test_what_is_put_is_got(embeddings):
    assert embeddings.get(["ana", "bob"], NEW) == {}
    embeddings.put({"ana": VALUE, "أحمد:*": Stored(-1, b"")}, NEW)
    assert embeddings.get(["bob", "ana", "أحمد:*"], NEW) == {"ana": VALUE, "أحمد:*": Stored(-1, b"")}
    embeddings.put({"ana": Stored(1, b"newer")}, NEW)
    assert embeddings.get(["ana"], NEW) == {"ana": Stored(1, b"newer")}
    assert embeddings.revisions(["bob", "ana", "أحمد:*"], NEW) == {"ana": 1, "أحمد:*": -1}
    assert embeddings.get([], NEW) == embeddings.revisions([], NEW) == {}
    embeddings.put({}, NEW)
    embeddings.check()


def test_neither_encoders_nor_tenants_nor_users_mix(embeddings):
    embeddings.put({"ana": VALUE}, OLD)
    assert embeddings.get(["ana"], NEW) == embeddings.get(["ana"], OLD, tenant="shop") == {}
    # Keys that would be the same if ids were only joined.
    embeddings.put({"b:c": VALUE}, NEW, tenant="a")
    assert embeddings.get(["c"], NEW, tenant="a:b") == {}
    embeddings.put({"a%3Ab": VALUE}, NEW)
    assert embeddings.get(["a:b"], NEW) == {}


def test_forget_erases_a_user_in_all_spaces_and_nobody_else(embeddings):
    for space in (OLD, NEW):
        embeddings.put({"ana": VALUE, "ana*": VALUE}, space)
        embeddings.put({"ana": VALUE}, space, tenant="shop")
    embeddings.forget("ana")
    embeddings.forget("ana")
    assert [embeddings.get(["ana", "ana*"], space) for space in (OLD, NEW)] == [{"ana*": VALUE}] * 2
    assert embeddings.get(["ana"], OLD, tenant="shop") == {"ana": VALUE}


def test_spaces_are_counted_and_dropped(embeddings):
    assert embeddings.spaces() == {}
    embeddings.put({f"u{n}": VALUE for n in range(2500)}, OLD)
    assert embeddings.revisions([f"u{n}" for n in range(70_000)], OLD) == {f"u{n}": VALUE.revision for n in range(2500)}
    embeddings.put({"u1": VALUE}, NEW)
    embeddings.put({"u1": VALUE}, space_name("2c3d", "vector", ["What next?"]), tenant="shop")
    assert embeddings.spaces() == {OLD: 2500, NEW: 1}
    assert (embeddings.drop(OLD), embeddings.drop(OLD)) == (2500, 0)
    assert embeddings.get(["u1", "u2"], OLD) == {} and embeddings.get(["u1"], NEW) == {"u1": VALUE}
    assert len(embeddings.spaces(tenant="shop")) == 1


@pytest.mark.parametrize("bad", ["", "a\0b", "x" * 257])
def test_bad_ids_are_refused(embeddings, bad):
    calls = [
        lambda **t: embeddings.revisions([bad if not t else "u"], NEW, **t),
        lambda **t: embeddings.get([bad if not t else "u"], NEW, **t),
        lambda **t: embeddings.put({bad if not t else "u": VALUE}, NEW, **t),
        lambda **t: embeddings.forget(bad if not t else "u", **t),
    ]
    for call in calls:
        for more in ({}, {"tenant": bad}):
            with pytest.raises(EventError):
                call(**more)


def test_forgetting_events_takes_embeddings_of_the_database_along(store):
    embeddings = open_embeddings("store", store)
    for tenant in ("default", "shop"):
        store.append("ana", [Event("s", 1.0)], tenant=tenant)
        embeddings.put({"ana": VALUE, "bob": VALUE}, OLD, tenant=tenant)
    assert store.forget("ana") == 1
    assert set(embeddings.get(["ana", "bob"], OLD)) == {"bob"}
    assert set(embeddings.get(["ana", "bob"], OLD, tenant="shop")) == {"ana", "bob"}


def test_no_byte_of_an_embedding_stays_in_sqlite(sqlite_store, tmp_path):
    embeddings = open_embeddings("store", sqlite_store)
    sqlite_store.append("ana", [Event("s", 1.0)])
    embeddings.put({"ana": Stored(1, b"secret of ana" * 400), "bob": Stored(1, b"of bob" * 400)}, OLD)
    sqlite_store.forget("ana")
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"secret of ana" not in content and b"of bob" in content


def test_redis_forgets_by_itself(redis_server, sqlite_store):
    embeddings = open_embeddings(redis_server.url, sqlite_store, ttl=100)
    embeddings.put({"ttl": VALUE}, NEW)
    (key,) = embeddings._redis.keys("persona:default:ttl:*")
    assert 90 < embeddings._redis.ttl(key) <= 100
    with pytest.raises(PersonaError, match="at least a second, not 0"):
        open_embeddings(redis_server.url, sqlite_store, ttl=0)


def test_a_value_of_somebody_else_is_none(redis_server, sqlite_store):
    embeddings = open_embeddings(redis_server.url, sqlite_store)
    embeddings.put({"short": VALUE}, NEW)
    (key,) = embeddings._redis.keys("persona:default:short:*")
    embeddings._redis.set(key, b"short")
    assert embeddings.get(["short"], NEW) == embeddings.revisions(["short"], NEW) == {}


@pytest.mark.parametrize("url", ["redis", "memcached://x:hunter2@y", "", "redis://x:hunter2@y:port/0", "STORE"])
def test_urls_that_cannot_work(sqlite_store, url):
    with pytest.raises(PersonaError, match=r"such as redis://127\.0\.0\.1:6379/0") as error:
        open_embeddings(url, sqlite_store)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
def test_a_server_that_is_not_there(sqlite_store, scheme):
    embeddings = open_embeddings(f"{scheme}://bob:hunter2@127.0.0.1:1/0", sqlite_store)
    for call in (embeddings.check, embeddings.spaces, lambda: embeddings.forget("u"), lambda: embeddings.get("u", NEW)):
        with pytest.raises(PersonaError, match=r"the Redis server 127\.0\.0\.1:1 cannot be used") as error:
            call()
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("name", [("", "state"), ("a b", "state"), ("a", "State"), ("a:b", "state")])
def test_names_of_spaces(name):
    assert space_name("a", "vector", ["x", "y"]) != space_name("a", "vector", ["xy"]) != space_name("a", "vector")
    with pytest.raises(PersonaError, match="no names of an encoder's revision and of a kind"):
        space_name(*name)


def test_embeddings_of_a_database_outlive_the_process(path):
    with EventStore(f"sqlite:///{path}") as store:
        open_embeddings("store", store).put({"ana": VALUE}, NEW)
    with EventStore(f"sqlite:///{path}") as store:
        assert open_embeddings("store", store).get(["ana"], NEW) == {"ana": VALUE}
