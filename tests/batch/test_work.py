"""What an actor does with a part of a store's users, without Ray: what is made, passed over, and forgotten."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from persona.batch import EmbedUsers
from persona.batch.work import StoreToCache, StoreToParts
from persona.encoders.embed_files import encoder_revision
from persona.encoders.part_files import PartFiles
from persona.encoders.state_bytes import state_from_bytes
from persona.history import Event
from persona.store import SqlEmbeddings, space_name

NEW = Event("search", 2e9, text="a new violin")


@pytest.fixture
def part(histories):
    """All users as one part."""
    return {"number": 0, "ids": [h.user for h in histories], "users": len(histories)}


@pytest.fixture
def to_cache(folder, url):
    return StoreToCache(EmbedUsers(folder), url, "shop", "store", 86400.0)


@pytest.fixture
def to_parts(folder, url, tmp_path):
    (tmp_path / "out").mkdir()
    return StoreToParts(EmbedUsers(folder), url, "shop", PartFiles(tmp_path / "out", {}))


def counts(done):
    return done["refreshed"], done["skipped"], json.loads(done["unknown"])


def test_states_are_those_of_the_encoder_and_of_the_present_revision(to_cache, folder, store, histories, part):
    assert counts(to_cache(part)) == (40, 0, {"tv": 1, "radio": 1})
    space = space_name(encoder_revision(folder))
    assert SqlEmbeddings(store).spaces(tenant="shop") == {space: 40} and not SqlEmbeddings(store).spaces(tenant="other")
    found = SqlEmbeddings(store).get(part["ids"], space, tenant="shop")
    assert {u: stored.revision for u, stored in found.items()} == store.revisions(part["ids"], tenant="shop")
    encoder = EmbedUsers(folder).encoder
    for history, alone in zip(histories, encoder.read(histories, 1)):
        state, count, _ = state_from_bytes(found[history.user].value)
        np.testing.assert_allclose(state.states, alone.states, atol=1e-5)
        np.testing.assert_allclose(state.memory, alone.memory, atol=1e-5)
        assert (state.events, state.truncated) == (alone.events, alone.truncated)
        assert count == len(store.history(history.user, last=65, tenant="shop"))


def test_only_users_who_changed_are_encoded_again(to_cache, folder, store, histories, part):
    to_cache(part)
    space, first = space_name(encoder_revision(folder)), histories[0].user
    before = SqlEmbeddings(store).get(part["ids"], space, tenant="shop")
    assert counts(to_cache(part)) == (0, 40, {})
    store.append(first, [NEW], tenant="shop")
    assert counts(to_cache(part)) == (1, 39, {})
    after = SqlEmbeddings(store).get(part["ids"], space, tenant="shop")
    assert [user for user in part["ids"] if after[user] != before[user]] == [first]
    assert after[first].revision == store.revision(first, tenant="shop")


def test_who_is_forgotten_gets_no_state(to_cache, folder, store, part):
    gone = part["ids"][3]
    store.forget(gone, tenant="shop")
    assert counts(to_cache(part))[:2] == (39, 1)
    assert gone not in SqlEmbeddings(store).get(part["ids"], space_name(encoder_revision(folder)), tenant="shop")


@pytest.mark.parametrize("come_back", [False, True])
def test_who_is_forgotten_while_being_encoded_leaves_no_state(to_cache, folder, store, part, come_back):
    """Between reading the events and keeping the state, as another process would."""
    gone, read = part["ids"][3], []
    embeddings = SqlEmbeddings(store)

    def forget(*_):
        if not read:
            store.forget(gone, tenant="shop")
            if come_back:
                store.append(gone, [NEW], tenant="shop")
        read.append(1)

    hook = to_cache.embed.encoder.backbone.register_forward_hook(forget)
    try:
        assert to_cache(part)["error"] == ""
    finally:
        hook.remove()
    found = embeddings.get([gone], space_name(encoder_revision(folder)), tenant="shop")
    assert list(found) == [gone] * come_back
    if come_back:
        assert found[gone].revision == store.revision(gone, tenant="shop")
        assert state_from_bytes(found[gone].value).count == 1


def test_a_part_is_made_again_when_its_users_have_changed(to_parts, store, histories, part):
    assert counts(to_parts(part)) == (40, 0, {"tv": 1, "radio": 1})
    path = to_parts.made.path(0)
    table = pq.read_table(path)
    assert table["user"].to_pylist() == part["ids"]
    wanted = to_parts.embed.encoder.encode(histories)
    np.testing.assert_allclose(np.stack(table["embedding"].to_pylist()), wanted, atol=1e-5)
    assert counts(to_parts(part)) == (0, 40, {})
    store.append(part["ids"][0], [NEW], tenant="shop")
    store.forget(part["ids"][1], tenant="shop")
    assert counts(to_parts(part))[:2] == (39, 1)
    again = pq.read_table(path)
    assert again["user"].to_pylist() == [part["ids"][0], *part["ids"][2:]]
    was, now = (t["embedding"].to_pylist() for t in (table, again))
    assert np.abs(np.subtract(was[0], now[0])).max() > 1e-3
    np.testing.assert_allclose(was[2:], now[1:], atol=1e-5)
    path.write_bytes(path.read_bytes()[:-9])
    assert counts(to_parts(part))[:2] == (39, 1)


def test_what_ends_a_part_is_told(to_cache, to_parts, tmp_path, part):
    (tmp_path / "out").rmdir()
    assert "cannot be written" in to_parts(part)["error"]
    to_cache.cache_url = "mongodb://127.0.0.1"
    assert "embeddings are kept in the 'store' or at a URL" in to_cache(part)["error"]
