"""`client.persona`: users on our server, and in the local store."""

import openai
import pytest
from starlette.responses import JSONResponse

from persona import Event, wrap
from persona.errors import EventError

ANA = "ana ✓ אנה"


def test_users_on_our_server(ours, events):
    client = wrap(ours.client(), mode="server")
    assert client.persona.observe(ANA, events[0]) == 1
    named = Event("search", 9.0, text="li\u2028ne\x85", event_id="e1")
    assert client.persona.observe(ANA, [named, *events[1:]]) == 3 and client.persona.observe(ANA, [named]) == 0
    history = client.persona.history(ANA)
    assert [e.text for e in history.events] == ["violin music", "drum music", "vinyl music", named.text]
    assert len(client.persona.history(ANA, last=2)) == 2 and history.user == ANA
    exported = client.persona.export(ANA)
    assert sorted(e["text"] for e in exported) == sorted(e.text for e in history.events)
    assert client.persona.forget(ANA) == 4 and client.persona.forget(ANA) == 0 and client.persona.export(ANA) == []
    assert client.persona.observe(ANA, exported) == 4
    assert ours.store.count(ANA) == 4
    with pytest.raises(EventError):
        client.persona.history("")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").persona.forget(ANA)


def test_users_in_the_local_store(vllm, persona, events):
    client = wrap(vllm.client(), persona)
    assert client.persona.observe("ben", events) == 3 and persona.store.count("ben") == 3
    assert client.persona.history("ben", last=1) == persona.store.history("ben", last=1)
    assert client.persona.export("ben") == list(persona.store.export("ben")) and "event_id" not in str(
        client.persona.export("ben")
    )
    assert client.persona.forget("ben") == 3 and persona.store.count("ben") == 0 and vllm.bodies == []


def test_events_whose_answer_was_lost_are_stored_once(ours, serve, events):
    lost = []

    async def losing(scope, receive, send):
        async def swallow(message):
            lost.append(message)

        first = scope.get("path", "").endswith("/events") and not lost
        await ours.plugin(scope, receive, swallow if first else send)
        if first:
            await JSONResponse({}, 503, {"retry-after-ms": "1"})(scope, receive, send)

    client = wrap(ours.client(), mode="server").with_options(base_url=serve(losing))
    assert client.persona.observe(ANA, events) == 0 and lost  # nothing was new the second time
    assert ours.store.count(ANA) == 3
