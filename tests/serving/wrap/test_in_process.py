"""A wrapped Hugging Face model is the model, and answers users as the persona does."""

import pytest
import torch

from persona import Persona, wrap
from persona.errors import PersonaError
from persona.store import EventStore

ASK = "What does this user buy most?"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}]
NEW = 8


@pytest.fixture
def persona(model, tmp_path, shop_histories):
    with EventStore(f"sqlite:///{tmp_path / 'local.db'}") as store:
        persona = Persona(model, store)
        for name, history in zip(("ana", "ben", "cleo"), shop_histories):
            persona.observe(name, history.events)
        yield persona


def ids_of(model, *texts, pad_left=True):
    """Chats as a padded batch `[B, L]` and its mask."""
    rows = [torch.tensor(model.template.prompt(text).ids) for text in texts]
    size, batch = max(map(len, rows)), {"input_ids": [], "attention_mask": []}
    for row in rows:
        pad = torch.zeros(size - len(row), dtype=torch.long)
        parts = [pad, row] if pad_left else [row, pad]
        batch["input_ids"].append(torch.cat(parts))
        batch["attention_mask"].append(torch.cat([torch.full_like(p, int(p is row)) for p in parts]))
    return {name: torch.stack(rows) for name, rows in batch.items()}


def answers(persona, out):
    return [
        t.rstrip("\ufffd").strip() for t in persona.model.template.tokenizer.batch_decode(out, skip_special_tokens=True)
    ]


@pytest.mark.parametrize("pad_left", [True, False])
def test_a_model_answers_as_the_persona_does(persona, pad_left):
    llm = wrap(persona.model.llm, persona)
    users, asks = ["ana", "ben", None, "nobody", "cleo"], [ASK, CHAT, ASK, "Hello there?", f"{ASK} {ASK}"]
    expected = persona.generate_batch(list(zip(users, asks)), max_new_tokens=NEW)
    out = llm.generate(
        **ids_of(persona.model, *asks, pad_left=pad_left), user_id=users, max_new_tokens=NEW, do_sample=False
    )
    assert answers(persona, out) == [a.text for a in expected] and out.shape[1] <= NEW
    assert len(set(answers(persona, out))) >= 4


def test_one_user_for_all_rows_and_options(persona):
    llm = wrap(persona.model.llm, persona, tokens=3)
    options = {"max_new_tokens": NEW, "do_sample": False}
    ids = ids_of(persona.model, ASK)["input_ids"]
    expected = persona.generate("ana", ASK, count=3, **{"max_new_tokens": NEW}).text
    assert answers(persona, llm.generate(ids, user_id="ana", **options)) == [expected]
    expected = persona.generate("ana", ASK, instruction="tea", count=1, max_new_tokens=NEW).text
    assert answers(persona, llm.generate(ids, user_id="ana", instruction="tea", tokens=1, **options)) == [expected]
    with pytest.raises(PersonaError, match="2 user ids for 1 prompts"):
        llm.generate(ids, user_id=["ana", "ben"])
    with pytest.raises(PersonaError, match=r"input_ids of shape \[B, L\]"):
        llm.generate(inputs_embeds=torch.ones(1, 3, 64), user_id="ana")


def test_a_wrapped_model_is_the_model(persona):
    original = persona.model.llm
    llm = wrap(original, persona)
    ids = ids_of(persona.model, ASK)
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert type(llm).__name__ == type(original).__name__ and isinstance(llm, type(original))
    assert llm.config is original.config and llm.get_input_embeddings() is original.get_input_embeddings()
    assert torch.equal(llm.generate(**ids, **options), original.generate(**ids, **options))
    assert torch.equal(llm(**ids).logits, original(**ids).logits)
    assert not hasattr(original, "_persona_local")
    llm.half()
    assert original.dtype == torch.float16
    assert llm.generate(**ids, user_id="ana", **options).shape[1] <= NEW
    with pytest.raises(PersonaError, match="wrapped already"):
        wrap(llm, persona)
    with pytest.raises(PersonaError, match="in the mode 'embeds', not 'text'"):
        wrap(original, persona, mode="text")


def test_a_model_of_another_width(persona, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, vocab_size=10)
    )
    with pytest.raises(PersonaError, match="width 64"):
        wrap(small, persona)


def test_a_model_with_a_store_that_fails(persona, tmp_path):
    llm, strict = wrap(persona.model.llm, persona), wrap(persona.model.llm, persona, require=True)
    ids, options = ids_of(persona.model, ASK), {"max_new_tokens": NEW, "do_sample": False}
    plain = persona.generate(None, ASK, max_new_tokens=NEW).text
    (tmp_path / "local.db").unlink()
    assert answers(persona, llm.generate(**ids, user_id="ana", **options)) == [plain]
    with pytest.raises(PersonaError, match="removed or replaced"):
        strict.generate(**ids, user_id="ana", **options)


def test_a_model_beside_a_persona_without_an_llm(persona, tmp_path):
    """The adapter alone, as in a process that holds the LLM itself."""
    folder = persona.model.save_pretrained(tmp_path / "adapter")
    alone = Persona.from_pretrained(folder, store=persona.store, engine=None)
    out = wrap(persona.model.llm, alone).generate(
        **ids_of(persona.model, ASK), user_id="ana", max_new_tokens=NEW, do_sample=False
    )
    assert answers(persona, out) == [persona.generate("ana", ASK, max_new_tokens=NEW).text]
