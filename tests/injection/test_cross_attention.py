"""Cross-attention in Hugging Face: exact where nothing is to be read, equal to a reference written apart, trainable."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from persona.errors import CheckpointError, PersonaError
from persona.injection import CrossAttention, PersonalizedLM, load_llm
from persona.injection.cross_attention import decoder_blocks

ASK = "What does this user buy most?"
LONG = "Which app does this user open most? Say one word and nothing else."


def open_gates(model, gate=0.8):
    """Makes an untrained model's layers add something."""
    with torch.no_grad():
        for layer in model.cross_attention.layers.values():
            layer.gate.fill_(gate)
            for part in (layer.to_q, layer.to_k, layer.to_v, layer.to_o):
                part.weight.normal_(0, 0.3)
            layer.norm.weight.uniform_(0.5, 1.5)
            layer.memory_norm.weight.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def make(llm_path, encoder):
    """A model with an injection of the given kind on the tiny Llama."""

    def made(injection, every=1):
        torch.manual_seed(2)
        llm, tokenizer = load_llm(llm_path)
        return PersonalizedLM(
            llm, tokenizer, encoder, base_model=str(llm_path), injection=injection, cross_every=every
        ).eval()

    return made


def memories(model, users, tokens=4, seed=0):
    """Rows `[users, tokens, width]` that are unlike one another."""
    rows = torch.randn(users, tokens, model.adapter.llm_width, generator=torch.Generator().manual_seed(seed))
    return 3 * torch.nn.functional.normalize(rows, dim=-1)


def reference_logits(model, prompt, memory):
    """Logits `[L, vocab]` of one prompt by plain matrix products; `memory` `[K, width]` or None."""
    llm, config = model.llm.model, model.llm.config
    hidden = llm.embed_tokens(torch.tensor([prompt.ids]))
    positions = torch.arange(hidden.shape[1])[None]
    rotary = llm.rotary_emb(hidden, positions)
    mask = torch.full((hidden.shape[1],) * 2, -math.inf).triu(1)[None, None]

    def rms(x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    for i, block in enumerate(llm.layers):
        hidden = block(hidden, position_embeddings=rotary, attention_mask=mask)
        if memory is None or str(i) not in model.cross_attention.layers:
            continue
        layer = model.cross_attention.layers[str(i)]
        query = rms(hidden[0], layer.norm.weight) @ layer.to_q.weight.T
        seen = rms(memory, layer.memory_norm.weight)
        keys, values = seen @ layer.to_k.weight.T, seen @ layer.to_v.weight.T
        size, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        heads = []
        for head in range(config.num_attention_heads):
            own, shared = slice(head * size, (head + 1) * size), head // groups
            theirs = slice(shared * size, (shared + 1) * size)
            weights = torch.softmax(query[:, own] @ keys[:, theirs].T / math.sqrt(size), -1)
            heads.append(weights @ values[:, theirs])
        hidden = hidden + torch.tanh(layer.gate) * (torch.cat(heads, -1) @ layer.to_o.weight.T)
    return model.llm.lm_head(llm.norm(hidden))[0]


@torch.inference_mode()
def test_equals_a_reference_written_apart(make):
    model = open_gates(make("cross_attention"))
    prompts = [model.template.prompt(text, 4) for text in (ASK, LONG)]
    assert [p.count for p in prompts] == [0, 0] and [p.memory for p in prompts] == [4, 4]
    memory = memories(model, 2)
    batch = model.collate(prompts)
    found = model.logits(memory, batch, keep=batch.input_ids.shape[1])
    for row, prompt, own in zip(found, prompts, memory):
        expected = reference_logits(model, prompt, own)
        torch.testing.assert_close(row[-len(prompt.ids) :], expected, atol=2e-4, rtol=1e-4)
        assert (expected - reference_logits(model, prompt, None)).abs().max() > 0.1  # the memory does something


@torch.inference_mode()
def test_every_nth_block(make):
    assert list(make("cross_attention", every=2).cross_attention.layers) == ["0"]
    assert list(make("cross_attention", every=1).cross_attention.layers) == ["0", "1"]


@torch.inference_mode()
def test_a_fresh_model_and_a_zero_memory_equal_the_llm_bit_for_bit(make, family, family_llm, tokenizer, encoder):
    model = PersonalizedLM(family_llm, tokenizer, encoder, injection="cross_attention", cross_every=1).eval()
    plain = model.collate([model.template.prompt(text) for text in (ASK, LONG)])
    batch = model.collate([model.template.prompt(text, 4) for text in (ASK, LONG)])
    expected = model.logits(None, plain, keep=5)
    assert torch.equal(model.logits(memories(model, 2), batch, keep=5), expected)  # gates at zero
    open_gates(model)
    assert torch.equal(model.logits(torch.zeros(2, 4, 64), batch, keep=5), expected)
    assert torch.equal(model.logits(None, plain, keep=5), expected)
    changed = model.logits(memories(model, 2), batch, keep=5)
    assert (changed - expected).abs().max() > 1e-2


@torch.inference_mode()
def test_a_batch_of_users_with_more_and_fewer_tokens_and_of_nobody(make):
    model = open_gates(make("cross_attention"))
    memory = memories(model, 2)
    prompts = [model.template.prompt(ASK, 4), model.template.prompt(LONG), model.template.prompt(ASK, 2)]
    together = model.logits(torch.cat([memory[0], memory[1][:2]]), model.collate(prompts))
    alone = [
        model.logits(rows, model.collate([prompt]))[0]
        for rows, prompt in zip((memory[:1], None, memory[1:, :2]), prompts)
    ]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_repeated_tokens_read_as_the_fewer_ones(make):
    """What lets an engine with a fixed number of slots serve fewer tokens."""
    model = open_gates(make("cross_attention"))
    memory = memories(model, 1, tokens=2)
    few = model.logits(memory, model.collate([model.template.prompt(ASK, 2)]))
    many = model.logits(memory.repeat(1, 2, 1), model.collate([model.template.prompt(ASK, 4)]))
    torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_generation_with_the_cache_equals_generation_without_and_makes_keys_once(make, monkeypatch):
    model = open_gates(make("cross_attention"))
    prompts = [model.template.prompt(text, 4) for text in (ASK, LONG, ASK)]
    rows = memories(model, 3)
    made = []
    layer = model.cross_attention.layers["0"]
    monkeypatch.setattr(layer, "keys_values", lambda memory, own=layer.keys_values: made.append(1) or own(memory))
    answers = model.complete(prompts, rows.flatten(0, 1), max_new_tokens=12)
    assert made == [1] and len(set(answers)) == 3
    assert model.complete(prompts, rows.flatten(0, 1), max_new_tokens=12, use_cache=False) == answers
    beams = model.complete(prompts, rows.flatten(0, 1), max_new_tokens=12, num_beams=2)
    assert len(beams) == 3  # keys and values are repeated for each beam
    assert model.complete([model.template.prompt(ASK)], None) == make("soft_prompt").complete(
        [model.template.prompt(ASK)], None
    )


@torch.inference_mode()
def test_both_puts_the_same_tokens_into_the_prompt_and_the_memory(make):
    model = make("both")
    prompt = model.template.prompt(ASK, 4)
    assert (prompt.count, prompt.memory, prompt.users) == (4, 4, 4)
    rows = memories(model, 1)
    soft = make("soft_prompt")
    assert torch.equal(
        model.logits(rows, model.collate([prompt])), soft.logits(rows, soft.collate([soft.template.prompt(ASK, 4)]))
    )
    open_gates(model)
    with pytest.raises(PersonaError, match="room for 4 user tokens, but there are 8"):
        model.logits(rows.repeat(1, 2, 1).flatten(0, 1), model.collate([prompt]))
    assert len(model.complete([prompt], rows[0])) == 1


def test_only_its_own_weights_learn_and_the_gate_first(make, shop_histories):
    model = make("cross_attention").train()
    batch = model.collate(
        [model.template.prompt(ASK, 4)] * 3, [model.template.answer(ASK, word) for word in ("food", "music", "toys")]
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    events, owner = model.encoder.batch(shop_histories), torch.arange(3)
    losses = []
    for _ in range(30):
        loss = model(events, [ASK] * 3, owner, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            layer = model.cross_attention.layers["0"]
            assert layer.gate.grad.abs() > 0 and layer.to_k.weight.grad.abs().max() == 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(p.grad is None for p in model.llm.parameters())


def test_round_trip_and_damage(make, tmp_path, shop_histories):
    model = open_gates(make("both", every=2))
    saved = model.save_pretrained(tmp_path / "adapter")
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["injection"], config["cross_every"]) == ("both", 2)
    loaded = PersonalizedLM.from_pretrained(saved)
    states = model.encoder.read(shop_histories)
    assert loaded.generate([ASK] * 3, states) == model.generate([ASK] * 3, states)
    (saved / "cross_attention.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cross_attention\.safetensors is missing"):
        PersonalizedLM.from_pretrained(saved)
    (saved / "adapter_config.json").write_text(json.dumps({**config, "injection": "telepathy"}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*injection"):
        PersonalizedLM.from_pretrained(saved)


def test_what_cannot_be(make, tokenizer, encoder):
    with pytest.raises(PersonaError, match="injection is one of soft_prompt, cross_attention, both, not 'prefix'"):
        make("prefix")
    with pytest.raises(PersonaError, match="not 0"):
        make("cross_attention", every=0)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=2))
    with pytest.raises(PersonaError, match="not to GPT2LMHeadModel; use injection: soft_prompt"):
        PersonalizedLM(other, tokenizer, encoder, injection="cross_attention")


def test_a_lora_goes_with_it(make):
    model = open_gates(make("cross_attention"))
    rows, batch = memories(model, 1), model.collate([model.template.prompt(ASK, 4)])
    with torch.inference_mode():
        before = model.logits(rows, batch)
    model.add_lora(2)
    assert len(decoder_blocks(model.llm)) == 2
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(rows, batch), before)


def test_half_precision_stays_close(llm_path, tokenizer, encoder):
    """bfloat16 keeps 8 bits, and two layers of it move logits of about 10 by less than 1."""
    torch.manual_seed(2)
    llm, _ = load_llm(llm_path)
    model = open_gates(PersonalizedLM(llm, tokenizer, encoder, injection="cross_attention", cross_every=1)).eval()
    rows, batch = memories(model, 1), model.collate([model.template.prompt(ASK, 4)])
    with torch.inference_mode():
        exact = model.logits(rows, batch)
        model.llm.to(torch.bfloat16)
        close = model.logits(rows, batch)
    assert close.dtype == torch.bfloat16
    assert (close.float() - exact).abs().mean() < 0.1 * exact.std()


def test_threads_read_their_own_users(make):
    """Both wait for each other inside the LLM, between a user's being set and being read."""
    model = open_gates(make("cross_attention"))
    rows, batch = memories(model, 2), model.collate([model.template.prompt(ASK, 4)])
    with torch.inference_mode():
        expected = [model.logits(rows[i : i + 1], batch) for i in range(2)]
    together = threading.Barrier(2)
    first = model.llm.model.layers[0].register_forward_pre_hook(lambda *_: (together.wait(30), None)[1])

    def ask(i):
        with torch.inference_mode():
            return model.logits(rows[i : i + 1], batch)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(ask, range(2)))
    first.remove()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_a_loaded_model_is_on_one_device(make, tmp_path):
    saved = make("cross_attention").save_pretrained(tmp_path / "adapter")
    loaded = PersonalizedLM.from_pretrained(saved, device="meta")
    assert {p.device.type for p in loaded.parameters()} == {"meta"}


def test_cross_attention_alone_reads_nothing_outside_its_block(make):
    model = open_gates(make("cross_attention"))
    assert isinstance(model.cross_attention, CrossAttention)
    batch = model.collate([model.template.prompt(ASK)])
    with torch.inference_mode():
        plain = model.logits(None, batch)
        with pytest.raises(RuntimeError), model.cross_attention.reading(memories(model, 1)):
            raise RuntimeError
        assert torch.equal(model.logits(None, batch), plain)
