"""Faults of ours never become the caller's: the call is answered plainly, says so, and is counted."""

import asyncio
import json
import sqlite3
import threading
import time
from contextlib import closing, contextmanager

import pytest

from persona.errors import PersonaError
from persona.history import Event
from persona.store import EventStore

CHAT = "/v1/chat/completions"


def asked(user="ana", **more):
    return {"model": "m", "messages": [{"role": "user", "content": "What next?"}], "user": user, **more}


def plain(app, vllm, counted, reply, reason):
    """The call was answered without the user, said so, and was counted."""
    assert (reply.status, reply.outcome) == (200, ("plain", reason))
    assert vllm.last["messages"] == asked()["messages"] and "user" not in vllm.last
    assert counted(app, "persona_requests_total", route=CHAT, outcome="plain", reason=reason) >= 1
    return True


@contextmanager
def locked_by_another(database):
    """Another connection holds the whole database."""
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        yield


def test_a_locked_database(make, call, vllm, ana, store, database, counted, until):
    app = make(budget_ms=150)
    store.close()  # or our own open log would keep the other from locking it
    with locked_by_another(database):
        started = time.monotonic()
        assert plain(app, vllm, counted, call(app, "POST", CHAT, asked()), "timeout")
        assert time.monotonic() - started < 2
        assert call(app, "GET", "/persona/v1/ready").status == 503
    until(lambda: call(app, "POST", CHAT, asked()).outcome == ("personalized", None))
    assert call(app, "GET", "/persona/v1/ready").status == 200


def test_a_database_locked_for_longer_than_the_store_waits(make, call, vllm, model, store, database, ana, counted):
    store.close()
    with EventStore(f"sqlite:///{database}", timeout=0.05) as impatient:
        app = make(store=impatient)
        impatient.close()  # or our own open log would keep the other from locking it
        with locked_by_another(database):
            assert plain(app, vllm, counted, call(app, "POST", CHAT, asked()), "failed")
            reply = call(app, "POST", "/persona/v1/forget", {"user": "ana"})
            assert (reply.status, reply.json["error"]["code"]) == (503, "store_unavailable")
        assert call(app, "POST", CHAT, asked()).outcome == ("personalized", None)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_deleted_database(make, call, vllm, database, ana, counted, replaced):
    app = make()
    assert call(app, "POST", CHAT, asked()).outcome == ("personalized", None)
    for file in database.parent.glob("events.db*"):
        file.unlink()
    if replaced:
        EventStore(f"sqlite:///{database}").close()
    assert plain(app, vllm, counted, call(app, "POST", CHAT, asked()), "failed")
    reply = call(app, "POST", "/persona/v1/events", {"user": "ana", "events": [{"source": "search", "text": "x"}]})
    assert reply.status == 503 and reply.json["error"]["code"] == "store_unavailable"
    assert call(app, "POST", "/persona/v1/export", {"user": "ana"}).status == 503
    ready = call(app, "GET", "/persona/v1/ready")
    assert (ready.status, ready.json["ready"]) == (503, False) and "store" in ready.json["reason"]


def ana_said(app):
    return app.service.store.history("ana").events[0].text


def test_an_encoder_that_raises_and_recovers(make, call, vllm, ana, faulty, counted, caplog):
    app = make()

    text = ana_said(app)

    def fail():
        raise RuntimeError(text)

    faulty.fault = fail
    assert plain(app, vllm, counted, call(app, "POST", CHAT, asked()), "failed")
    assert "RuntimeError" in caplog.text and text not in caplog.text
    faulty.fault = lambda: None
    assert call(app, "POST", CHAT, asked()).outcome == ("personalized", None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_rows_that_would_harm_the_engine_never_leave(make, call, vllm, model, ana, counted, bad):
    app = make()
    hook = model.projector.register_forward_hook(
        lambda _, args, rows: rows.index_fill(1, rows.new_tensor([1]).long(), bad)
    )
    try:
        assert plain(app, vllm, counted, call(app, "POST", CHAT, asked()), "failed")
        prompt = call(app, "POST", "/v1/completions", {"prompt": "hello", "user": "ana"})
    finally:
        hook.remove()
    assert prompt.outcome == ("plain", "failed") and vllm.last["prompt"] == "hello"


def test_an_encoder_that_hangs_holds_up_nobody_else(make, call, vllm, store, ana, faulty, counted):
    app = make(budget_ms=300)
    store.append("ben", [Event("search", 1.0, text="tea")])
    app.service.encoding.states.get("ben")
    go = threading.Event()
    faulty.fault = lambda: go.wait(30)
    started = time.monotonic()
    try:
        assert plain(app, vllm, counted, call(app, "POST", CHAT, asked()), "timeout")
        assert time.monotonic() - started < 3
        assert call(app, "POST", CHAT, asked("ben")).outcome == ("personalized", None)
        assert plain(app, vllm, counted, call(app, "POST", CHAT, asked()), "timeout")
    finally:
        go.set()


def test_an_encoder_that_is_slow_once(make, call, vllm, ana, faulty, counted, until):
    app = make(budget_ms=300)
    faulty.fault = lambda: time.sleep(0.8)
    assert plain(app, vllm, counted, call(app, "POST", CHAT, asked()), "timeout")
    faulty.fault = lambda: None
    until(lambda: ("default", "ana") in app.service.encoding.states)
    assert call(app, "POST", CHAT, asked()).outcome == ("personalized", None)
    assert faulty.calls == 1, "what came too late was kept"


def test_too_many_pending(make, acall, vllm, store, ana, faulty, counted):
    app = make(max_pending=2, encode_threads=2, budget_ms=10_000)
    go = threading.Event()
    faulty.fault = lambda: go.wait(30)
    store.append("ben", [Event("search", 1.0, text="tea")])

    async def crowd():
        slow = [asyncio.ensure_future(acall(app, "POST", CHAT, asked(user))) for user in ("ana", "ben")]
        while faulty.calls < 2:
            await asyncio.sleep(0.01)
        third, ready = await acall(app, "POST", CHAT, asked()), await acall(app, "GET", "/persona/v1/ready")
        assert plain(app, vllm, counted, third, "busy") and ready.status == 503
        nobody = await acall(app, "POST", CHAT, asked(None))
        assert nobody.outcome == ("plain", "no-user")
        go.set()
        return await asyncio.gather(*slow)

    try:
        assert [reply.outcome for reply in asyncio.run(crowd())] == [("personalized", None)] * 2
    finally:
        go.set()
    assert counted(app, "persona_pending_encodings") == 0


@pytest.mark.parametrize("fault", ["raises", "hangs", "unknown"])
def test_personalisation_can_be_required(make, call, vllm, ana, faulty, counted, fault):
    app = make(require_personalization=True, budget_ms=300)
    go = threading.Event()

    def fail():
        raise RuntimeError

    faulty.fault = {"raises": fail, "hangs": lambda: go.wait(30), "unknown": None}[fault]
    reply = call(app, "POST", CHAT, asked("somebody" if fault == "unknown" else "ana"))
    go.set()
    code = {"raises": "failed", "hangs": "timeout", "unknown": "unknown-user"}[fault]
    assert (reply.status, reply.json["error"]["code"], reply.outcome) == (503, code, ("refused", code))
    assert not vllm.requests
    assert counted(app, "persona_requests_total", route=CHAT, outcome="refused", reason=code) == 1
    assert call(app, "POST", CHAT, asked(None)).outcome == ("plain", "no-user")


def test_a_client_that_leaves_before_its_request_is_complete(make, call, vllm, ana):
    reply = call(make(), "POST", CHAT, json.dumps(asked()).encode()[:20], gone=True)
    assert not reply.messages and not vllm.requests


def test_the_engine_dies(make, call, vllm, ana, counted):
    app = make()
    with pytest.raises(RuntimeError, match="engine died"):
        call(app, "POST", CHAT, asked(fail=True))
    reply = call(app, "POST", CHAT, asked(status=503))
    assert reply.status == 503 and reply.outcome == (None, None), "nobody was answered, so nothing is said of the user"
    assert call(app, "POST", CHAT, asked(status=400)).outcome == (None, None)
    for reason in ("500", "503", "400"):  # Starlette answers 500 before it raises
        assert counted(app, "persona_requests_total", route=CHAT, outcome="failed", reason=reason) == 1


def test_an_answer_that_breaks_off_is_counted_once(make, call, ana, counted):
    async def breaks(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("the engine died")

    app = make(breaks)
    with pytest.raises(RuntimeError, match="engine died"):
        call(app, "POST", CHAT, asked())
    assert counted(app, "persona_requests_total", route=CHAT, outcome="personalized", reason="") == 1
    assert counted(app, "persona_requests_total", route=CHAT, outcome="failed", reason="RuntimeError") == 0


def test_probes_that_come_together_share_one_check_and_take_nobodys_place(make, acall, store, ana, monkeypatch):
    app = make(max_pending=1, encode_threads=2)
    go, checks = threading.Event(), []
    monkeypatch.setattr(store, "check", lambda: (checks.append(1), go.wait(30)))

    async def crowd():
        probes = [asyncio.ensure_future(acall(app, "GET", "/persona/v1/ready")) for _ in range(50)]
        while not checks:
            await asyncio.sleep(0.01)
        answer = await acall(app, "POST", CHAT, asked())
        go.set()
        return answer, await asyncio.gather(*probes)

    answer, probes = asyncio.run(crowd())
    assert answer.outcome == ("personalized", None) and {probe.status for probe in probes} == {200}
    assert len(checks) == 1


def test_an_encoding_without_memory_left(make, call, vllm, ana, counted, monkeypatch):
    app = make()

    async def fails(*args):
        raise PersonaError("personalize cannot be answered: MemoryError")

    monkeypatch.setattr(app.service.encoding, "call", fails)
    assert plain(app, vllm, counted, call(app, "POST", CHAT, asked()), "failed")
