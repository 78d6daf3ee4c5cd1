"""A wrapped `vllm.LLM` gives the very tokens of Hugging Face, and without a user its own."""

import sys

import pytest

from persona import Persona, wrap
from persona.errors import PersonaError
from persona.serving.vllm_offline import import_vllm
from persona.store import EventStore

pytestmark = pytest.mark.vllm

ASK = "What does this user buy most?"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}]
USERS = ["ana", "ben", "cleo", None, "nobody"]
NEW = 8


@pytest.fixture
def persona(model, tmp_path, shop_histories):
    with EventStore(f"sqlite:///{tmp_path / 'local.db'}") as store:
        persona = Persona(model, store)
        for name, history in zip(USERS, shop_histories):
            persona.observe(name, history.events)
        yield persona


@pytest.fixture
def sampling(engine):
    return engine._sampling(temperature=0.0, max_tokens=NEW)


def texts(outputs):
    return [out.outputs[0].text.strip() for out in outputs]


def test_generate_and_chat_answer_as_the_persona_does(engine, persona, sampling):
    llm = wrap(engine.engine, persona)
    expected = persona.generate_batch([(user, CHAT) for user in USERS], max_new_tokens=NEW)
    assert len({a.text for a in expected}) == 4
    prompts = [persona.model.template.prompt(CHAT).ids] * 5
    as_text = [persona.model.template.tokenizer.decode(ids) for ids in prompts]
    for outputs in (
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, user_id=USERS, use_tqdm=False),
        llm.generate(prompts, sampling, user_id=USERS, use_tqdm=False),
        llm.generate(as_text, sampling, user_id=USERS, use_tqdm=False),
        llm.chat([CHAT] * 5, sampling, user_id=USERS, use_tqdm=False),
    ):
        assert texts(outputs) == [a.text for a in expected]
        assert [o.persona["reason"] for o in outputs] == [None, None, None, "no-user", "unknown-user"]
        assert [o.persona["personalized"] for o in outputs] == [True, True, True, False, False]


def test_one_prompt_one_user_and_options(engine, persona, sampling):
    llm = wrap(engine.engine, persona, tokens=3)
    text = persona.model.template.tokenizer.decode(persona.model.template.prompt(CHAT).ids)
    expected = persona.generate("ana", CHAT, count=3, max_new_tokens=NEW).text
    assert texts(llm.generate(text, sampling, user_id="ana", use_tqdm=False)) == [expected]
    assert texts(llm.chat(CHAT, sampling, False, user_id="ana")) == [expected]
    expected = persona.generate("ana", CHAT, instruction="tea", count=1, max_new_tokens=NEW).text
    options = {"user_id": "ana", "instruction": "tea", "tokens": 1, "use_tqdm": False}
    assert texts(llm.generate(text, sampling, **options)) == texts(llm.chat(CHAT, sampling, **options)) == [expected]
    assert texts(llm.generate({"prompt": text, "cache_salt": "s"}, sampling, **options)) == [expected]


def test_a_wrapped_llm_is_the_llm(engine, persona, sampling):
    original = engine.engine
    llm = wrap(original, persona)
    assert isinstance(llm, type(original)) and llm.llm_engine is original.llm_engine
    assert llm.get_tokenizer() is original.get_tokenizer()
    plain = llm.generate([ASK], sampling, use_tqdm=False)
    assert texts(plain) == texts(original.generate([ASK], sampling, use_tqdm=False)) and not hasattr(
        plain[0], "persona"
    )
    assert texts(llm.chat(CHAT, sampling, use_tqdm=False)) == texts(original.chat(CHAT, sampling, use_tqdm=False))
    with pytest.raises(PersonaError, match="2 user ids for 1 prompts"):
        llm.generate([ASK], sampling, user_id=["ana", "ben"])
    with pytest.raises(PersonaError, match="wrapped already"):
        wrap(llm, persona)
    with pytest.raises(PersonaError, match="no events"):
        wrap(original, persona, require=True).chat(CHAT, sampling, user_id="nobody")


def test_a_store_that_fails(engine, persona, sampling, tmp_path):
    llm = wrap(engine.engine, persona)
    (tmp_path / "local.db").unlink()
    outputs = llm.chat(CHAT, sampling, user_id="ana", use_tqdm=False)
    assert outputs[0].persona["reason"] == "failed"
    assert texts(outputs) == texts(engine.engine.chat(CHAT, sampling, use_tqdm=False))


def test_what_would_stop_the_engine_is_refused_before_it(engine, persona, sampling):
    llm, risky = wrap(engine.engine, persona), engine._sampling(temperature=0.0, max_tokens=NEW, prompt_logprobs=1)
    for call in (
        lambda: llm.generate([ASK], risky, user_id="ana"),
        lambda: llm.generate([ASK, ASK], [sampling, risky], user_id="ana"),
        lambda: llm.chat(CHAT, risky, user_id="ana"),
    ):
        with pytest.raises(PersonaError, match="prompt_logprobs"):
            call()
    assert llm.generate([ASK], risky, use_tqdm=False)[0].prompt_logprobs


def test_vllm_starts_after_text_profiles_have_loaded_numba():
    """What vLLM does with every value of every module when it starts on a CPU."""
    import bm25s  # noqa: F401

    import_vllm()
    assert vars(sys.modules["llvmlite.binding.ffi"].lib).get("kernel") is None


def test_an_llm_that_takes_no_embeddings(engine, persona, monkeypatch):
    monkeypatch.setattr(engine.engine.llm_engine.model_config, "enable_prompt_embeds", False)
    with pytest.raises(PersonaError, match="enable_prompt_embeds=True"):
        wrap(engine.engine, persona)
