"""Events and embeddings. In PostgreSQL both are partitioned by the tenant's hash, and a policy shows one tenant's rows.

A transaction says whose rows it works with: `SELECT set_config('persona.tenant', 'shop', true)`. One that does not
sees none. The policies hold for the tables' owner too, but not for a SUPERUSER or a role with BYPASSRLS.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

PARTITIONS = 16


def upgrade() -> None:
    """Makes both tables."""
    if op.get_bind().dialect.name == "postgresql":
        for statement in _postgresql():
            op.execute(statement)
    else:
        _sqlite()


def _sqlite() -> None:
    # A file may have its events from before there were migrations, in this very form.
    op.create_table(
        "persona_events",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("event_id", sa.Text),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("timestamp", sa.Double),
        sa.Column("text", sa.Text),
        sa.Column("item_id", sa.Text),
        sa.Column("value", sa.Double),
        sa.Column("attributes", sa.Text, nullable=False),
        sa.UniqueConstraint("tenant", "user_id", "event_id"),
        sqlite_autoincrement=True,
        if_not_exists=True,
    )
    columns = ["tenant", "user_id", "timestamp", "seq"]
    op.create_index("persona_events_by_time", "persona_events", columns, if_not_exists=True)
    op.create_table(
        "persona_embeddings",
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("user_id", sa.Text, primary_key=True),
        sa.Column("space", sa.Text, primary_key=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("value", sa.LargeBinary, nullable=False),
    )


def _postgresql() -> list[str]:
    # Ids compare byte by byte, so that pages of users come in the order that Python sorts them in. A sequence, as
    # partitioned tables have no identity columns before PostgreSQL 17.
    made = [
        "CREATE SEQUENCE persona_events_seq",
        """CREATE TABLE persona_events (
            seq BIGINT NOT NULL DEFAULT nextval('persona_events_seq'),
            tenant TEXT COLLATE "C" NOT NULL,
            user_id TEXT COLLATE "C" NOT NULL,
            event_id TEXT COLLATE "C",
            source TEXT NOT NULL,
            timestamp DOUBLE PRECISION,
            text TEXT,
            item_id TEXT,
            value DOUBLE PRECISION,
            attributes TEXT NOT NULL,
            PRIMARY KEY (tenant, seq),
            UNIQUE (tenant, user_id, event_id)
        ) PARTITION BY HASH (tenant)""",
        "ALTER SEQUENCE persona_events_seq OWNED BY persona_events.seq",
        "CREATE INDEX persona_events_by_time ON persona_events (tenant, user_id, timestamp, seq)",
        """CREATE TABLE persona_embeddings (
            tenant TEXT COLLATE "C" NOT NULL,
            user_id TEXT COLLATE "C" NOT NULL,
            space TEXT COLLATE "C" NOT NULL,
            revision BIGINT NOT NULL,
            value BYTEA NOT NULL,
            PRIMARY KEY (tenant, user_id, space)
        ) PARTITION BY HASH (tenant)""",
        "ALTER TABLE persona_embeddings ALTER COLUMN value SET STORAGE EXTERNAL",
    ]
    for table in ("persona_events", "persona_embeddings"):
        for n in range(PARTITIONS):
            values = f"FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {n})"
            made.append(f"CREATE TABLE {table}_{n} PARTITION OF {table} {values}")
            # Without a policy of its own: whoever asks a partition directly sees nothing.
            made.append(f"ALTER TABLE {table}_{n} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        made += [
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            f"CREATE POLICY one_tenant ON {table} USING (tenant = current_setting('persona.tenant', true))",
        ]
    return made
