"""vLLM with cross-attention gives the reference's tokens: for many users at once, in chunks, after preemption."""

import base64
import io

import pytest
import torch

from persona.serving.vllm_memory import ROLE

pytestmark = pytest.mark.vllm

NEW = 12
SMALL = {"kv_cache_memory_bytes": 20 * 3 * 2 * 2 * 32 * 32 * 4, "max_model_len": 256}
"""20 blocks of 3 layers, keys and values, 2 heads, 32 positions, 32 numbers of 4 bytes."""
CHUNKS = {"max_num_batched_tokens": 48}
"""With 64 slots, a prompt's first chunk ends inside them."""


def assert_equal(found, expected):
    """Greedy answers token by token; log-probabilities up to the rounding of other matrix shapes."""
    assert [answer["ids"] for answer in found] == [answer["ids"] for answer in expected]
    for own, theirs in zip(found, expected):
        assert own["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-3)


def several(deployment, prompts, *lengths, users=3):
    """Requests of several users and of nobody for prompts of these lengths."""
    who = [*(deployment.user(seed) for seed in range(users)), None]
    return [(user, ids) for ids in prompts(*lengths) for user in who]


def assert_users_matter(expected):
    """No two requests are answered alike, so a mix-up of users would show."""
    assert len({tuple(answer["ids"]) for answer in expected}) == len(expected)


def message(rows):
    """The chat message that brings a user's rows."""
    file = io.BytesIO()
    torch.save(rows, file)
    data = base64.b64encode(file.getvalue()).decode()
    return {"role": ROLE, "content": [{"type": "prompt_embeds", "data": data}]}


@pytest.fixture(scope="module")
def busy(deploy, prompts):
    """One engine with two blocks of slots not all read, chunks that end inside them, prefix cache, and too little KV.

    Returns what it answered, and the reference's answers.
    """
    d = deploy(tokens=40, every=2)
    assert d.slots == 64
    new = 40
    requests = [*several(d, prompts, 9, 90, users=5), (d.user(7, count=8), prompts(21)[0])]
    chat = [{"role": "system", "content": "You help."}, {"role": "user", "content": "What now?"}]
    chat_ids = d.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    chatting = [(d.user(0), chat_ids), (None, chat_ids)]
    chats = [[message(d.rows(user)), *chat] for user, _ in chatting]
    found = d.served(requests, new, chats=chats, passes=2, **SMALL, **CHUNKS)
    return found, d.expected(requests, new), d.expected(chatting, new)


def test_users_in_one_batch_with_chunks_and_preemption(busy):
    found, expected, _ = busy
    assert_users_matter(expected)
    assert found["blocks"] == 20 and found["preemptions"] > 0
    assert_equal(found["passes"][0], expected)


def test_again_from_the_prefix_cache(busy):
    found, expected, _ = busy
    assert_equal(found["passes"][1], expected)
    assert max(answer["cached"] for answer in found["passes"][1]) > 0


def test_chat_whose_first_message_is_the_memory(busy):
    found, _, expected = busy
    assert_users_matter(expected)
    assert_equal(found["chats"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
def test_whole_prompts_with_and_without_prefix_cache(deploy, prompts, cache):
    d = deploy(tokens=32, every=1)
    requests = several(d, prompts, 9, 40, 100)
    expected = d.expected(requests, NEW)
    assert_users_matter(expected)
    found = d.served(requests, NEW, passes=2, enable_prefix_caching=cache)
    for answers in found["passes"]:
        assert_equal(answers, expected)
    assert found["preemptions"] == 0
    assert (max(answer["cached"] or 0 for answer in found["passes"][1]) > 0) == cache


@pytest.mark.slow
def test_preemption_without_anything_else(deploy, prompts):
    d = deploy(tokens=32, every=2)
    requests = several(d, prompts, 30, 60)
    expected = d.expected(requests, 40)
    found = d.served(requests, 40, enable_prefix_caching=False, **SMALL)
    assert found["preemptions"] > 0
    assert_equal(found["passes"][0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [33, 64])
def test_chunks_that_end_in_the_slots_at_their_end_and_after(deploy, prompts, chunk):
    d = deploy(tokens=64, every=2)
    requests = several(d, prompts, 9, 150)
    found = d.served(requests, NEW, enable_prefix_caching=False, max_num_batched_tokens=chunk)
    assert_equal(found["passes"][0], d.expected(requests, NEW))


@pytest.mark.slow
@pytest.mark.parametrize("tokens, slots, chunk", [(32, 32, 2048), (40, 64, 48)])
def test_compiled(deploy, prompts, tokens, slots, chunk):
    d = deploy(tokens=tokens, every=2, slots=slots)
    requests = several(d, prompts, 9, 90)
    found = d.served(requests, NEW, passes=2, enforce_eager=False, max_num_batched_tokens=chunk)
    assert found["compiled"] == 1
    expected = d.expected(requests, NEW)
    for answers in found["passes"]:
        assert_equal(answers, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma"])
def test_families(deploy, prompts, family):
    changes = {"hidden_size": 128} if family == "qwen2" else {}  # its heads share the width
    d = deploy(family, tokens=20, every=2, **changes)
    requests = several(d, prompts, 9, 40)
    expected = d.expected(requests, NEW)
    assert_users_matter(expected)
    found = d.served(requests, NEW, passes=2)
    for answers in found["passes"]:
        assert_equal(answers, expected)


@pytest.mark.slow
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2)])
def test_heads_that_share_keys(deploy, prompts, heads, kv_heads):
    d = deploy(tokens=64, every=1, num_attention_heads=heads, num_key_value_heads=kv_heads)
    requests = several(d, prompts, 9, 40)
    found = d.served(requests, NEW)
    assert_equal(found["passes"][0], d.expected(requests, NEW))


@pytest.mark.slow
def test_large_blocks(deploy, prompts):
    d = deploy(tokens=100, every=2, slots=128)
    requests = several(d, prompts, 9, 140)
    found = d.served(requests, NEW, passes=2, block_size=128)
    expected = d.expected(requests, NEW)
    for answers in found["passes"]:
        assert_equal(answers, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_nobody_is_the_llm_alone(deploy, prompts, family):
    d = deploy(family, tokens=40, every=1)
    requests = [(None, ids) for ids in prompts(9, 40, 100)]
    with_memory = d.served(requests, NEW, max_num_seqs=1)["passes"][0]
    alone = d.served(requests, NEW, model="base", bare=True, max_num_seqs=1)["passes"][0]
    assert_equal(with_memory, d.expected(requests, NEW))
    assert [answer["ids"] for answer in with_memory] == [answer["ids"] for answer in alone]
    worst = max(abs(a - b) for own, base in zip(with_memory, alone) for a, b in zip(own["logprobs"], base["logprobs"]))
    assert worst == 0.0


@pytest.mark.slow
def test_fewer_tokens_are_read_as_if_there_were_no_more(deploy, prompts):
    d = deploy(tokens=32, every=2)
    requests = [(d.user(count, count=count), ids) for ids in prompts(9, 40) for count in (1, 2, 8, 16, 32)]
    found = d.served(requests, NEW)
    expected = d.expected(requests, NEW)  # the reference reads them once
    assert_users_matter(expected)
    assert_equal(found["passes"][0], expected)
