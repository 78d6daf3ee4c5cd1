"""The facade on Hugging Face: who is known, what is cached, what is forgotten."""

import pytest
import torch

from persona.errors import PersonaError
from persona.history import Event, History
from persona.injection import PersonalizedLM
from persona.serving import Answer, Persona
from persona.serving.states import _Known
from persona.store import EventStore

ASK = "What does this user buy most?"


@pytest.fixture
def store(tmp_path):
    with EventStore(f"sqlite:///{tmp_path / 'events.db'}") as store:
        yield store


@pytest.fixture
def persona(model, store):
    return Persona(model, store)


@pytest.fixture
def read(persona):
    """The number of rows of each pass through the event encoder."""
    sizes = []
    persona.model.encoder.events.register_forward_pre_hook(lambda _, args: sizes.append(int(args[0].mask.sum())))
    return sizes


def search(time, text="tea", **fields):
    return Event("search", None if time is None else float(time), text=text, **fields)


def fresh(persona, user):
    """The state made anew from the store."""
    return persona.model.encoder.read([persona.store.history(user, tenant=persona.tenant)])[0]


def same(a, b):
    return a.states.shape == b.states.shape and torch.allclose(a.states, b.states, atol=1e-5)


def test_an_unknown_user_gets_the_plain_answer_and_is_told_so(persona):
    plain = persona.model.generate([ASK])[0]
    assert persona.generate("nobody", ASK) == Answer(plain, False, "this user has no events")
    assert persona.generate(None, ASK) == Answer(plain, False, "no user was named")
    assert persona.state("nobody") is None and persona.tokens("nobody", ASK) is None


def test_one_event_or_its_fields_are_observed_as_a_list_is(persona):
    fields = {"source": "search", "timestamp": 2.0, "text": "tea"}
    assert persona.observe("u", search(1)) + persona.observe("u", fields) + persona.observe("u", [fields]) == 3
    assert [e.timestamp for e in persona.store.history("u").events] == [1, 2, 2]


def test_a_path_is_no_store(tmp_path):
    with pytest.raises(PersonaError, match=r"store is a URL such as .*, or an EventStore, not .*Path"):
        Persona.from_pretrained("nowhere", store=tmp_path / "persona.db")


def test_observed_users_get_answers_of_their_own(persona, shop_histories):
    for history in shop_histories:
        assert persona.observe(history.user, history.events) == len(history)
    users = [h.user for h in shop_histories]
    answers = persona.generate_batch([(u, ASK) for u in users] + [(None, ASK)])
    assert [a.personalized for a in answers] == [True, True, True, False] and not any(a.truncated for a in answers)
    assert [a.reason for a in answers[:3]] == [None] * 3
    model = persona.model
    assert [a.text for a in answers[:3]] == model.generate([ASK] * 3, model.encoder.read(shop_histories))
    assert len({a.text for a in answers}) == 4
    assert [persona.generate(u, ASK) for u in users] == answers[:3]
    tokens = persona.tokens(users[0], ASK, 2)
    assert tokens.tokens.shape == (2, 32)


def test_messages_instruction_and_count_reach_the_model(persona):
    persona.observe("u", [search(1), search(2, "cake")])
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}]
    model, state = persona.model, fresh(persona, "u")
    answer = persona.generate("u", chat, instruction="other", count=1, max_new_tokens=5)
    assert [answer.text] == model.generate([chat], [state], instructions=["other"], count=1, max_new_tokens=5)
    assert persona.generate_batch([]) == []


def test_one_event_that_is_not_in_a_list(persona):
    assert persona.observe("u", search(1)) == 1 and persona.generate("u", ASK).personalized


def test_nothing_is_encoded_twice(persona, read):
    persona.observe("u", [search(i) for i in range(10)])
    assert persona.state("u") is persona.state("u")
    persona.observe("u", [search(20), search(21, "cake")])
    extended = persona.state("u")
    assert read == [10, 2] and same(extended, fresh(persona, "u"))
    persona.observe("u", search(22, "jam"))
    assert same(persona.state("u"), fresh(persona, "u")) and read[3] == 1


@pytest.mark.parametrize(
    "late",
    [
        [search(2.5, "late")],
        [search(4, "a tie with the newest")],
        [search(9, "newer"), search(2.5, "and late")],
        [Event("profile", attributes={"tier": "gold"})],
        [Event("profile", attributes={"tier": "gold"}), search(9, "newer")],
        [search(None, "no time"), search(9, "newer"), search(10, "newest")],
        [search(9, "newer"), Event("horoscope", 10.0, text="of a source that nobody knows")],
        [Event("horoscope", 3.5, text="late and unknown"), search(9, "newer")],
    ],
    ids=lambda events: ", ".join(e.text or e.source for e in events),
)
def test_late_untimed_and_unknown_events_are_not_missed(persona, late):
    persona.observe("u", [search(i, f"word {i}") for i in range(5)])
    persona.state("u")
    persona.observe("u", late)
    assert same(persona.state("u"), fresh(persona, "u"))
    persona.observe("u", search(11, "afterwards"))
    assert same(persona.state("u"), fresh(persona, "u"))


def test_facts_without_a_time_are_added_to_facts_without_a_time(persona):
    persona.observe("u", Event("profile", attributes={"tier": "gold"}))
    persona.state("u")
    persona.observe("u", Event("profile", attributes={"age": 40.0}))
    assert same(persona.state("u"), fresh(persona, "u")) and len(persona.state("u").states) == 1 + 2


def test_unknown_events_are_counted_once(persona):
    persona.observe("u", [search(1), Event("horoscope", 5.0, text="x")])
    persona.state("u")
    persona.observe("u", [search(3, "late, older than the unknown event"), search(9)])
    assert same(persona.state("u"), fresh(persona, "u"))


def test_the_same_event_again_changes_nothing(persona, read):
    persona.observe("u", search(1, event_id="e"))
    before = persona.state("u")
    assert persona.observe("u", search(1, event_id="e")) == 0
    assert persona.state("u") is before and read == [1]


def test_a_history_that_grows_too_long_keeps_the_newest_and_says_so(persona):
    persona.observe("u", [search(i, f"word {i % 5}") for i in range(63)])
    assert not persona.generate("u", ASK).truncated
    persona.observe("u", search(63))
    assert not persona.generate("u", ASK).truncated and persona.state("u").events == 64
    persona.observe("u", search(64))
    assert persona.generate("u", ASK).truncated and same(persona.state("u"), fresh(persona, "u"))
    persona.observe("u", [search(65), search(66)])
    assert persona.generate("u", ASK).truncated and same(persona.state("u"), fresh(persona, "u"))


def test_forget_erases_store_state_and_texts(persona, tmp_path):
    secret = Event("search", 1.0, text="a secret query")
    persona.observe("u", [secret, Event("profile", attributes={"city": "Hiddenham", "age": 40.0})])
    persona.observe("v", search(1, "kept"))
    persona.generate_batch([("u", ASK), ("v", ASK)])
    cached = persona.model.encoder.text_encoder
    assert "a secret query" in cached and "city: Hiddenham" in cached and "kept" in cached
    assert persona.forget("u") == 2 and persona.forget("u") == 0
    assert "a secret query" not in cached and "city: Hiddenham" not in cached and "kept" in cached
    assert persona.state("u") is None and ("default", "u") not in persona.states and persona.store.count("u") == 0
    assert all(b"secret" not in p.read_bytes() for p in tmp_path.glob("events.db*"))
    assert not persona.generate("u", ASK).personalized and persona.generate("v", ASK).personalized


def test_a_user_who_comes_back_starts_anew(persona):
    persona.observe("u", [search(1, "old"), search(2, "old too")])
    persona.state("u")
    persona.forget("u")
    persona.observe("u", search(3, "new"))
    assert same(persona.state("u"), fresh(persona, "u")) and persona.state("u").events == 1


def test_forgetting_in_another_process_is_noticed(persona):
    persona.observe("u", [search(1, "old"), search(2, "old too")])
    persona.state("u")
    persona.store.forget("u")  # what another process that shares the store does
    persona.observe("u", [search(0, "new"), search(1.5, "new"), search(3, "new")])
    assert same(persona.state("u"), fresh(persona, "u"))


def test_tenants_share_nothing(model, store):
    one, two = Persona(model, store, tenant="one"), Persona(model, store, tenant="two")
    one.observe("u", [search(1, "tea"), search(2, "cake")])
    assert one.generate("u", ASK).personalized and not two.generate("u", ASK).personalized
    two.observe("u", search(1, "carburettor"))
    assert not same(one.state("u"), two.state("u"))
    one.forget("u")
    assert not one.generate("u", ASK).personalized and two.generate("u", ASK).personalized


def test_the_cache_is_bounded_and_drops_the_longest_unused(model, store):
    history = History("x", (search(1, "x"),))
    one = _Known(1, model.encoder.read([history])[0], history.events).nbytes
    persona = Persona(model, store, cache_mib=2.5 * one / 2**20)
    for user in ("a", "b", "c"):
        persona.observe(user, search(1, user))
    persona.state("a"), persona.state("b"), persona.state("a"), persona.state("c")
    assert ("default", "a") in persona.states and ("default", "c") in persona.states and len(persona.states) == 2
    assert persona.states._states.currsize == 2 * one
    persona.forget("a"), persona.forget("c")
    assert persona.states._states.currsize == len(persona.states) == 0


def test_from_pretrained(model, tmp_path, llm_path, shop_histories):
    model.save_pretrained(tmp_path / "adapter")
    persona = Persona.from_pretrained(tmp_path / "adapter", store=f"sqlite:///{tmp_path / 'e.db'}")
    persona.observe("u", shop_histories[0].events)
    assert persona.generate("u", ASK).text == model.generate([ASK], model.encoder.read(shop_histories[:1]))[0]
    with pytest.raises(ValueError, match="transformers"):
        Persona.from_pretrained(tmp_path / "adapter", engine="llama.cpp")


def test_an_adapter_with_lora_is_not_served_by_vllm_without_it(model, tmp_path):
    model.add_lora(2)
    model.save_pretrained(tmp_path / "adapter")
    assert isinstance(Persona.from_pretrained(tmp_path / "adapter", store="sqlite://").model, PersonalizedLM)
    with pytest.raises(PersonaError, match="LoRA"):
        Persona.from_pretrained(tmp_path / "adapter", store="sqlite://", engine="vllm")


def test_a_damaged_request_is_refused_before_any_model_runs(persona, read):
    persona.observe("u", search(1))
    with pytest.raises(PersonaError, match="string `content`"):
        persona.generate("u", [{"role": "user", "content": [{"type": "prompt_embeds", "data": "AAAA"}]}])
    with pytest.raises(PersonaError, match="reserved"):
        persona.generate("u", "ignore <prompt_embeds>")
    with pytest.raises(PersonaError, match="1 to 256 characters"):
        persona.generate("", ASK)


def test_without_the_weights_of_the_llm_user_tokens_and_prompts_are_the_same(persona, model, tmp_path, shop_histories):
    folder = model.save_pretrained(tmp_path / "adapter")
    shell = PersonalizedLM.from_pretrained(folder, llm_weights=False)
    states = model.encoder.read(shop_histories)
    assert torch.equal(shell.soft_rows(states, ["?"] * 3), model.soft_rows(states, ["?"] * 3))
    assert shell.template.prompt("hello", 2) == model.template.prompt("hello", 2)
    held = [name for name, p in shell.llm.named_parameters() if not p.is_meta]
    assert held == ["model.embed_tokens.weight"]
    prompt = model.template.prompt("hello", 2)
    rows = model.soft_rows(states[:1], ["?"], 2)[0]
    assert torch.equal(shell.prompt_rows(prompt, rows), model.prompt_rows(prompt, rows))
    with pytest.raises(PersonaError, match="without its weights"):
        shell.generate(["hello"])


def test_events_that_the_adapter_cannot_read_do_not_count_as_personalised(persona):
    persona.observe("u", [Event("purchasse", 1.0, text="oak violin music"), Event("horoscope", 2.0, text="stars")])
    answer = persona.generate("u", "What does this user buy most?")
    assert not answer.personalized and "purchase" in answer.reason
    assert answer.text == persona.generate(None, "What does this user buy most?").text
    persona.observe("u", Event("purchase", 3.0, text="oak violin music"))
    assert persona.generate("u", "What does this user buy most?").personalized
