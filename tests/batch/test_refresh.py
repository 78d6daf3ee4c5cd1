"""Refreshing all users through Ray: the same as one process makes, also when an actor is killed; what is refused."""

import os
import shutil
import signal
import sys
import threading
import time

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from persona.batch import Refreshed, refresh
from persona.encoders import UserEncoder
from persona.encoders.embed_files import embed_file, encoder_revision
from persona.encoders.state_bytes import state_from_bytes
from persona.errors import CheckpointError, DataError, EventError, MissingExtraError, PersonaError
from persona.history import Event
from persona.store import EventStore, SqlEmbeddings, space_name

ASK = ("", "What does this user buy most?")


def files(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def assert_same(out, wanted):
    """Two folders of parts hold the same, embeddings to within rounding."""
    assert list(files(out)) == list(files(wanted))
    assert (out / "_manifest.json").read_bytes() == (wanted / "_manifest.json").read_bytes()
    for path in sorted(wanted.glob("*.parquet")):
        one, other = pq.read_table(out / path.name), pq.read_table(path)
        assert one.schema.equals(other.schema, check_metadata=True)
        assert one.drop_columns("embedding").equals(other.drop_columns("embedding"))
        np.testing.assert_allclose(one["embedding"].to_pylist(), other["embedding"].to_pylist(), atol=1e-6)


def kill_an_actor(out, before, killed):
    """Kills one of our actors as soon as a part is there that was not before."""
    until = time.monotonic() + 120
    while time.monotonic() < until and not {path.name for path in out.glob("part-*")} - before:
        time.sleep(0.005)
    for process in psutil.Process().children(recursive=True):
        if "MapWorker(Map(FilesToParts" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            killed.append((process.pid, len(list(out.glob("part-*")))))
            return


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_actors_finish_what_one_process_began_though_one_is_killed(ray, folder, events, tmp_path, kill):
    wanted, out, said, killed = tmp_path / "wanted", tmp_path / "out", [], []
    encoder, revision = UserEncoder.from_pretrained(folder), encoder_revision(folder)
    size = 1 if kill else 5  # one actor is to be killed in the middle of many parts
    parts, kept = 40 // size, 2 * size
    settings = {"instructions": ASK, "batch_size": size, "dim": 8, "say": said.append}
    embed_file(encoder, revision, events, wanted, **settings)
    shutil.copytree(wanted, out)
    for number in range(2, parts):
        (out / f"part-{number:05d}.parquet").unlink()
    first = (out / "part-00001.parquet").stat().st_mtime_ns
    before = {path.name for path in out.glob("part-*")}
    killer = threading.Thread(target=kill_an_actor, args=(out, before, killed))
    if kill:
        killer.start()
    made = refresh(folder, events=events, out=out, actors=2, **settings)
    if kill:
        killer.join()
        [(pid, there)] = killed
        assert not psutil.pid_exists(pid) and 3 <= there < parts  # in the middle
    assert made == Refreshed(40, 40 - kept, kept, {"tv": 1, "radio": 1})
    assert str(made) == f"40 users, {40 - kept} refreshed and {kept} up to date already"
    assert_same(out, wanted)
    assert first == (out / "part-00001.parquet").stat().st_mtime_ns
    assert any(f"{parts - 2} of {parts - 2} parts: {40 - kept} users refreshed" in line for line in said)
    # And the other way round: all is there, for either.
    assert embed_file(encoder, revision, events, out, **settings).kept == parts
    assert refresh(folder, events=events, out=out, **settings) == Refreshed(40, 0, 40, {"tv": 1, "radio": 1})


def test_the_verb_brings_a_cache_up_to_date(ray, run, folder, store, url, histories):
    call = ("refresh", folder, "--store", url, "--tenant", "shop", "--cache-url", "store", "--batch-size", 16)
    done = run(*call)
    assert done.returncode == 0, done.stderr
    assert "wrote store: 40 users, 40 refreshed and 0 up to date already" in done.stderr
    assert "tv (1)" in done.stderr and "3 of 3 parts: 40 users refreshed" in done.stderr
    space, users = space_name(encoder_revision(folder)), [h.user for h in histories]
    found = SqlEmbeddings(store).get(users, space, tenant="shop")
    assert {u: stored.revision for u, stored in found.items()} == store.revisions(users, tenant="shop")
    states = UserEncoder.from_pretrained(folder).read(histories[:16], 64)
    for user, state in zip(users, states):  # parts may be done in another order, and texts be encoded with others
        np.testing.assert_allclose(state_from_bytes(found[user].value).state.states, state.states, atol=1e-5)
    assert SqlEmbeddings(store).spaces(tenant="other") == {}


@pytest.mark.slow
def test_a_store_to_parts_and_again(ray, folder, store, url, histories, tmp_path):
    out = tmp_path / "out"
    settings = {"store": url, "tenant": "shop", "out": out, "batch_size": 16, "say": lambda text: None}
    assert refresh(folder, **settings) == Refreshed(40, 40, 0, {"tv": 1, "radio": 1})
    assert list(files(out)) == ["_manifest.json", *(f"part-{n:05d}.parquet" for n in range(3))]
    rows = pq.read_table(out)
    assert rows["user"].to_pylist() == [h.user for h in histories]
    wanted = UserEncoder.from_pretrained(folder).encode(histories)
    np.testing.assert_allclose(rows["embedding"].to_pylist(), wanted, atol=1e-5)
    for history in histories[20:36]:
        store.forget(history.user, tenant="shop")
    store.append(histories[0].user, [Event("search", 2e9, text="violin")], tenant="shop")
    made = refresh(folder, **settings)
    assert (made.users, made.refreshed) == (24, 24) and len(list(out.glob("*.parquet"))) == 2
    assert pq.read_table(out)["user"].to_pylist() == store.users(tenant="shop")
    with pytest.raises(PersonaError, match="made otherwise: tenant was 'shop' and is 'other'"):
        refresh(folder, **{**settings, "tenant": "other"})


def test_what_ends_a_part_ends_the_run(ray, folder, events, tmp_path):
    """The encoder is another one by the time that an actor loads it."""
    shutil.copytree(folder, tmp_path / "encoder")

    def change(text):
        with (tmp_path / "encoder" / "config.json").open("a") as file:
            file.write(" ")

    with pytest.raises(PersonaError, match="holds another encoder than it did when this run began"):
        refresh(tmp_path / "encoder", events=events, out=tmp_path / "out", say=change)
    assert list(files(tmp_path / "out")) == ["_manifest.json"]


def test_more_than_ray_has_is_refused(ray, folder, events, tmp_path):
    with pytest.raises(PersonaError, match="3 actors need 3 CPUs, Ray has 2: take fewer actors"):
        refresh(folder, events=events, out=tmp_path / "out", actors=3)
    with pytest.raises(PersonaError, match=r"2 actors need 0\.5 GPUs, Ray has 0"):
        refresh(folder, events=events, out=tmp_path / "out", actors=2, gpus_per_actor=0.25)


def test_bad_stores(folder, url, tmp_path):
    with pytest.raises(PersonaError, match="no events of the tenant 'nobody'"):
        refresh(folder, store=url, tenant="nobody", cache="store")
    with EventStore(f"sqlite:///{tmp_path / 'empty.db'}"):
        pass
    with pytest.raises(PersonaError, match="no events of the tenant 'default'"):
        refresh(folder, store=f"sqlite:///{tmp_path / 'empty.db'}", out=tmp_path / "out")
    with pytest.raises(EventError, match="the tenant ''"):
        refresh(folder, store=url, tenant="", cache="store")
    with pytest.raises(PersonaError, match="not a database URL"):
        refresh(folder, store="nothing", cache="store")
    with pytest.raises(PersonaError, match="or at a URL such as redis"):
        refresh(folder, store=url, tenant="shop", cache="mongodb://127.0.0.1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"out": "out"}, "from Parquet files of events or from an event store: give one"),
        ({"events": "e", "store": "sqlite://", "out": "out"}, "give one of both"),
        ({"events": "e"}, "to a folder of Parquet or to a shared cache: give one"),
        ({"store": "sqlite://", "out": "out", "cache": "store"}, "give one of both"),
        ({"events": "e", "cache": "store"}, "which files do not have: give a store"),
        ({"events": "e", "out": "out", "actors": 0}, "at least 1 actor, not 0"),
        ({"events": "e", "out": "out", "gpus_per_actor": -1}, "0 GPUs or more, not -1"),
        ({"events": "e", "out": "out", "batch_size": 0}, "at least 1 user"),
        ({"events": "e", "out": "out", "instructions": []}, "no instruction"),
        ({"events": "e", "out": "out", "dim": 33}, "1 to 32 dimensions, not 33"),
        ({"events": "e/e.parquet", "out": "e/e.parquet"}, "whose files are read as events"),
        ({"store": "sqlite://", "cache": "store", "instructions": ["x"]}, "a cache holds users' states"),
        ({"store": "sqlite://", "cache": "store", "overwrite": True}, "a cache holds users' states"),
    ],
)
def test_bad_settings(folder, settings, said):
    with pytest.raises(PersonaError, match=said):
        refresh(folder, **settings)


def test_bad_files_and_folders(folder, events, tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        refresh(folder, events=tmp_path / "nothing", out=tmp_path / "out")
    with pytest.raises(CheckpointError):
        refresh(tmp_path / "nothing", events=events, out=tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(PersonaError, match=r"holds thesis\.tex, but no _manifest\.json"):
        refresh(folder, events=events, out=tmp_path / "thesis", say=lambda text: None)


def test_without_ray(folder, events, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'persona\[ray\]'"):
        refresh(folder, events=events, out=tmp_path / "out")
