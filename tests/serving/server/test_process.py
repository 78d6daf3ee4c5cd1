"""The encoding in a process of its own: the same results, and what happens when that process ends."""

import asyncio
import json
import socket
from pathlib import Path

import pytest
import torch

from persona.errors import PersonaError
from persona.serving.personalizer import Outcome
from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import Encoding
from persona.serving.server.process import EncodingLostError, EncodingProcess, _message, _read, _serve
from persona.serving.server.service import Service
from persona.store import Stored, open_embeddings

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "What next?"}]}
SENT = json.dumps(BODY).encode()
ASK = (CHAT, SENT, "ana", "default", "salt", None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("process")


@pytest.fixture(scope="module")
def database(folder):
    """Path of the one event store that all these tests use."""
    return folder / "events.db"


@pytest.fixture(scope="module")
def config(model, folder, database):
    """Settings of a real process: the tests' untrained adapter in a folder, and the tests' store."""
    adapter = model.save_pretrained(folder / "adapter")
    return ServerConfig(adapter=str(adapter), store=f"sqlite:///{database}", budget_ms=20_000)


@pytest.fixture
def ana(ana, store):
    """A user with events, in this test alone."""
    yield ana
    store.forget(ana)


class Shared:
    """A real process that tests share, as it takes ten seconds to start, and the event loop that it is used in."""

    def __init__(self, config):
        self.config, self.loop, self.process = config, asyncio.Runner(), None

    def run(self, work):
        """The result of `work(process)`, a coroutine; in another process where a test has ended the last one."""

        async def running():
            if self.process is None or self.process._writer is None:
                self.close()
                self.process = EncodingProcess(self.config)
                await self.process.start()
            return await work(self.process)

        return self.loop.run(running())

    def close(self):
        if self.process:
            self.process.close()
            self.process = None


@pytest.fixture(scope="module")
def shared(config):
    shared = Shared(config)
    yield shared
    shared.close()
    shared.loop.close()


async def again(encoding, seconds=60):
    """Waits until the process is there again."""
    for _ in range(int(seconds / 0.1)):
        try:
            return await encoding.call("check")
        except EncodingLostError:
            await asyncio.sleep(0.1)
    raise AssertionError("it did not start again")


def test_it_makes_what_an_encoding_in_this_process_makes(shared, config, model, store, ana, rows_of):
    async def work(process):
        nobody = await process.call("personalize", CHAT, SENT, "nobody", "default", "salt", None, None)
        made = await asyncio.gather(*(process.call("personalize", *ASK) for _ in range(20)))
        erased = await process.call("forget", "ana", "default")
        return process.adapter, made, nobody, erased, await process.call("personalize", *ASK)

    expected = Encoding(config, model, store).personalize(*ASK)
    adapter, made, nobody, erased, after = shared.run(work)
    assert (adapter.domain, adapter.tokens) == (model.adapter.domain, model.adapter.tokens)
    want = json.loads(expected.body)
    for one in made:
        body = json.loads(one.body)
        rows = [rows_of(b["messages"][0]["content"][0].pop("data")) for b in (body, json.loads(expected.body))]
        assert torch.allclose(*rows, atol=1e-5) and one.outcome == Outcome(True)
        assert body["cache_salt"] == want["cache_salt"] == "salt"
    assert max(one.misses for one in made) - nobody.misses == 1
    assert max(one.hits for one in made) - nobody.hits == 19
    assert nobody.outcome == after.outcome == Outcome(False, "unknown-user") and json.loads(nobody.body) == {
        **BODY,
        "cache_salt": "salt",
    }
    assert erased == 2 and store.count("ana") == 0


@pytest.mark.parametrize("depth", [600, 700, 800])
def test_bodies_are_personalised_however_deeply_they_nest(shared, config, store, ana, depth):
    """Python reads and writes JSON that it cannot pickle."""
    deep = json.loads("[" * depth + "]" * depth)

    async def work(process):
        service = Service(config, process, store)
        return await service.personalize(CHAT, {**BODY, "deep": deep}, "ana", "default", None, None)

    sent, outcome = shared.run(work)
    assert outcome == Outcome(True) and json.loads(sent)["deep"] == deep


def test_errors_of_the_store_arrive_as_they_are(shared, database, ana):
    elsewhere = database.parent / "elsewhere"
    elsewhere.mkdir()

    async def work(process):
        await process.call("check")
        files = list(database.parent.glob("events.db*"))
        for file in files:
            file.rename(elsewhere / file.name)
        try:
            made = await process.call("personalize", *ASK)
            with pytest.raises(PersonaError, match="was removed or replaced"):
                await process.call("check")
            with pytest.raises(PersonaError, match="was removed or replaced"):
                await process.call("forget", "ana", "default")
            return made
        finally:
            for file in files:
                (elsewhere / file.name).rename(file)

    assert shared.run(work).outcome == Outcome(False, "failed")


def test_who_is_forgotten_while_the_process_is_away_goes_from_the_shared_cache_too(
    shared, config, store, ana, redis_server
):
    embeddings = open_embeddings(redis_server.url, store)
    embeddings.put({ana: Stored(1, b"a state")}, "0a1b:state")

    async def work(process):
        service = Service(config.model_copy(update={"cache_url": redis_server.url}), process, store)
        process._process.kill()
        while await service.not_ready() != "the encoding process is being started":
            await asyncio.sleep(0.01)
        erased = await service.forget(ana, "default")
        await again(process)
        return erased

    assert shared.run(work) == 2 and embeddings.get([ana], "0a1b:state") == {}


def test_a_process_that_is_killed_is_started_again_and_calls_are_answered_meanwhile(shared, config, store, ana, caplog):
    async def work(process):
        service = Service(config, process, store)
        ask = (CHAT, BODY, "ana", "default", None, None)
        outcomes = [(await service.personalize(*ask))[1]]
        process._process.kill()
        in_flight, outcome = await service.personalize(*ask)
        outcomes += [outcome]
        assert json.loads(in_flight)["messages"] == BODY["messages"]
        while await service.not_ready() != "the encoding process is being started":
            await asyncio.sleep(0.01)
        outcomes += [(await service.personalize(*ask))[1]]
        erased = await service.forget("ana", "default")
        await again(process)
        store.append("ana", [{"source": "search", "timestamp": 1, "text": "tea"}])
        return [*outcomes, (await service.personalize(*ask))[1]], erased

    outcomes, erased = shared.run(work)
    failed = Outcome(False, "failed")
    assert outcomes == [Outcome(True), failed, failed, Outcome(True)] and erased == 2
    assert "the encoding process has ended (-9)" in caplog.text


def test_it_does_not_go_on_with_another_adapter_and_ends_with_its_connection(shared, config, caplog):
    """An LLM that was exported for the one would misread the other's user tokens."""
    file = Path(config.adapter) / "adapter_config.json"
    saved = file.read_text()

    async def work(process):
        process._process.kill()
        for _ in range(600):
            if "another training" in caplog.text:
                break
            await asyncio.sleep(0.1)
        refused = process._process
        with pytest.raises(EncodingLostError):
            await process.call("check")
        # Its connection has been closed, which is also what the system does when the parent is killed.
        return process.adapter, await asyncio.to_thread(refused.wait, 10)

    file.write_text(json.dumps({**json.loads(saved), "domain": "another"}))
    try:
        adapter, status = shared.run(work)
    finally:
        file.write_text(saved)
        shared.close()
    assert adapter.domain == "shop" and "cannot be started" in caplog.text and status == 0


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("adapter", "/nowhere", "/nowhere"),
        ("store", "sqlite:////no/such/folder/x.db", "cannot be used"),
        ("device", "warp-drive", "warp-drive"),
    ],
)
def test_what_a_process_says_that_cannot_start(config, name, value, why):
    """The process's own code, run here; how a server passes that on is asked in test_service."""

    async def told():
        ours, its = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(_message(config.model_copy(update={name: value})))
        await _serve(its)
        said = await _read(reader)
        writer.close()
        return said

    said = asyncio.run(told())
    assert isinstance(said, str) and why in said


@pytest.mark.slow
def test_a_process_that_cannot_start_says_why(config, tmp_path):
    async def start(config):
        process = EncodingProcess(config)
        try:
            await process.start()
        finally:
            process.close()

    with pytest.raises(PersonaError, match="nowhere"):
        asyncio.run(start(config.model_copy(update={"adapter": str(tmp_path / "nowhere")})))
    with pytest.raises(PersonaError, match="cannot be used"):
        asyncio.run(start(config.model_copy(update={"store": "sqlite:////no/such/folder/x.db"})))
