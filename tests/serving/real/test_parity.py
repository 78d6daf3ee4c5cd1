"""One request, five ways: Hugging Face, the plug-in, the gateway, and wrap() on a plain vLLM give the same tokens."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from persona import wrap
from persona.serving.personalizer import REASONS

pytestmark = pytest.mark.vllm

MODEL_NAME = {"temperature": 0, "max_tokens": 8}
SYSTEM = {"role": "system", "content": "You answer questions about the users of a shop in one word."}
QUESTIONS = ["What does this user buy most?", "What did this user buy most lately?", "Tell me about the user."]


@pytest.fixture(scope="module")
def cases(histories):
    """(user, messages); the last users have no history or no name."""
    people = [*histories, "nobody knows 👻", None]
    return [
        (user, [SYSTEM, {"role": "user", "content": q}] if n % 2 else q)
        for n, q in enumerate(QUESTIONS)
        for user in people
    ]


@pytest.fixture(scope="module")
def expected(persona, cases):
    """The answers, each computed alone."""
    answers = [persona.generate(user, messages, max_new_tokens=8) for user, messages in cases]
    assert len({a.text for a in answers if a.personalized}) > 3, "answers tell users apart"
    return answers


WAYS = {"plug-in": "served", "wrap past the plug-in": "door", "wrap on plain vLLM": "plain", "gateway": "gateway"}
"""The fixture of each way's server. Those of the last two start one more vLLM."""


@pytest.fixture(params=[*list(WAYS)[:2], *(pytest.param(way, marks=pytest.mark.slow) for way in list(WAYS)[2:])])
def ask(request, persona):
    """A client for each way, and how it names the user."""
    server = request.getfixturevalue(WAYS[request.param])
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    if request.param.startswith("wrap"):
        client = wrap(client, persona)
    model = client.models.list().data[0].id
    return lambda resource, **body: resource(client).with_raw_response.create(
        model=model, **MODEL_NAME, **{k: v for k, v in body.items() if v is not None}
    )


def chats(client):
    return client.chat.completions


def completions(client):
    return client.completions


def as_messages(messages):
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def check(raw, answer, text):
    """The same words, and the same said of the user."""
    assert text.strip() == answer.text
    word, reason = raw.headers.get("x-persona", "plain"), raw.headers.get("x-persona-reason")
    assert word == ("personalized" if answer.personalized else "plain")
    assert answer.personalized or reason is None or REASONS[reason] == answer.reason


def test_chats(ask, cases, expected):
    for (user, messages), answer in zip(cases, expected):
        raw = ask(chats, user=user, messages=as_messages(messages))
        check(raw, answer, raw.parse().choices[0].message.content)


def test_chats_of_twenty_callers_at_once(ask, cases, expected):
    work = list(zip(cases, expected)) * 3

    def one(item):
        (user, messages), answer = item
        raw = ask(chats, user=user, messages=as_messages(messages))
        check(raw, answer, raw.parse().choices[0].message.content)
        return True

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(one, work))


def test_streams(ask, cases, expected):
    for (user, messages), answer in list(zip(cases, expected))[::5]:
        raw = ask(chats, user=user, messages=as_messages(messages), stream=True)
        check(raw, answer, "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse() if chunk.choices))


@pytest.mark.parametrize("form", ["text", "ids"])
def test_completions_of_rendered_prompts(ask, persona, cases, expected, form):
    template = persona.model.template
    for (user, messages), answer in list(zip(cases, expected))[::4]:
        ids = template.prompt(messages).ids
        prompt = template.tokenizer.decode(ids) if form == "text" else ids
        raw = ask(completions, user=user, prompt=prompt, extra_body={"add_special_tokens": False})
        check(raw, answer, raw.parse().choices[0].text)


def test_instruction_and_tokens(ask, persona, cases):
    user, question = cases[0]
    expected = persona.generate(user, question, instruction="category", count=2, max_new_tokens=8)
    headers = {"x-persona-instruction": "category", "x-persona-tokens": "2"}
    raw = ask(chats, user=user, messages=as_messages(question), extra_headers=headers)
    check(raw, expected, raw.parse().choices[0].message.content)
