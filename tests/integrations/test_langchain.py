"""Agents of the real LangChain with a real ChatOpenAI, against the gateway and the recording server."""

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.language_models import FakeListChatModel
from langchain_openai import ChatOpenAI

from persona.errors import EventError, PersonaError
from persona.integrations.langchain import UserMiddleware


@dataclass
class Context:
    user_id: str | None = None
    topic: str | None = None


def question(text="What next?"):
    return {"messages": [{"role": "user", "content": text}]}


@pytest.fixture
def agent(recorder):
    """Makes an agent whose model is the recording server."""

    def agent(*middleware, model=None, context=Context, **settings):
        model = model or ChatOpenAI(model="shop", base_url=f"{recorder.url}/v1", api_key="none", **settings)
        return create_agent(model, middleware=middleware or [UserMiddleware()], context_schema=context)

    return agent


def test_the_readmes_example_is_personalised_by_the_gateway(examples, gateway, recorder):
    code = examples["langchain"].replace("http://127.0.0.1:8000", gateway)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["music", "personalized"]
    body, _ = recorder.last
    assert body["messages"][0]["content"][0]["type"] == "prompt_embeds" and "user" not in body


def test_user_instruction_and_tokens_reach_the_server(agent, recorder):
    middleware = UserMiddleware(instruction=lambda runtime: runtime.context.topic, tokens=2)
    made = agent(middleware, default_headers={"x-tier": "gold"})
    made.invoke(question(), context=Context("ana ✓", "music ♪"))
    body, headers = recorder.last
    assert body["user"] == "ana ✓" and headers["x-tier"] == "gold"
    assert (headers["x-persona-instruction"], headers["x-persona-tokens"]) == ("music%20%E2%99%AA", "2")
    made.invoke(question(), context=Context("ben"))  # without a topic
    body, headers = recorder.last
    assert body["user"] == "ben" and "x-persona-instruction" not in headers


def test_the_id_may_come_from_elsewhere_and_other_settings_stay(agent, recorder):
    @wrap_model_call
    def cooler(request, handler):
        settings = {**request.model_settings, "temperature": 0.25, "extra_headers": {"x-trace": "7"}}
        return handler(request.override(model_settings=settings))

    middleware = UserMiddleware(lambda runtime: runtime.context["who"], instruction="music")
    agent(cooler, middleware, context=dict).invoke(question(), context={"who": "ana"})
    body, headers = recorder.last
    assert (body["user"], body["temperature"]) == ("ana", 0.25)
    assert (headers["x-trace"], headers["x-persona-instruction"]) == ("7", "music")


def test_a_stream_carries_the_user(agent, recorder):
    pieces = [piece.content for piece, _ in agent().stream(question(), context=Context("ana"), stream_mode="messages")]
    assert "".join(pieces) == "music" and len(pieces) > 1
    body, _ = recorder.last
    assert body["user"] == "ana" and body["stream"] is True


def users_by_question(recorder):
    return {body["messages"][-1]["content"]: body["user"] for _, body, _ in recorder.requests}


def test_two_users_at_once_are_never_mixed_in_threads(agent, recorder):
    made, users = agent(), ["ana", "ben"] * 10
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: made.invoke(question(str(i)), context=Context(users[i])), range(20)))
    assert users_by_question(recorder) == {str(i): user for i, user in enumerate(users)}


def test_two_users_at_once_are_never_mixed_in_an_event_loop(agent, recorder):
    made, users = agent(), ["ana", "ben"] * 10

    async def ask():
        await asyncio.gather(*(made.ainvoke(question(str(i)), context=Context(u)) for i, u in enumerate(users)))

    asyncio.run(ask())
    assert users_by_question(recorder) == {str(i): user for i, user in enumerate(users)}


@pytest.mark.parametrize("context", [None, Context(), {}])
def test_a_run_without_a_user_id_is_refused(agent, recorder, context):
    with pytest.raises(PersonaError, match=r"no user id: invoke the agent with context=Context\(user_id"):
        agent(context=None if context is None else type(context)).invoke(question(), context=context)
    assert recorder.requests == []


@pytest.mark.parametrize("bad", ["", "x" * 300, 7])
def test_an_id_that_cannot_be_one_is_refused(agent, recorder, bad):
    with pytest.raises(EventError, match="user id"):
        agent(UserMiddleware(lambda runtime: bad)).invoke(question())
    assert recorder.requests == []


def test_another_users_name_in_the_call_is_refused(agent, recorder):
    @wrap_model_call
    def as_ben(request, handler):
        return handler(request.override(model_settings={"user": "ben"}))

    with pytest.raises(PersonaError, match="names another user"):
        agent(as_ben, UserMiddleware()).invoke(question(), context=Context("ana"))
    with pytest.raises(PersonaError, match="names another user"):
        agent(extra_body={"user": "ben"}).invoke(question(), context=Context("ana"))
    assert recorder.requests == []


def test_the_id_goes_to_no_other_kind_of_model(agent):
    with pytest.raises(PersonaError, match="not by a FakeListChatModel"):
        agent(model=FakeListChatModel(responses=["music"])).invoke(question(), context=Context("ana"))


def test_bad_settings_are_refused_when_the_middleware_is_made():
    with pytest.raises(PersonaError, match="1 or more"):
        UserMiddleware(tokens=0)
    with pytest.raises(PersonaError, match="instruction"):
        UserMiddleware(instruction="")
