"""Training examples: repeatable by index, from training users alone, never with the target in the history."""

import json

import pytest
import torch

from persona.errors import DataError
from persona.history import ReaderSpec, SourceSpec
from persona.training.data import Collator, Examples
from persona.training.questions import QuestionSpec
from persona.training.recipe import Domain, Recipe


def test_example_n_is_always_the_same(domain):
    a, b = Examples(domain, 20), Examples(domain, 500)
    assert len(a) == 20 and [a[i] for i in (7, 3, 7)] == [b[i] for i in (7, 3, 7)]
    assert len({a[i].history.user for i in range(20)}) > 5


def test_no_user_held_back_is_in_any_example(domain):
    examples = Examples(domain, 400)
    assert {examples[i].history.user for i in range(400)} <= set(domain.train)


def test_the_target_is_never_in_the_history_and_its_rival_was_never_met(domain):
    texts = {i.text: i.item_id for i in domain.catalogue.items["purchase"].values()}
    examples, found = Examples(domain, 400), 0
    for i in range(400):
        example = examples[i]
        read = {e.item_id for e in example.history.events if e.source == "purchase"}
        ever = {e.item_id for e in domain.histories[example.history.user].events if e.source == "purchase"}
        for q in example.questions:
            if q.task == "next_purchase":
                item = texts[q.prompt.removeprefix("Will this user buy ").removesuffix(" next?")]
                found += 1
                assert item not in read
                assert (item in ever) == (q.answer == "yes")
    assert found > 100


def test_without_history_only_the_questions_stay(domain):
    with_history, without = Examples(domain, 20), Examples(domain, 20, without_history=True)
    for i in range(20):
        assert without[i].history.events == () and with_history[i].history.events
        assert without[i].questions == with_history[i].questions


def test_a_batch_asks_each_history_its_own_questions(domain, model):
    examples = [Examples(domain, 3)[i] for i in range(3)]
    asked = [(i, q) for i, e in enumerate(examples) for q in e.questions]
    batch = Collator(model)(examples)
    assert batch["owner"].tolist() == [i for i, _ in asked]
    assert batch["instructions"] == [q.prompt for _, q in asked]
    tokenizer = model.template.tokenizer
    for labels, (_, q) in zip(batch["batch"].labels, asked):
        assert tokenizer.decode(labels[labels >= 0]) == f" {q.answer}<|end|>"
    assert batch["events"].mask.shape[0] == 3


def test_batches_train_every_prefix_of_the_tokens(domain, model):
    examples = [Examples(domain, 100)[i] for i in range(100)]
    counts = [int(Collator(model)([e])["batch"].soft[0].sum()) for e in examples]
    assert set(counts) == {1, 2, 3, 4} and 45 < counts.count(4) < 80
    again = [int(Collator(model)([e])["batch"].soft[0].sum()) for e in examples]
    assert counts == again


def test_the_whole_loss_runs_on_a_batch(domain, model):
    out = model(**Collator(model)([Examples(domain, 3)[i] for i in range(3)]))
    assert torch.isfinite(out["loss"]) and out["states"].shape[0] == 3


def test_records_and_recipes_from_which_nothing_can_be_learnt_are_errors_and_not_endless_loops(domain, tmp_path):
    rows = "\n".join(json.dumps({"u": user, "t": 5, "i": "a"}) for user in range(20))
    (tmp_path / "r.jsonl").write_text(rows)
    recipe = Recipe(
        name="still",
        sources={"r": SourceSpec("item")},
        readers=[ReaderSpec("r", "r.jsonl", user="u", timestamp="t", item_id="i")],
        questions={"next": QuestionSpec("next_item", "r", "{item}?")},
    )
    with pytest.raises(DataError, match="two different times"):
        Domain(recipe, tmp_path)
    (tmp_path / "r.jsonl").write_text(
        rows + "\n" + "\n".join(json.dumps({"u": u, "t": 6, "i": "a"}) for u in range(20))
    )
    with pytest.raises(DataError, match="answers a question"):
        Examples(Domain(recipe, tmp_path), 1)[0]  # the one item there is, everybody has already met
