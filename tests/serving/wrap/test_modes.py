"""How the user gets into a request: as embeddings, as words, or by id; and what happens where this fails."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from starlette.responses import JSONResponse

from persona import wrap
from persona.errors import EventError, PersonaError
from persona.serving.profile import HEAD

ANA = "ana ✓ אנה"
ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What next?"}]


def test_a_plain_vllm_gets_the_users_rows_and_never_the_id(vllm, persona):
    client = wrap(vllm.client(), persona)
    answer = client.chat.completions.create(model="m", messages=ASK, user_id=ANA, temperature=0.5)
    assert isinstance(client, openai.OpenAI) and answer.usage.total_tokens == 9
    assert answer.persona == {"mode": "embeds", "personalized": True, "reason": None}
    (body,), (turn,), (rows,) = vllm.bodies, vllm.turns, vllm.rows
    expected, _ = persona.personalizer.rows(ANA, ["What next?"])
    assert torch.equal(rows, expected[0]) and turn[1:] == [{"type": "text", "text": "What next?"}]
    assert body["messages"][0] == ASK[0] and body["temperature"] == 0.5 and "user" not in body
    assert vllm.paths == ["/v1/models", "/v1/chat/completions"]
    assert not any("ana" in json.dumps(headers) for _, _, headers in vllm.requests)


def test_instruction_and_tokens_of_a_call(vllm, persona):
    client = wrap(vllm.client(), persona, tokens=3)
    for options in (
        {},
        {"tokens": 2},
        {"instruction": "whät\nelse", "extra_headers": {"x-own": "1", "X-Persona-Tokens": "3"}},
    ):
        client.chat.completions.create(model="m", messages=ASK, user_id=ANA, **options)
    assert [len(rows) for rows in vllm.rows] == [3, 2, 3]
    assert torch.equal(vllm.rows[2], persona.personalizer.rows(ANA, ["whät\nelse"], 3)[0][0])
    sent = vllm.requests[-1][2]
    assert sent["x-own"] == "1" and not any(name.startswith("x-persona") for name in sent)
    with pytest.raises(PersonaError, match="1 to 4 user tokens, not 5"):
        client.chat.completions.create(model="m", messages=ASK, user_id=ANA, tokens=5)
    with pytest.raises(PersonaError, match="1 to 4 user tokens, not 0"):
        wrap(vllm.client(), persona, tokens=0)


def test_completions_become_embeddings(vllm, persona):
    client = wrap(vllm.client(), persona)
    answer = client.completions.create(model="m", prompt="hello", user_id=ANA)
    (body,) = vllm.bodies
    assert "prompt" not in body and "user" not in body and answer.persona["personalized"]
    expected = persona.personalizer.completion({"prompt": "hello"}, ANA)[0]["prompt_embeds"]
    assert body["prompt_embeds"] == expected
    answer = client.completions.create(model="m", prompt="hello", user_id=ANA, suffix="x")
    assert answer.persona == {"mode": "embeds", "personalized": False, "reason": "suffix"}


def test_what_would_stop_vllm_is_asked_plainly(vllm, persona):
    call = {"model": "m", "user_id": ANA, "extra_body": {"prompt_logprobs": 0}}
    client = wrap(vllm.client(), persona)
    for answer in (
        client.chat.completions.create(messages=ASK, **call),
        client.completions.create(prompt="hello", **call),
    ):
        assert answer.persona == {"mode": "embeds", "personalized": False, "reason": "echo"}
    assert vllm.bodies[0]["messages"] == ASK
    assert vllm.bodies[1]["prompt"] == "hello"


def test_openais_own_user_and_extra_body(vllm, persona):
    client = wrap(vllm.client(), persona)
    client.chat.completions.create(model="m", messages=ASK, user=ANA)
    client.chat.completions.create(model="m", messages=ASK, extra_body={"user": ANA, "top_k": 3})
    client.post("/chat/completions", body={"model": "m", "messages": ASK, "user": ANA}, cast_to=object)
    assert all("user" not in body and len(body["messages"][-1]["content"]) == 2 for body in vllm.bodies)
    assert vllm.bodies[1]["top_k"] == 3
    with pytest.raises(PersonaError, match="two users"):
        client.chat.completions.create(model="m", messages=ASK, user="ben", user_id=ANA)


def test_answers_as_messages_and_parts(vllm, persona):
    client = wrap(vllm.client(), persona)
    reply = client.chat.completions.create(model="m", messages=ASK, user_id=ANA).choices[0].message
    parts = [{"type": "text", "text": "And then?"}]
    chat = [*ASK, reply, {"role": "user", "content": parts}]
    client.chat.completions.create(model="m", messages=chat, user_id=ANA)
    body = vllm.bodies[-1]
    assert body["messages"][2]["content"] == reply.content and vllm.turns[-1][1:] == parts
    assert torch.equal(vllm.rows[-1], persona.personalizer.rows(ANA, ["And then?"])[0][0])


def test_a_hosted_endpoint_gets_a_profile_in_words(hosted, persona):
    client = wrap(hosted.client(), persona)
    raw = client.chat.completions.with_raw_response.create(model="m", messages=ASK, user_id=ANA)
    assert raw.headers["x-persona"] == "text-profile"
    assert raw.parse().persona == {"mode": "text", "personalized": True, "reason": None}
    (body,) = hosted.bodies
    (text,) = hosted.turns
    assert text.startswith(HEAD) and "violin music" in text and text.endswith("What next?")
    assert "user" not in body and "ana" not in json.dumps(body)
    answer = client.chat.completions.create(model="m", messages=ASK, user_id="nobody")
    assert answer.persona == {"mode": "text", "personalized": False, "reason": "unknown-user"}
    assert hosted.turns[-1] == "What next?"


def test_our_server_gets_the_id(ours, events):
    client = wrap(ours.client())
    assert client.persona.observe(ANA, events) == 3
    answer = client.chat.completions.create(model="m", messages=ASK, user_id=ANA, instruction="whät else", tokens=2)
    assert answer.persona == {"mode": "server", "personalized": True, "reason": None}
    assert len(ours.rows[-1]) == 2
    raw = client.chat.completions.with_raw_response.create(model="m", messages=ASK, user="nobody")
    assert raw.headers["x-persona-reason"] == "unknown-user" and raw.parse().persona["reason"] == "unknown-user"
    stream = client.chat.completions.create(model="m", messages=ASK, user_id=ANA, stream=True)
    assert stream.response.headers["x-persona"] == "personalized" and len(list(stream)) == 2
    with pytest.raises(openai.BadRequestError, match="1 to 4 user tokens"):
        wrap(ours.client(), tokens=9).chat.completions.create(model="m", messages=ASK, user_id=ANA)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(model="m", messages=ASK, user_id=ANA)
    assert "/v1/models" not in ours.paths


def test_without_a_persona_only_our_server_will_do(hosted, vllm):
    for endpoint in (hosted, vllm):
        client = wrap(endpoint.client())
        with pytest.raises(PersonaError, match=r"does not run persona.*from_pretrained"):
            client.chat.completions.create(model="m", messages=ASK, user_id=ANA)
        assert client.chat.completions.create(model="m", messages=ASK).choices
    for mode in ("embeds", "text"):
        with pytest.raises(PersonaError, match="needs a persona"):
            wrap(hosted.client(), mode=mode)
    with pytest.raises(PersonaError, match="mode is one of auto, server, embeds, text"):
        wrap(hosted.client(), mode="psychic")


def test_a_store_that_fails_does_not_break_the_call(vllm, hosted, persona, tmp_path):
    clients = [wrap(endpoint.client(), persona) for endpoint in (vllm, hosted)]
    strict = [wrap(endpoint.client(), persona, require=True) for endpoint in (vllm, hosted)]
    (tmp_path / "local.db").unlink()
    for client, endpoint in zip(clients, (vllm, hosted)):
        answer = client.chat.completions.create(model="m", messages=ASK, user_id=ANA)
        assert answer.persona["reason"] == "failed" and not answer.persona["personalized"]
        assert endpoint.turns[0] == "What next?" and "user" not in endpoint.bodies[0]
    for client, endpoint in zip(strict, (vllm, hosted)):
        with pytest.raises(PersonaError, match="removed or replaced"):
            client.chat.completions.create(model="m", messages=ASK, user_id=ANA)
        assert len(endpoint.bodies) == 1


def test_require(vllm, ours, persona):
    client = wrap(vllm.client(), persona, require=True)
    assert client.chat.completions.create(model="m", messages=ASK, user_id=ANA).persona["personalized"]
    assert client.chat.completions.create(model="m", messages=ASK).choices
    with pytest.raises(PersonaError, match="this user has no events"):
        client.chat.completions.create(model="m", messages=ASK, user_id="nobody")
    with pytest.raises(PersonaError, match="this user has no events"):
        wrap(ours.client(), require=True).chat.completions.create(model="m", messages=ASK, user_id="nobody")
    with pytest.raises(PersonaError, match="does not say why"):
        wrap(vllm.client(), mode="server", require=True).completions.create(model="m", prompt="x", user_id="nobody")


@pytest.mark.parametrize("user", ["x" * 257, "\ud83d"])
def test_a_user_id_that_cannot_be_one(vllm, persona, user):
    with pytest.raises(EventError):
        wrap(vllm.client(), persona).chat.completions.create(model="m", messages=ASK, user_id=user)
    assert vllm.bodies == []


def test_an_endpoint_that_is_busy_is_asked_again(vllm, persona):
    vllm.app.add_route("/persona/v1/health", lambda request: JSONResponse({}, busy.pop() if busy else 404))
    busy = [503]
    client = wrap(vllm.client(max_retries=0), persona)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="m", messages=ASK, user_id=ANA)
    assert client.chat.completions.create(model="m", messages=ASK, user_id=ANA).persona["mode"] == "embeds"


def test_many_threads_find_out_once_and_answer_each_its_own(vllm, persona, events):
    users = [f"user {i}" for i in range(6)]
    for i, user in enumerate(users):
        persona.observe(user, events[: 1 + i % 3])
    client = wrap(vllm.client(), persona)

    def call(user):
        return client.chat.completions.create(model="m", messages=[{"role": "user", "content": user}], user_id=user)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(call, users * 4))
    assert all(a.persona["personalized"] for a in answers) and vllm.paths.count("/v1/models") == 1
    assert_own_rows(vllm, persona, len(answers))


def assert_own_rows(endpoint, persona, count):
    assert len(endpoint.bodies) == count
    for (_, text), rows in zip(endpoint.turns, endpoint.rows):
        expected, _ = persona.personalizer.rows(text["text"], [text["text"]])
        assert torch.allclose(rows, expected[0], atol=1e-5)
