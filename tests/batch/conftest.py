"""What tests of runs over all users share: a saved encoder, users as a file and in a store, and one Ray."""

import json
import os
import shutil
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from persona.encoders import EncoderConfig, UserEncoder
from persona.history import Event, History
from persona.store import EventStore


@pytest.fixture(scope="module")
def folder(vocabulary, text_encoder, tmp_path_factory):
    """A saved encoder, untrained."""
    torch.manual_seed(1)
    config = EncoderConfig(width=32, heads=2, layers=2, tokens=4, max_events=64, dropout=0.0)
    return UserEncoder(config, vocabulary, text_encoder).save_pretrained(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def histories(domain, strange_history):
    """40 users in the order of their ids, one with more events than the encoder reads, one with unknown sources."""
    shop = [domain.histories[user] for user in domain.train[:37]]
    long = History("long", tuple(Event("search", float(t), text=f"violin {t % 3}") for t in range(100)))
    stranger = History("👩‍👩‍👧‍👦 stranger", (Event("tv", 5.0, text="news"), Event("radio", 6.0)))
    return sorted([*shop, long, strange_history, stranger], key=lambda h: h.user)


@pytest.fixture(scope="module")
def events(histories, tmp_path_factory):
    """The users as a Parquet file."""
    names = ("source", "timestamp", "text", "item_id", "value")
    rows = [
        {"user": h.user, **{n: getattr(e, n) for n in names}, "attributes": json.dumps(e.attributes)}
        for h in histories
        for e in h.events
    ]
    path = tmp_path_factory.mktemp("events") / "events.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def store(histories, tmp_path):
    """The users in an event store, as those of the tenant shop; another tenant has the first of them alone."""
    with EventStore(f"sqlite:///{tmp_path / 'events.db'}") as store:
        for history in histories:
            store.append(history.user, history.events, tenant="shop")
        store.append(histories[0].user, histories[1].events, tenant="other")
        yield store


@pytest.fixture
def url(store):
    """The store's URL."""
    return str(store.database.url)


@pytest.fixture(scope="session")
def ray():
    """Ray on this machine, for all tests; its sockets need a short path."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        _temp_dir=folder,
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
