"""The encoding in a process of its own: the same results, and what happens when that process ends."""

import asyncio
import json
from pathlib import Path

import pytest
import torch

from persona.errors import PersonaError
from persona.serving.personalizer import Outcome
from persona.serving.server.config import ServerConfig
from persona.serving.server.encoding import Encoding
from persona.serving.server.process import EncodingLostError, EncodingProcess
from persona.serving.server.service import Service

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "What next?"}]}
ASK = (CHAT, BODY, "ana", "default", "salt", None, None)


@pytest.fixture
def config(model, tmp_path, database):
    """Settings of a real process: the tests' untrained adapter in a folder, and the tests' store."""
    folder = model.save_pretrained(tmp_path / "adapter")
    return ServerConfig(adapter=str(folder), store=f"sqlite:///{database}", budget_ms=20_000)


async def again(encoding, seconds=60):
    """Waits until the process is there again."""
    for _ in range(int(seconds / 0.1)):
        try:
            return await encoding.call("check")
        except EncodingLostError:
            await asyncio.sleep(0.1)
    raise AssertionError("it did not start again")


def test_it_makes_what_an_encoding_in_this_process_makes(config, model, store, ana, rows_of):
    async def run():
        process = EncodingProcess(config)
        await process.start()
        try:
            made = await asyncio.gather(*(process.call("personalize", *ASK) for _ in range(20)))
            nobody = await process.call("personalize", CHAT, BODY, "nobody", "default", "salt", None, None)
            erased = await process.call("forget", "ana", "default")
            return process.adapter, made, nobody, erased, await process.call("personalize", *ASK)
        finally:
            process.close()

    expected = Encoding(config, model, store).personalize(*ASK)
    adapter, made, nobody, erased, after = asyncio.run(run())
    assert (adapter.domain, adapter.tokens) == (model.adapter.domain, model.adapter.tokens)
    want = json.loads(expected.body)
    for one in made:
        body = json.loads(one.body)
        rows = [rows_of(b["messages"][0]["content"][0].pop("data")) for b in (body, json.loads(expected.body))]
        assert torch.allclose(*rows, atol=1e-5) and one.outcome == Outcome(True)
        assert body["cache_salt"] == want["cache_salt"] == "salt"
    assert max(one.misses for one in made) == 1 and max(one.hits for one in made) == 19
    assert nobody.outcome == after.outcome == Outcome(False, "unknown-user") and json.loads(nobody.body) == {
        **BODY,
        "cache_salt": "salt",
    }
    assert erased == 2 and store.count("ana") == 0


def test_a_process_that_is_killed_is_started_again_and_calls_are_answered_meanwhile(config, store, ana, caplog):
    async def run():
        process = EncodingProcess(config)
        service = Service(config, process, store)
        await service.start()
        try:
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
        finally:
            service.close()

    outcomes, erased = asyncio.run(run())
    failed = Outcome(False, "failed")
    assert outcomes == [Outcome(True), failed, failed, Outcome(True)] and erased == 2
    assert "the encoding process has ended (-9)" in caplog.text


def test_it_does_not_go_on_with_another_adapter(config, ana, caplog):
    """An LLM that was exported for the one would misread the other's user tokens."""

    async def run():
        process = EncodingProcess(config)
        await process.start()
        try:
            file = Path(config.adapter) / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "domain": "another"}))
            process._process.kill()
            for _ in range(600):
                if "another training" in caplog.text:
                    break
                await asyncio.sleep(0.1)
            with pytest.raises(EncodingLostError):
                await process.call("check")
            return process.adapter
        finally:
            process.close()

    assert asyncio.run(run()).domain == "shop" and "cannot be started" in caplog.text


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


def test_it_ends_with_its_parent(config):
    async def run():
        process = EncodingProcess(config)
        await process.start()
        process._reading.cancel()
        process._writer.close()  # what the system does when the parent is killed
        await process._writer.wait_closed()
        return process._process

    assert asyncio.run(run()).wait(10) == 0


def test_errors_of_the_store_arrive_as_they_are(config, database, ana, until):
    async def run():
        process = EncodingProcess(config)
        await process.start()
        try:
            for file in database.parent.glob("events.db*"):
                file.unlink()
            made = await process.call("personalize", *ASK)
            with pytest.raises(PersonaError, match="was removed or replaced"):
                await process.call("check")
            with pytest.raises(PersonaError, match="was removed or replaced"):
                await process.call("forget", "ana", "default")
            return made
        finally:
            process.close()

    assert asyncio.run(run()).outcome == Outcome(False, "failed")
