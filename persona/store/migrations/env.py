"""What Alembic runs: the migrations in `versions`, on the connection that `schema` hands over."""

from alembic import context

from persona.store.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE
)
with context.begin_transaction():
    context.run_migrations()
