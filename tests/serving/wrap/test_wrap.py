"""`wrap` of functions, and what cannot be wrapped."""

import asyncio
import inspect
import subprocess
import sys
import threading

import pytest
import torch

from persona import Persona, wrap
from persona.errors import EventError, PersonaError
from persona.serving.profile import HEAD
from persona.store import EventStore

ASK = "What does this user buy most?"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}]


@pytest.fixture
def persona(model, tmp_path, shop_histories):
    with EventStore(f"sqlite:///{tmp_path / 'local.db'}") as store:
        persona = Persona(model, store)
        for name, history in zip(("ana", "ben", "cleo"), shop_histories):
            persona.observe(name, history.events)
        yield persona


def test_a_function_of_a_prompt_or_of_messages(persona):
    def ask(prompt, *, warmth=0.0):
        """Asks."""
        return prompt, warmth

    wrapped = wrap(ask, persona)
    (text, warmth) = wrapped(ASK, user_id="ana", warmth=1.0)
    assert text.startswith(HEAD) and text.endswith(f"\n\n{ASK}") and warmth == 1.0
    assert wrapped(prompt=ASK, user_id="ana")[0] == text and wrapped(ASK, user_id="ben")[0] != text
    chat, _ = wrapped(CHAT, user_id="ana")
    assert chat[0] == CHAT[0] and chat[1]["content"].startswith(HEAD) and CHAT[1]["content"] == ASK
    assert wrapped(ASK) == wrapped(ASK, user_id="nobody") == (ASK, 0.0)
    assert wrapped.__name__ == "ask" and wrapped.__doc__ == "Asks." and wrapped.__wrapped__ is ask
    garden = wrapped(ASK, user_id="ana", instruction="Any garden?")[0]
    assert garden.count("garden") > text.count("garden") and garden.endswith(ASK)


def test_an_async_function_reads_the_store_in_a_thread(persona):
    threads = []
    read = persona.store.history

    def history(*args, **kwargs):
        threads.append(threading.get_ident())
        return read(*args, **kwargs)

    persona.store.history = history

    async def ask(prompt):
        return prompt

    wrapped = wrap(ask, persona)
    assert inspect.iscoroutinefunction(wrapped)
    assert asyncio.run(wrapped(ASK, user_id="ana")).startswith(HEAD) and asyncio.run(wrapped(ASK)) == ASK
    assert threads and threading.get_ident() not in threads


def test_a_function_with_a_store_that_fails(persona, tmp_path):
    plain, strict = wrap(str.upper, persona), wrap(str.upper, persona, require=True)
    assert plain("x", user_id="ana").endswith("\n\nX")
    with pytest.raises(PersonaError, match="no events"):
        strict("x", user_id="nobody")
    (tmp_path / "local.db").unlink()
    assert plain("x", user_id="ana") == "X"
    with pytest.raises(PersonaError, match="removed or replaced"):
        strict("x", user_id="ana")


def test_what_cannot_be_wrapped(persona):
    for target, given, message in (
        (str.upper, None, "wrapping a function needs a persona"),
        (7, persona, "int cannot be wrapped"),
        (torch.nn.Linear, persona, "type cannot be wrapped"),
    ):
        with pytest.raises(PersonaError, match=message):
            wrap(target, given)
    with pytest.raises(PersonaError, match="in the mode 'text', not 'server'"):
        wrap(str.upper, persona, mode="server")
    with pytest.raises(PersonaError, match="first argument"):
        wrap(print, persona)(7, user_id="ana")
    with pytest.raises(EventError, match="1 to 256"):
        wrap(str.upper, persona)("x", user_id="")


@pytest.mark.slow  # tests/test_readme.py asks the same after the quickstart
def test_importing_and_wrapping_load_no_engine():
    code = (
        "import sys, persona; wrap = persona.wrap\n"
        "try: wrap(7)\nexcept ValueError: pass\n"
        "assert not {'openai', 'vllm'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
