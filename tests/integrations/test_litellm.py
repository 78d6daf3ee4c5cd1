"""The hook in the real LiteLLM proxy, in front of the real gateway and of the recording server."""

import httpx
import openai
import pytest

QUESTION = [{"role": "user", "content": "What next?"}]
INSTRUCTION = "x-persona-instruction"


@pytest.fixture
def client(litellm_proxy):
    """A plain OpenAI client of the proxy with somebody's key."""
    return lambda key: openai.OpenAI(base_url=f"{litellm_proxy}/v1", api_key=key, max_retries=0)


@pytest.fixture
def ask(client):
    """Asks the recorded model with a key; gives the raw answer."""

    def ask(key, model="recorded", messages=QUESTION, **fields):
        return client(key).chat.completions.with_raw_response.create(model=model, messages=messages, **fields)

    return ask


def rows(recorder):
    """The embeddings in the last request."""
    part, _ = recorder.last[0]["messages"][0]["content"]
    assert part["type"] == "prompt_embeds"
    return part["data"]


def test_the_gateway_personalises_for_the_keys_user(ask, gateway, recorder):
    answer = ask("sk-ana", "shop")
    assert answer.headers["x-persona"] == "personalized" and answer.parse().choices[0].message.content == "music"
    seen = rows(recorder)
    direct = openai.OpenAI(base_url=f"{gateway}/v1", api_key="none").chat.completions
    direct.create(model="shop", messages=QUESTION, user="ana")
    assert rows(recorder) == seen
    direct.create(model="shop", messages=QUESTION, user="ben")
    assert rows(recorder) != seen
    answer = ask("sk-service", "shop", user="nobody known")
    assert (answer.headers["x-persona"], answer.headers["x-persona-reason"]) == ("plain", "unknown-user")


@pytest.mark.parametrize("model", ["recorded", "hosted"])
def test_the_keys_user_reaches_our_server_and_settings_of_the_deployment_stay(ask, recorder, model):
    for fields in ({}, {"user": "ana"}, {"extra_body": {"extra_body": {"user": "ana"}}}):
        ask("sk-ana", model, **fields)
        assert recorder.last[0]["user"] == "ana"
    body, headers = recorder.last
    assert headers["authorization"] == "Bearer server-key"
    if model == "recorded":
        ask("sk-ana")
        body, headers = recorder.last
        assert body["top_k"] == 3 and headers["x-tier"] == "gold"


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "ben"},
        {"extra_body": {"extra_body": {"user": "ben"}}},
        {"extra_body": {"safety_identifier": "ben"}},
        {"extra_body": {"metadata": {"user_id": "ben"}}},
        {"extra_headers": {"x-litellm-end-user-id": "ben"}},
        {"user": "ana", "extra_body": {"extra_body": {"user": "ben"}}},
    ],
)
def test_a_key_with_a_user_cannot_name_another(ask, recorder, fields):
    with pytest.raises(openai.PermissionDeniedError, match="belongs to one user and the request names another"):
        ask("sk-ana", **fields)
    assert recorder.requests == []


@pytest.mark.parametrize("fallback", ["recorded", {"model": "recorded", "user": "ben"}])
def test_a_fallback_does_not_lead_around_it(ask, recorder, fallback):
    fields = {"fallbacks": [fallback]}
    with pytest.raises(openai.APIStatusError):
        ask("sk-ana", "broken", user="ben", extra_body=fields)
    assert [body["model"] for _, body, _ in recorder.requests] == ["broken"]
    if fallback == "recorded":
        ask("sk-ana", "broken", extra_body=fields)
        assert recorder.last[0]["model"] == "shop" and recorder.last[0]["user"] == "ana"


def test_a_fallback_does_not_bring_a_caller_of_its_own(ask, recorder):
    forged = {"model": "recorded", "user": "ben", "metadata": {"user_api_key_auth": {}}}
    with pytest.raises(openai.APIStatusError):
        ask("sk-ana", "broken", extra_body={"fallbacks": [forged]})
    assert [body["model"] for _, body, _ in recorder.requests] == ["broken"]


@pytest.mark.parametrize("key", ["sk-service", "sk-admin"])
def test_a_key_without_a_user_names_whom_it_likes(ask, recorder, key):
    for fields in (
        {"user": "ben"},
        {"extra_body": {"extra_body": {"user": "ben"}}},
        {"extra_headers": {"x-litellm-end-user-id": "ben"}},
    ):
        ask(key, **fields)
        assert recorder.last[0]["user"] == "ben"
    ask(key)
    assert "user" not in recorder.last[0]


def test_two_names_are_refused(ask, recorder):
    with pytest.raises(openai.BadRequestError, match="names two users"):
        ask("sk-service", user="ana", extra_body={"extra_body": {"user": "ben"}})
    with pytest.raises(openai.BadRequestError, match="names two users"):
        ask("sk-customer", user="ben")  # a customer whom the proxy's authentication has found
    assert recorder.requests == []
    ask("sk-customer")
    assert recorder.last[0]["user"] == "ana"


def test_an_id_that_cannot_be_one_is_refused(ask, recorder):
    with pytest.raises(openai.BadRequestError, match="1 to 256 characters"):
        ask("sk-long")
    with pytest.raises(openai.BadRequestError, match="user id"):
        ask("sk-service", extra_body={"extra_body": {"user": {"id": "ana"}}})
    for field in ("extra_body", "extra_headers"):
        with pytest.raises(openai.BadRequestError, match="must be objects"):
            ask("sk-ana", extra_body={field: "user"})
    assert recorder.requests == []


@pytest.mark.parametrize("model", ["recorded", "hosted"])
def test_instruction_tokens_and_user_token_become_headers(ask, recorder, model):
    ask("sk-ana", model, extra_body={"metadata": {"persona_instruction": "music ♪", "persona_tokens": 2}})
    headers = recorder.last[1]
    assert (headers[INSTRUCTION], headers["x-persona-tokens"]) == ("music%20%E2%99%AA", "2")
    ask("sk-ana", model, extra_headers={INSTRUCTION: "films%21", "x-persona-user-token": "a.b.c"})
    headers = recorder.last[1]
    assert (headers[INSTRUCTION], headers["x-persona-user-token"]) == ("films%21", "a.b.c")
    assert "x-persona-tokens" not in headers


def test_a_bad_instruction_is_refused(ask, recorder):
    for metadata, message in (({"persona_instruction": 7}, "must be a text"), ({"persona_tokens": "2"}, "1 or more")):
        with pytest.raises(openai.BadRequestError, match=message):
            ask("sk-ana", extra_body={"metadata": metadata})
    with pytest.raises(openai.BadRequestError, match="say different things"):
        said = {"metadata": {"persona_instruction": "music"}}
        ask("sk-ana", extra_body=said, extra_headers={INSTRUCTION: "films"})
    assert recorder.requests == []


def test_streams_and_completions(client, recorder):
    ana = client("sk-ana")
    stream = ana.chat.completions.create(model="recorded", messages=QUESTION, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == "music"
    assert recorder.last[0]["user"] == "ana" and recorder.last[0]["stream"] is True
    with ana.chat.completions.with_streaming_response.create(model="shop", messages=QUESTION, stream=True) as answer:
        assert answer.headers["x-persona"] == "personalized"
    ana.completions.create(model="recorded", prompt="What next?")
    assert recorder.requests[-1][0] == "/v1/completions" and recorder.last[0]["user"] == "ana"
    with pytest.raises(openai.PermissionDeniedError):
        ana.completions.create(model="recorded", prompt="What next?", user="ben")


def test_no_answer_comes_from_the_proxys_cache(ask, recorder):
    same = [{"role": "user", "content": "the same question"}]
    for user in ("ana", "ben", "ana"):
        ask("sk-service", messages=same, user=user, extra_body={"cache": {"ttl": 60}})
    assert [body["user"] for _, body, _ in recorder.requests] == ["ana", "ben", "ana"]
    for _ in range(2):
        ask("sk-service", "plain", messages=same)
    assert len(recorder.requests) == 4  # the second came from the cache, as it does without the hook


def test_other_models_and_calls_pass_as_they_are(ask, client, recorder):
    ask("sk-ana", "plain", user="ben", extra_body={"metadata": {"persona_instruction": "music"}})
    body, headers = recorder.last
    assert "user" not in body and INSTRUCTION not in headers  # what LiteLLM does by itself
    client("sk-ana").embeddings.create(model="recorded", input="text", user="ben")
    assert recorder.requests[-1][0] == "/v1/embeddings" and recorder.last[0]["user"] == "ben"


def test_messages_of_anthropics_form_are_bound_too_and_not_cached(litellm_proxy, recorder):
    body = {"model": "hosted", "max_tokens": 5, "messages": QUESTION}

    def post(key="sk-ana", **fields):
        return httpx.post(f"{litellm_proxy}/v1/messages", json={**body, **fields}, headers={"x-api-key": key})

    for key in ("sk-ana", "sk-ben", "sk-ana"):
        assert post(key).is_success
    assert [path for path, _, _ in recorder.requests] == ["/v1/chat/completions"] * 3
    assert [body["user"] for _, body, _ in recorder.requests] == ["ana", "ben", "ana"]
    recorder.requests.clear()
    for fields in ({"metadata": {"user_id": "ben"}}, {"user": "ben"}, {"extra_body": {"user": "ben"}}):
        assert post(**fields).status_code == 403, fields
    assert recorder.requests == []
