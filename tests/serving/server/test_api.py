"""The user API: events in, history and export out, forget, health, readiness, metrics."""

import json

import pytest

from persona.history import Event

EVENTS, HISTORY, EXPORT, FORGET = (f"/persona/v1/{name}" for name in ("events", "history", "export", "forget"))
FULL = {
    "source": "search",
    "timestamp": 1.5,
    "text": "שלום 👋",
    "item_id": "i",
    "value": -2.25,
    "attributes": {"none": None, "number": 2.0, "ключ": "\n"},
    "event_id": "e",
}


@pytest.fixture
def app(make):
    return make()


def test_events_come_back_whole(app, call):
    profile = {"source": "profile", "attributes": {"city": None}}
    assert call(app, "POST", EVENTS, {"user": "ana", "events": [FULL, profile, FULL]}).json == {"given": 3, "stored": 2}
    assert call(app, "POST", EVENTS, {"user": "ana", "events": [FULL]}).json == {"given": 1, "stored": 0}
    history = call(app, "POST", HISTORY, {"user": "ana"}).json
    assert history["count"] == 2 and history["events"] == [profile, FULL]
    export = call(app, "POST", EXPORT, {"user": "ana"})
    assert export.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in export.body.decode().splitlines()] == [FULL, profile]


def test_whole_numbers_are_numbers(app, call, store):
    event = {"source": "s", "timestamp": 1, "value": 2, "attributes": {"a": 3}}
    assert call(app, "POST", EVENTS, {"user": "ana", "events": [event]}).status == 200
    assert store.history("ana").events == (Event("s", 1.0, value=2.0, attributes={"a": 3.0}),)


def test_an_export_can_be_stored_again(app, call, store):
    store.append("ana", [Event("search", float(i), text=f"line\u2028{i}") for i in range(1203)])
    export = call(app, "POST", EXPORT, {"user": "ana"}).body.decode()
    events = [json.loads(line) for line in export.split("\n")[:-1]]
    assert call(app, "POST", EVENTS, {"user": "ben", "events": events}).json["stored"] == 1203
    assert store.history("ben").events == store.history("ana").events


def test_history_is_cut(app, call, store):
    store.append("ana", [Event("search", float(i), text="tea") for i in range(10)])

    def times(**more):
        return [e["timestamp"] for e in call(app, "POST", HISTORY, {"user": "ana", **more}).json["events"]]

    assert times(last=2) == [8, 9] and times(last=2, until=5) == [3, 4] and times(last=0) == [] and len(times()) == 10


def test_unknown_users(app, call):
    assert call(app, "POST", HISTORY, {"user": "nobody"}).json == {"events": [], "count": 0}
    assert call(app, "POST", EXPORT, {"user": "nobody"}).body == b""
    assert call(app, "POST", FORGET, {"user": "nobody"}).json == {"erased": 0}


@pytest.mark.parametrize(
    "path, body, status",
    [
        (EVENTS, {"user": "ana"}, 422),
        (EVENTS, {"user": "ana", "events": []}, 422),
        (EVENTS, {"user": "ana", "events": [{}]}, 422),
        (EVENTS, {"user": "ana", "events": [{"source": ""}]}, 422),
        (EVENTS, {"user": "ana", "events": [{"source": "s", "txt": "x"}]}, 422),
        (EVENTS, {"user": "ana", "events": [{"source": "s"}, {"source": "s", "text": 5}]}, 422),
        (EVENTS, {"user": "ana", "events": [{"source": "s", "value": True}]}, 422),
        (EVENTS, {"user": "ana", "events": [{"source": "s", "timestamp": "1760000000"}]}, 422),
        (EVENTS, {"user": "ana", "events": [{"source": "s"}, {"source": "s", "timestamp": 1760000000000}]}, 422),
        (EVENTS, {"user": "ana", "events": [{"source": "s", "attributes": {"a": True}}]}, 422),
        (EVENTS, {"user": "ana", "events": [{"source": "s", "text": "\ud83d"}]}, 422),
        (EVENTS, {"user": "ana", "events": [{"source": "s", "attributes": {"\ud83d": 1}}]}, 422),
        (EVENTS, b'{"user": "ana", "events": [{"source": "s", "timestamp": NaN}]}', 422),
        (EVENTS, b'{"user": "ana", "events": [{"source": "s", "value": 1e999}]}', 422),
        (EVENTS, b'{"user": "ana", "events": [{"source": "s", "attributes": {"a": Infinity}}]}', 422),
        (EVENTS, {"user": "x" * 257, "events": [{"source": "s"}]}, 422),
        (EVENTS, {"user": "\ud83d", "events": [{"source": "s"}]}, (400, 422)),
        (EVENTS, {"user": "", "events": [{"source": "s"}]}, 422),
        (EVENTS, {"events": [{"source": "s"}]}, 400),
        (EVENTS, [], 422),
        (EVENTS, b"", 422),
        (EVENTS, b"{", 422),
        (EVENTS, b"\xff", (400, 422)),
        (EVENTS, b"[" * 100_000, (400, 422)),
        (EVENTS, b'{"user": ' + b"9" * 5000 + b"}", (400, 422)),
        (HISTORY, {"user": "ana", "last": -1}, 422),
        (HISTORY, {"user": "ana", "last": 10**9}, 422),
        (HISTORY, b'{"user": "ana", "until": NaN}', 422),
        (HISTORY, {"user": "ana", "more": 1}, 422),
        (FORGET, {}, 400),
        (EXPORT, {"user": None}, 400),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_not_valid_is_refused_and_stores_nothing(app, call, store, path, body, status):
    reply = call(app, "POST", path, body)
    assert reply.status in (status if isinstance(status, tuple) else (status,)) and reply.json
    assert store.users() == []


@pytest.mark.parametrize(
    "method, path", [("GET", EVENTS), ("DELETE", FORGET), ("POST", "/persona/v1/none"), ("PUT", EXPORT)]
)
def test_other_methods_and_paths(app, call, method, path):
    assert call(app, method, path, {"user": "ana"}).status in (404, 405)


def test_forget_erases_states_and_texts(app, call, ana, model, database):
    chat = {"messages": [{"role": "user", "content": "hi"}], "user": "ana"}
    assert call(app, "POST", "/v1/chat/completions", chat).outcome[0] == "personalized"
    texts = model.encoder.text_encoder
    assert "violin music" in texts and ("default", "ana") in app.service.encoding.states
    assert call(app, "POST", FORGET, {"user": "ana"}).json == {"erased": 2}
    assert "violin music" not in texts and ("default", "ana") not in app.service.encoding.states
    assert call(app, "POST", "/v1/chat/completions", chat).outcome == ("plain", "unknown-user")


MARKS = ("Xanadu-Street-77", "id-of-a-person-9")


def test_no_byte_of_a_forgotten_user_stays_in_files_or_logs(
    make, call, serve, vllm, store, database, faulty, caplog, capfd
):
    import httpx

    text, user = MARKS
    app = make(max_body=4096, budget_ms=2000)
    url = serve(app)
    caplog.set_level("DEBUG")
    event = {
        "source": "search",
        "timestamp": 1,
        "text": text,
        "item_id": text,
        "event_id": text,
        "attributes": {text: text},
    }
    chat = {"messages": [{"role": "user", "content": text}], "user": user}

    def post(path, body, **options):
        options = options if options else {"json": body}
        return httpx.post(url + path, **options).status_code

    assert post(EVENTS, {"user": user, "events": [event, {"source": "profile", "attributes": {"city": text}}]}) == 200
    assert post("/v1/chat/completions", chat) == 200
    for bad in ({"user": user, "events": [{**event, "value": text}]}, {"user": user, "events": [{**event, text: 1}]}):
        assert post(EVENTS, bad) == 422
    assert post(EVENTS, None, content=json.dumps({"user": user, "events": [event]})[:-3]) in (415, 422)
    assert post(HISTORY, {"user": user + "\ud83d"}, content=json.dumps({"user": user + "\ud83d"})) in (415, 422, 400)
    assert post(EVENTS, {"user": user, "events": [event] * 100}) == 413
    assert post("/v1/completions", {"user": user, "prompt": f"{text} <prompt_embeds>"}) == 200
    assert post("/v1/completions", {"user": user, "prompt": [[text, 1]]}) == 200
    store.append(user, [Event("search", 2.0, text=text + " too")])

    def fail():
        raise RuntimeError(text, user)

    faulty.fault = fail
    assert post("/v1/chat/completions", chat) == 200
    assert post("/v1/chat/completions", {**chat, "cache_salt": text}) == 400
    assert post("/v1/chat/completions", {**chat, "user": [user, text]}) == 400
    faulty.fault = lambda: None
    assert post("/v1/chat/completions", chat) == 200
    held = b"".join(file.read_bytes() for file in database.parent.glob("events.db*"))
    assert all(mark.encode() in held for mark in MARKS), "the search would have found them"
    texts = app.service.encoding.model.encoder.text_encoder
    learned = [said for said in (text, f"{text} too", f"city: {text}", f"{text}: {text}") if said in texts]
    assert learned[:3] == [text, f"{text} too", f"city: {text}"]
    assert post(FORGET, {"user": user}) == 200
    for file in database.parent.glob("events.db*"):
        assert not any(mark.encode() in file.read_bytes() for mark in MARKS), file
    out, err = capfd.readouterr()
    metrics = httpx.get(url + "/persona/metrics").text
    said = caplog.text + out + err + metrics
    assert "personalising failed: RuntimeError" in said and not [mark for mark in MARKS if mark in said]
    assert not [said for said in learned if said in texts]
    assert (
        not app.service.encoding.model.encoder.text_encoder._states
        or text not in app.service.encoding.model.encoder.text_encoder._states
    )


def test_health_and_readiness(app, call):
    import persona

    health = call(app, "GET", "/persona/v1/health").json
    assert health == {"persona": persona.__version__, "domain": "shop", "tokens": 4}
    ready = call(app, "GET", "/persona/v1/ready")
    assert (ready.status, ready.json) == (200, {"ready": True, "reason": None})


def test_metrics(app, call, ana):
    chat = {"messages": [{"role": "user", "content": "hi"}], "user": "ana"}
    for body in (chat, chat, {**chat, "user": "nobody"}, {**chat, "cache_salt": "x"}):
        call(app, "POST", "/v1/chat/completions", body)
    call(app, "POST", EVENTS, {"user": "ben", "events": [{"source": "s"}, {"source": "s"}]})
    reply = call(app, "GET", "/persona/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in reply.body.decode().splitlines() if not line.startswith("#"))
    route = 'route="/v1/chat/completions"'
    for outcome, reason, count in (
        ("personalized", "", 2),
        ("plain", "unknown-user", 1),
        ("refused", "not_allowed", 1),
    ):
        found = [
            v
            for k, v in lines.items()
            if route in k and f'"{outcome}"' in k and f'reason="{reason}"' in k and "total" in k
        ]
        assert found == [f"{count}.0"], outcome
    assert lines["persona_events_stored_total"] == "2.0" and lines["persona_encode_seconds_count"] == "3.0"
    assert lines['persona_state_lookups_total{cache="miss"}'] == "1.0"
    assert lines['persona_state_lookups_total{cache="hit"}'] == "1.0"
    assert lines["persona_overhead_seconds_count"] == "3.0" and float(lines["persona_event_loop_longest_seconds"]) > 0
