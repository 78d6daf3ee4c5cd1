"""vLLM on the CPU gives the very tokens of Hugging Face: in one batch, from the prefix cache, for every user."""

import pytest
import torch

from persona.errors import PersonaError
from persona.history import Event
from persona.serving import Persona
from persona.store import EventStore

pytestmark = pytest.mark.vllm

ASK = "What does this user buy most?"
LONG = "Please think about all that you know, and say in one word: which app does this user open most of all?"
SYSTEM = {"role": "system", "content": "You answer questions of a shop about its users. " * 3}
NEW = 12


@pytest.fixture
def requests(model, shop_histories, strange_history):
    """Prompts and rows of eight users and of nobody, of two lengths; the last four users are random rows."""
    states = model.encoder.read([*shop_histories, strange_history])
    chat = [SYSTEM, {"role": "user", "content": LONG}]
    rows = torch.cat([model.soft_rows(states, [ASK] * 4), random_rows(model, 4)])
    prompts = [model.template.prompt(ASK, 4) for _ in states] + [model.template.prompt(chat, 4) for _ in states]
    plain = [model.template.prompt(ASK), model.template.prompt(chat)]
    return [plain[0], *prompts, plain[1]], rows.flatten(0, 1)


def random_rows(model, users, seed=0):
    """Rows `[users, 4, 64]` more unlike one another than those of an untrained encoder."""
    rows = torch.randn(users, 4, 64, generator=torch.Generator().manual_seed(seed))
    return 3 * model.projector.row_norm * torch.nn.functional.normalize(rows, dim=-1)


def vllm_ids(engine, prompts, rows, new=NEW):
    """Token ids of vLLM's greedy answers."""
    sampling = engine._sampling(temperature=0.0, max_tokens=new)
    outputs = engine.engine.generate(engine.inputs(prompts, rows), sampling, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outputs], [out.num_cached_tokens for out in outputs]


def transformers_ids(model, prompts, rows, new=NEW):
    """Token ids of Hugging Face's greedy answers, one prompt at a time, up to the end of the turn."""
    answers, used = [], 0
    for prompt in prompts:
        own = rows[used : used + prompt.count] if prompt.count else None
        used += prompt.count
        batch = model.collate([prompt])
        with torch.inference_mode():
            out = model.llm.generate(
                inputs_embeds=model.embed(own, batch),
                attention_mask=batch.attention_mask,
                do_sample=False,
                max_new_tokens=new,
            )
        answers.append(out[0].tolist())
    return answers


def test_token_by_token_in_one_batch_and_again_from_the_prefix_cache(engine, model, requests):
    expected = transformers_ids(model, *requests)
    for users in (expected[1:5], expected[5:9]):
        assert len({tuple(ids) for ids in users}) == 4  # no two users are answered alike
    first, _ = vllm_ids(engine, *requests)
    second, cached = vllm_ids(engine, *requests)
    assert first == expected
    assert second == expected
    assert max(cached) >= 64  # the second pass did read the cache
    assert engine.complete(*requests, max_new_tokens=NEW) == model.complete(*requests, max_new_tokens=NEW)


def test_alone_and_in_another_order(engine, model, requests):
    prompts, rows = requests
    expected = transformers_ids(model, prompts, rows)
    parts = rows.split([p.count for p in prompts])
    for i in (8, 0, 3):
        assert vllm_ids(engine, [prompts[i]], parts[i] if prompts[i].count else None)[0] == [expected[i]]
    order = [9, 3, 7, 0, 1]
    assert vllm_ids(engine, [prompts[i] for i in order], torch.cat([parts[i] for i in order]))[0] == [
        expected[i] for i in order
    ]


def test_users_share_the_system_prompt_and_nothing_after_it(engine, model):
    """A user whose rows differ in the last row alone must not be answered from another's cache."""
    chat = [{"role": "system", "content": "Another shared text. " * 12}, {"role": "user", "content": f"{LONG} {LONG}"}]
    prompt = model.template.prompt(chat, 4)
    rows = random_rows(model, 1)[0]
    for seed in range(1, 20):  # until the last row alone changes the answer
        other = torch.cat([rows[:3], random_rows(model, 1, seed)[0, 3:]])
        expected = transformers_ids(model, [prompt, prompt], torch.cat([rows, other]))
        if expected[0] != expected[1]:
            break
    assert expected[0] != expected[1]
    (first,), _ = vllm_ids(engine, [prompt], rows)
    (second,), (cached,) = vllm_ids(engine, [prompt], other)
    (third,), (again,) = vllm_ids(engine, [prompt], rows)
    assert [first, second, third] == [*expected, expected[0]]
    assert 0 < cached <= prompt.start + 3 < again


def test_rows_that_would_harm_the_engine_are_refused_before_it(engine, model):
    prompts = [model.template.prompt(ASK, 2)]
    good = torch.ones(2, 64)
    bad = {
        "shape": torch.ones(2, 32),
        "NaN or infinity": torch.tensor([[float("nan")] * 64, [1.0] * 64]),
        "infinity": torch.tensor([[1.0] * 64, [float("inf")] * 64]),
        "all zero": torch.tensor([[1.0] * 64, [0.0] * 64]),
        "room for 2 user tokens, but there are 1": good[:1],
        "room for 2 user tokens, but there are 3": torch.ones(3, 64),
        "there are 0": None,
    }
    for message, rows in bad.items():
        with pytest.raises(PersonaError, match=message):
            engine.complete(prompts, rows)
    with pytest.raises(PersonaError, match="room for 0 user tokens"):
        engine.complete([model.template.prompt(ASK)], good)
    assert len(engine.complete(prompts, good)) == 1  # the engine is still well


def test_a_row_too_small_for_the_engines_dtype_is_refused(engine, model):
    tiny = torch.full((2, 64), 1e-300, dtype=torch.float64)
    with pytest.raises(PersonaError, match="all zero"):
        engine.complete([model.template.prompt(ASK, 2)], tiny)


def test_persona_answers_alike_on_both_engines(engine, model, tmp_path, shop_histories):
    with EventStore(f"sqlite:///{tmp_path / 'e.db'}") as store:
        on_vllm, on_hf = Persona(model, store, engine), Persona(model, store)
        for history in shop_histories:
            on_vllm.observe(history.user, history.events)
        requests = [(h.user, ASK) for h in shop_histories] + [(None, LONG), ("nobody", ASK)]
        answers = on_vllm.generate_batch(requests, max_new_tokens=NEW)
        assert answers == on_hf.generate_batch(requests, max_new_tokens=NEW)
        assert [a.personalized for a in answers] == [True, True, True, False, False]
        newest = shop_histories[0].timed[-1].timestamp
        on_vllm.observe(shop_histories[0].user, Event("search", newest + 60, text="chess robot"))
        assert on_vllm.generate_batch(requests) == on_hf.generate_batch(requests)


def test_sampling_arguments_reach_vllm(engine, model, requests):
    prompts, rows = requests[0][2:4], requests[1][4:12]
    assert [len(ids) for ids in vllm_ids(engine, prompts, rows, new=3)[0]] == [3, 3]
    warm = engine.complete(prompts, rows, temperature=2.0, seed=1)
    assert warm == engine.complete(prompts, rows, temperature=2.0, seed=1) != engine.complete(prompts, rows)
