"""A wrapped OpenAI client is the client in everything but the user: requests, streams, errors, retries, copies."""

import json
import socket

import httpx
import httpx2
import openai
import pytest
from pydantic import BaseModel

from persona import wrap
from persona.errors import PersonaError

ANA = "ana ✓ אנה"
ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What next?"}]
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


def test_without_a_user_the_request_is_the_same_byte_for_byte(vllm, persona):
    plain, wrapped = vllm.client(), wrap(vllm.client(), persona)
    for client in (plain, wrapped):
        client.chat.completions.create(model="m", messages=ASK, stop=["é"], extra_body={"top_k": 3})
        client.completions.create(model="m", prompt="hi")
        client.chat.completions.create(model="m", messages=ASK, user="")
    wrapped.chat.completions.create(model="m", messages=ASK, user_id=None, stop=["é"], extra_body={"top_k": 3})
    sent = [
        (path, raw, {k: v for k, v in h.items() if k != "x-stainless-retry-count"}) for path, raw, h in vllm.requests
    ]
    assert sent[:3] == sent[3:6] and sent[6] == sent[0]
    answer = wrapped.chat.completions.create(model="m", messages=ASK)
    assert answer.persona == {"mode": None, "personalized": False, "reason": "no-user"}


def test_the_given_client_is_not_changed(vllm, persona):
    client = vllm.client()
    before = client.chat
    wrapped = wrap(client, persona)
    wrapped.chat.completions.create(model="m", messages=ASK, user_id=ANA)
    assert client.chat is before and type(client) is openai.OpenAI and not hasattr(client, "persona")
    with pytest.raises(TypeError, match="user_id"):
        client.chat.completions.create(model="m", messages=ASK, user_id=ANA)
    client.chat.completions.create(model="m", messages=ASK, user=ANA)
    assert vllm.bodies[-1]["user"] == ANA and vllm.turns[-1] == "What next?"
    with pytest.raises(PersonaError, match="wrapped already"):
        wrap(wrapped, persona)


def test_streams_and_raw_answers(vllm, persona):
    client = wrap(vllm.client(), persona)
    call = {"model": "m", "messages": ASK, "user_id": ANA}
    stream = client.chat.completions.create(**call, stream=True)
    assert stream.response.headers["x-persona"] == "personalized"
    assert [chunk.choices[0].delta.content for chunk in stream] == ["one", "two"]
    with client.chat.completions.stream(**call) as events:
        assert events.get_final_completion().choices[0].message.content == "onetwo"
    for with_raw in (client.chat.completions.with_raw_response, client.with_raw_response.chat.completions):
        raw = with_raw.create(**call)
        assert raw.headers["x-persona"] == "personalized" and "x-persona-reason" not in raw.headers
        assert json.loads(raw.text)["usage"] == USAGE and raw.parse().persona["personalized"]
    raw = client.chat.completions.with_raw_response.create(model="m", messages=ASK, user_id="nobody")
    assert (raw.headers["x-persona"], raw.headers["x-persona-reason"]) == ("plain", "unknown-user")
    with client.chat.completions.with_streaming_response.create(**call) as lazy:
        assert lazy.headers["x-persona"] == "personalized" and lazy.parse().persona["mode"] == "embeds"
    assert sum(len(turn) == 2 for turn in vllm.turns) == 5


def test_parse(vllm, persona):
    class Word(BaseModel):
        word: str

    client = wrap(vllm.client(), persona)
    answer = client.chat.completions.parse(model="m", messages=ASK, user_id=ANA, response_format=Word)
    assert answer.choices[0].message.parsed == Word(word="hi") and answer.persona["personalized"]
    assert vllm.bodies[0]["response_format"]["type"] == "json_schema" and len(vllm.turns[0]) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500])
def test_errors_are_the_clients_own(vllm, persona, status):
    plain, wrapped = vllm.client(max_retries=0), wrap(vllm.client(max_retries=0), persona)
    errors = []
    for ask in (plain.chat.completions.create, lambda **call: wrapped.chat.completions.create(**call, user_id=ANA)):
        vllm.failures = [status]
        with pytest.raises(openai.APIStatusError) as caught:
            ask(model="m", messages=ASK)
        errors.append((type(caught.value), caught.value.body, str(caught.value), caught.value.status_code))
    assert errors[0] == errors[1] and errors[0][1]["message"] == f"status {status}"


def test_retries_send_the_same_request_again(vllm, persona):
    reads = []
    persona.model.projector.register_forward_hook(lambda *_: reads.append(1))
    client = wrap(vllm.client(max_retries=2), persona)
    vllm.failures = [500, 429]
    answer = client.chat.completions.with_raw_response.create(model="m", messages=ASK, user_id=ANA)
    assert answer.retries_taken == 2 and answer.parse().persona["personalized"] and len(reads) == 1
    first, second, third = (raw for _, raw, _ in vllm.requests if raw)
    assert first == second == third
    vllm.failures = [500] * 3
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="m", messages=ASK, user_id=ANA)
    assert len(vllm.bodies) == 6


def test_an_endpoint_that_is_away(persona):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = wrap(openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0), persona)
    with pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(model="m", messages=ASK, user_id=ANA)


def test_copies_keep_the_user_and_what_was_found_out(vllm, hosted, persona):
    client = wrap(vllm.client(), persona)
    copies = [client.with_options(timeout=5), client.copy(max_retries=0).with_options(default_headers={"x-own": "1"})]
    for each in (client, *copies):
        assert each.chat.completions.create(model="m", messages=ASK, user_id=ANA).persona["personalized"]
    assert vllm.paths.count("/v1/models") == 1 and vllm.requests[-1][2]["x-own"] == "1"
    assert copies[0].timeout == 5 and isinstance(copies[1], openai.OpenAI)
    elsewhere = client.with_options(base_url=hosted.url)
    assert elsewhere.chat.completions.create(model="m", messages=ASK, user_id=ANA).persona["mode"] == "text"


@pytest.mark.parametrize("library", [httpx2, httpx])
def test_the_clients_own_http_client_and_other_resources(vllm, persona, library):
    seen = []
    http = library.Client(event_hooks={"request": [lambda request: seen.append(request.url.path)]}, timeout=7)
    client = wrap(vllm.client(http_client=http), persona)
    raw = client.chat.completions.with_raw_response.create(model="m", messages=ASK, user_id=ANA)
    assert raw.headers["x-persona"] == "personalized"
    client.embeddings.with_raw_response.create(model="m", input="x", user=ANA)
    assert [m.id for m in client.models.list()] == ["m"] and client.timeout == httpx2.Timeout(7)
    assert seen[-3:] == ["/v1/chat/completions", "/v1/embeddings", "/v1/models"]
    assert json.loads(vllm.requests[-2][1])["user"] == ANA  # not one of the routes that are personalised
    with client:
        assert not http.is_closed
    assert http.is_closed and client.is_closed()


def test_azure(vllm, persona):
    azure = openai.AzureOpenAI(
        base_url=vllm.url, api_key="k", api_version="2", default_headers={"x-own": "1"}, max_retries=0
    )
    client = wrap(azure, persona, mode="embeds")
    vllm.app.add_route("/v1/deployments/m/chat/completions", vllm.answer, methods=["POST"])
    answer = client.with_options(timeout=9).chat.completions.create(model="m", messages=ASK, user_id=ANA)
    assert answer.persona["personalized"] and isinstance(client, openai.AzureOpenAI)
    path, _, headers = vllm.requests[-1]
    assert path == "/v1/deployments/m/chat/completions" and headers["api-key"] == "k" and headers["x-own"] == "1"


def test_a_client_that_is_dropped_leaves_the_connection_to_its_twin(vllm, persona):
    client = wrap(vllm.client(), persona)  # the given client is garbage by now
    assert not client.is_closed()
    twin = wrap(original := vllm.client(), persona)
    del twin
    assert original.chat.completions.create(model="m", messages=ASK).choices
