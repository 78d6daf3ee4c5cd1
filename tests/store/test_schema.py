"""Migrations, and what PostgreSQL's policies let a role see."""

import logging
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from persona.errors import PersonaError
from persona.history import Event
from persona.store import EventStore, Stored, open_embeddings, schema


def test_migrations_make_the_tables_that_queries_are_built_from(store):
    with store.database._engine.connect() as connection:
        options = {"compare_type": True, "include_name": lambda name, kind, parents: not _is_partition(name)}
        context = MigrationContext.configure(connection, opts={**options, "version_table": schema.VERSION_TABLE})
        found = [change for change in compare_metadata(context, schema.metadata) if change[0] != "remove_index"]
        assert schema.current(connection) == schema.HEAD
    # A partitioned table's key must hold what it is partitioned by, so the one of events is (tenant, seq) there.
    assert found == []


def _is_partition(name):
    return name is not None and name.rpartition("_")[2].isdigit()


def test_a_file_from_before_there_were_migrations_is_taken_over(path):
    with EventStore(f"sqlite:///{path}") as store, store.database.begin() as connection:
        for table in (schema.VERSION_TABLE, "persona_embeddings"):
            connection.execute(sa.text(f"DROP TABLE {table}"))
        connection.execute(sa.text("INSERT INTO persona_events VALUES (7,'t','ana','e','s',1,'x',NULL,NULL,'{}')"))
    with EventStore(f"sqlite:///{path}") as store:
        assert store.count("ana", tenant="t") == 1
        open_embeddings("store", store).check()


def test_an_older_schema_is_refused_until_it_is_upgraded(path, run):
    with EventStore(f"sqlite:///{path}") as store, store.database.begin() as connection:
        connection.execute(sa.text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0000'"))
    with pytest.raises(PersonaError, match=r"has schema 0000, .* needs 0001: run `persona store upgrade` first"):
        EventStore(f"sqlite:///{path}")


def test_a_newer_schema_is_refused(path):
    with EventStore(f"sqlite:///{path}") as store, store.database.begin() as connection:
        connection.execute(sa.text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(PersonaError, match=r"has schema 9999, .* a newer persona has set it up"):
        EventStore(f"sqlite:///{path}")


def test_the_command_sets_up_a_database(path, run):
    for _ in range(2):
        said = run("store", "upgrade", "--store", f"sqlite:///{path}")
        assert said.returncode == 0 and f"{path} has schema {schema.HEAD}" in said.stderr
    said = run("store", "upgrade", "--store", "nonsense")
    assert said.returncode == 1 and "not a database URL" in said.stderr


def test_the_commands_count_and_drop_spaces(path, run):
    with EventStore(f"sqlite:///{path}") as store:
        open_embeddings("store", store).put({"ana": Stored(1, b""), "bob": Stored(1, b"")}, "0a1b:state")
    where = ("--store", f"sqlite:///{path}")
    assert run("store", "spaces", *where).stdout == "0a1b:state\t2\n"
    assert "erased 2 embeddings of 0a1b:state" in run("store", "drop", "0a1b:state", *where).stderr
    assert run("store", "spaces", *where).stdout == ""
    said = run("store", "spaces", *where, "--cache-url", "redis://127.0.0.1:1/0")
    assert said.returncode == 1 and "the Redis server 127.0.0.1:1 cannot be used" in said.stderr


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_many_set_up_an_empty_database_at_once(request, kind, path):
    url = f"sqlite:///{path}" if kind == "sqlite" else request.getfixturevalue("postgres").database("at_once")

    def work(n):
        with EventStore(url) as store:
            return store.append("u", [Event("s", float(n))])

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [1] * 6
    with EventStore(url) as store:
        assert store.count("u") == 6


def test_a_role_sees_the_tenant_it_names_and_nothing_else(postgres, postgres_url):
    with EventStore(postgres_url) as store:
        for tenant in ("shop", "cinema"):
            store.append("ana", [Event("s", 1.0, text=tenant)], tenant=tenant)
            open_embeddings("store", store).put({"ana": Stored(1, tenant.encode())}, "a:state", tenant=tenant)
    with postgres.connect("events", "persona") as connection:
        tables = ["persona_events", "persona_embeddings"]
        tables += [f"{table}_{n}" for table in tables for n in range(16)]
        rows = {table: connection.execute(f"SELECT tenant FROM {table}").fetchall() for table in tables}
        assert set(map(tuple, rows.values())) == {()}
        connection.execute("SELECT set_config('persona.tenant', 'shop', false)")
        assert connection.execute("SELECT text FROM persona_events").fetchall() == [("shop",)]
        assert connection.execute("SELECT value FROM persona_embeddings").fetchall() == [(b"shop",)]
        assert connection.execute("DELETE FROM persona_events WHERE tenant = 'cinema'").rowcount == 0
        assert connection.execute("UPDATE persona_events SET text = '' WHERE tenant = 'cinema'").rowcount == 0
        for statement in (
            "INSERT INTO persona_events (tenant, user_id, source, attributes) VALUES ('cinema', 'eve', 's', '{}')",
            "UPDATE persona_events SET tenant = 'cinema'",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
                connection.execute(statement)
    with EventStore(postgres_url) as store:
        assert store.history("ana", tenant="cinema").events[0].text == "cinema"


def test_a_role_that_policies_do_not_bind_is_warned_of(postgres, postgres_url, caplog):
    with caplog.at_level(logging.WARNING, "persona.store"):
        EventStore(postgres_url).close()
        assert caplog.text == ""
        EventStore(postgres.url("events", "postgres")).close()
    assert "the role postgres of the event store events is exempt from row-level security" in caplog.text


def test_a_server_that_restarts_is_used_again(postgres, postgres_url):
    with EventStore(postgres_url) as store:
        store.append("ana", [Event("s", 1.0)])
        postgres.stop()
        with pytest.raises(PersonaError, match="the event store events cannot be used"):
            store.count("ana")
        postgres.start()
        assert store.count("ana") == 1


def test_a_statement_that_others_hold_up_is_given_up(postgres, postgres_url):
    with EventStore(postgres_url, timeout=0.3) as store:
        store.append("ana", [Event("s", 1.0)])
        with postgres.connect("events") as other:
            other.execute("BEGIN; LOCK TABLE persona_events")
            with pytest.raises(PersonaError, match="canceling statement due to"):
                store.count("ana")
        assert store.count("ana") == 1


def test_a_role_without_rights_is_told_so(postgres):
    url = postgres.database("closed")
    with postgres.connect("closed") as connection:
        connection.execute("CREATE ROLE guest LOGIN")
    with pytest.raises(PersonaError, match="permission denied for schema public"):
        EventStore(postgres.url("closed", "guest"))
    EventStore(url).close()
