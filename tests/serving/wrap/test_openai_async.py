"""Wrapped asynchronous clients: nothing of ours runs on the event loop."""

import asyncio
import threading

import openai
import pytest
import torch

from persona import wrap
from persona.errors import PersonaError
from persona.serving.profile import HEAD

ANA = "ana ✓ אנה"
ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What next?"}]


def test_async(vllm, persona, events):
    """Encoding runs beside the event loop: while one user's store is read, the loop turns."""
    users = [f"user {i}" for i in range(6)]
    for i, user in enumerate(users):
        persona.observe(user, events[: 1 + i % 3])
    threads = set()
    persona.model.projector.register_forward_hook(lambda *_: threads.add(threading.get_ident()))

    async def main():
        async with wrap(vllm.async_client(), persona) as client:
            assert isinstance(client, openai.AsyncOpenAI)
            create = client.chat.completions.create
            calls = [create(model="m", messages=[{"role": "user", "content": u}], user_id=u) for u in users * 3]
            answers = await asyncio.gather(*calls)
            copy = client.with_options(timeout=9)
            call = {"model": "m", "messages": ASK, "user_id": ANA}
            raw = await copy.chat.completions.with_raw_response.create(**call)
            stream = await copy.chat.completions.create(**call, stream=True)
            words = [chunk.choices[0].delta.content async for chunk in stream]
            async with copy.chat.completions.stream(**call) as events:
                final = await events.get_final_completion()
            async with copy.completions.with_streaming_response.create(model="m", prompt="x", user_id=ANA) as lazy:
                parsed = await lazy.parse()
            plain = await copy.chat.completions.create(model="m", messages=ASK)
        return answers, raw, words, final, parsed, plain

    answers, raw, words, final, parsed, plain = asyncio.run(main())
    assert all(a.persona == {"mode": "embeds", "personalized": True, "reason": None} for a in answers)
    assert raw.headers["x-persona"] == "personalized" and raw.parse().usage.total_tokens == 9
    assert words == ["one", "two"] and final.choices[0].message.content == "onetwo" and parsed.persona["personalized"]
    assert plain.persona["reason"] == "no-user" and vllm.paths.count("/v1/models") == 1
    assert threads and threading.get_ident() not in threads
    vllm.requests = vllm.requests[:-5]
    for (_, text), rows in zip(vllm.turns, vllm.rows):
        expected, _ = persona.personalizer.rows(text["text"], [text["text"]])
        assert torch.allclose(rows, expected[0], atol=1e-5)


def test_async_errors_users_and_our_server(ours, hosted, persona, events):
    async def main():
        client = wrap(ours.async_client(max_retries=0))
        assert await client.persona.observe(ANA, events) == 3
        assert (await client.chat.completions.create(model="m", messages=ASK, user_id=ANA)).persona["mode"] == "server"
        assert len(await client.persona.history(ANA)) == 3 and len(await client.persona.export(ANA)) == 3
        ours.failures = [429]
        with pytest.raises(openai.RateLimitError, match="status 429"):
            await client.chat.completions.create(model="m", messages=ASK, user_id=ANA)
        assert await client.persona.forget(ANA) == 3
        with pytest.raises(PersonaError, match="no events"):
            strict = wrap(ours.async_client(), require=True)
            await strict.chat.completions.create(model="m", messages=ASK, user_id=ANA)
        local = wrap(hosted.async_client(), persona)
        assert await local.persona.observe("ben", events) == 3 and len(await local.persona.export("ben")) == 3
        assert (await local.completions.create(model="m", prompt="x", user_id="ben")).persona["mode"] == "text"
        with pytest.raises(PersonaError, match="does not run persona"):
            await wrap(hosted.async_client()).chat.completions.create(model="m", messages=ASK, user_id=ANA)

    asyncio.run(main())
    assert hosted.bodies[0]["prompt"].startswith(HEAD)
