"""The reference LM: packing changes nothing, its prompts are those of its chat template, and it saves as any LLM."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona.errors import PersonaError, RecipeError
from persona.history.render import render_history
from persona.injection import PromptTemplate, load_llm
from persona.training.questions import build_questions
from persona.training.reference_lm import (
    IGNORE,
    PackedRows,
    Reading,
    build_reference_lm,
    collate_rows,
    copying,
    domain_readings,
    packed_loss,
    train_lm,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def rows(domain, tokenizer):
    return PackedRows(domain_readings(domain), tokenizer, domain.recipe.lm, size=50)


def blocks(row):
    """Of each segment that answers something: positions in the row of its history, and its own."""
    for segment in np.unique(row["segments"][row["segments"] != IGNORE]):
        own = np.flatnonzero(row["segments"] == segment)
        home = row["parents"][own[0]]
        yield (np.flatnonzero(row["segments"] == home) if home != segment else own[:0]), own


def test_a_packed_block_has_the_logits_of_the_block_alone(rows, llm_path):
    llm, _ = load_llm(llm_path)
    row = next(r for r in (rows[i] for i in range(50)) if len(np.unique(r["parents"])) > 2)
    batch = collate_rows([row])
    checked = 0
    with torch.no_grad():
        packed = llm(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["positions"]
        ).logits[0]
        for history, own in blocks(row):
            alone = llm(input_ids=torch.tensor(row["input_ids"][np.concatenate([history, own])][None])).logits[0]
            assert torch.allclose(packed[own], alone[len(history) :], atol=1e-3)
            checked += 1
    assert checked > 6


def test_a_packed_block_reads_as_the_chat_template_writes_it(rows, domain, tokenizer):
    template = PromptTemplate(tokenizer)
    with_history = plain = 0
    for row in (rows[i] for i in range(10)):
        for history, own in blocks(row):
            ids = row["input_ids"][np.concatenate([history, own])].tolist()
            text = tokenizer.decode(ids)
            if not text.endswith("<|end|>") or "<|assistant|>" not in text:
                continue  # a history
            prompt, answer = text.removeprefix("<|user|>").removesuffix("<|end|>").split("<|end|><|assistant|> ")
            assert ids == template.prompt(prompt).ids + template.answer(prompt, answer)
            start = (row["labels"][own] != IGNORE).argmax()
            assert row["labels"][own][start:].tolist() == template.answer(prompt, answer)
            with_history, plain = with_history + (len(history) > 0), plain + (len(history) == 0)
    assert with_history > 50 and plain > 3


def test_rows_are_repeatable_and_hold_training_users_only(rows, domain, tokenizer):
    again = PackedRows(domain_readings(domain), tokenizer, domain.recipe.lm, size=1000)
    assert all(np.array_equal(rows[3][k], again[3][k]) for k in rows[3])
    held_back = {
        render_history(cut.history, domain.recipe.sources) for _, cut in domain.cuts(domain.test + domain.validation)
    }
    lines = {line for text in held_back for line in text.split("\n") if line.startswith("age ")}
    trained = {render_history(domain.histories[u], domain.recipe.sources).split("\n")[0] for u in domain.train}
    only_held_back = lines - trained
    assert only_held_back
    text = "\n".join(tokenizer.decode(rows[i]["input_ids"]) for i in range(50))
    assert not any(line in text for line in only_held_back)


def test_a_context_too_small_for_any_row_is_an_error_and_not_an_endless_loop(domain, tokenizer):
    small = PackedRows(domain_readings(domain), tokenizer, replace(domain.recipe.lm, context=8), size=1)
    with pytest.raises(RecipeError, match=r"lm\.context"):
        small[0]


def test_copying_asks_for_words_of_the_question_and_only_where_it_is_long(domain, tokenizer):
    text = " ".join(f"word{i}" for i in range(40))
    for seed in range(20):
        asked, answer = copying(text, np.random.default_rng(seed))
        key = asked.removeprefix(f'{text}\nWhat follows "').removesuffix('"?')
        assert f"{key} {answer}" in text and len(answer.split()) == 8
    assert copying("What does this user buy most?", np.random.default_rng(0)) is None
    config = replace(domain.recipe.lm, copy_share=1.0)
    row, plain = (
        PackedRows(lambda rng: Reading([], "", [(text, "none")]), tokenizer, c, 1)[0]
        for c in (config, replace(config, copy_share=0.0))
    )
    assert "What follows" in tokenizer.decode(row["input_ids"]) and " none" not in tokenizer.decode(row["input_ids"])
    assert "What follows" not in tokenizer.decode(plain["input_ids"])
    short = PackedRows(domain_readings(domain), tokenizer, config, size=1)[0]  # questions too short for it
    assert "What follows" not in tokenizer.decode(short["input_ids"])


def test_loss_falls_on_answers_and_lightly_on_the_history(rows, llm_path):
    llm, _ = load_llm(llm_path)
    batch = collate_rows([rows[0], rows[1]])
    with torch.no_grad():
        loss = packed_loss(llm, batch, 0.5)
        logits = llm(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["positions"]
        ).logits.log_softmax(-1)
    parts = []
    for name in ("labels", "history_labels"):
        at = (batch[name][:, 1:] != IGNORE).nonzero().tolist()
        parts.append(-torch.stack([logits[b, n, batch[name][b, n + 1]] for b, n in at]).mean())
    assert torch.allclose(loss, parts[0] + 0.5 * parts[1], atol=1e-3)


@pytest.mark.parametrize("asked, dtype", [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_the_whole_loss_is_computed_in_the_precision_of_the_run(
    domain, tokenizer, llm_path, tmp_path, monkeypatch, asked, dtype
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    llm, _ = load_llm(llm_path)
    seen = set()
    for part in (llm.lm_head, llm.model.layers[0].mlp.down_proj):
        part.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    train_lm(domain_readings(domain), tokenizer, domain.recipe.lm, tmp_path / "lm", steps=1, start=llm)
    assert seen == {dtype}


def test_a_lowercase_lm_reads_and_writes_no_capitals(domain):
    lower = train_tokenizer(["Parsing of Verbs", "verbs and parsing"] * 50, replace(domain.recipe.lm, lowercase=True))
    assert lower.encode(" Verbs") == lower.encode(" verbs") and len(lower.encode(" VERBS")) == 1
    assert lower.decode(lower.encode("On Parsing, É")) == "on parsing, é"


def test_answers_are_single_tokens_and_emoji_survive(domain, tokenizer):
    for answers in (domain.catalogue.answers["favourite_category"], ("yes", "no")):
        assert all(len(tokenizer.encode(f" {a}")) == 1 for a in answers)
    for text in ("👩‍👩‍👧‍👦 שלום مرحبا", "  two  spaces\nand lines ", "naïve café 12.50"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tiny_build_is_a_checkpoint_that_answers(domain, tmp_path):
    folder = build_reference_lm(domain, tmp_path / "lm")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.head_dim == 32 and model.dtype == torch.float32
    assert model.config.eos_token_id == tokenizer.eos_token_id
    rng = np.random.default_rng(0)
    question = build_questions(domain.training_cut(rng), domain.recipe.questions, domain.catalogue, rng, training=True)[
        0
    ]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question.prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_an_llm_is_replaced_only_where_that_is_said(domain, tmp_path):
    folder = build_reference_lm(domain, tmp_path / "lm", steps=1)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(PersonaError, match="holds an LLM already; give another --out, or --overwrite"):
        build_reference_lm(domain, folder, steps=2)
    assert (folder / "model.safetensors").read_bytes() == before
    build_reference_lm(domain, folder, steps=2, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() != before
