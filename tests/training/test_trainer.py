"""Training an adapter: it learns, it can be stopped and resumed, and its control sees no user."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from persona.demo.shop import generate_shop
from persona.errors import PersonaError
from persona.history import Event, History
from persona.injection import PersonalizedLM
from persona.training.data import Collator, Example
from persona.training.objectives import next_item_loss
from persona.training.questions import Question
from persona.training.recipe import Domain
from persona.training.trainer import new_model, train_adapter

ASK = "What does this user buy most?"


def weights(folder):
    return {**load_file(folder / "encoder" / "model.safetensors"), **load_file(folder / "projector.safetensors")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_shop(tmp_path_factory.mktemp("shop"), users=20)


def test_two_users_learn_different_answers(model):
    """One pair of users, the same question, two answers: only the user tokens can tell them apart."""
    histories = [
        History(user, tuple(Event("purchase", 60.0 * i, text=f"{word} {i}", item_id=f"{word}{i}") for i in range(6)))
        for user, word in (("ana", "oak violin music"), ("ben", "tulip bulb garden"))
    ]
    answers = ["music", "garden"]
    with torch.no_grad():
        for matrix in (p for p in model.llm.model.layers.parameters() if p.dim() == 2):
            matrix.mul_(0.3)  # a calmer LLM: what a random one answers is all but unsteerable
    examples = [Example(h, (Question("t", ASK, a, tuple(answers)),), index=0) for h, a in zip(histories, answers)]
    batch = Collator(model)(examples)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < 1 < losses[0] / 8
    count = int(batch["batch"].soft[0].sum())
    assert model.generate([ASK] * 2, model.encoder.read(histories), count=count) == answers


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(domain, data, llm_path, text_encoder, tmp_path):
    encoder = replace(domain.recipe.encoder, dropout=0.2)  # so that the random state must be restored too
    domain = Domain(replace(domain.recipe, encoder=encoder), data)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_adapter(domain, llm_path, whole, text_encoder=text_encoder)
    # Stopped in the middle of the same eight steps: as a crash would leave it, with checkpoint-4 the newest.
    with pytest.raises(InterruptedError):
        stop_after(5, lambda: train_adapter(domain, llm_path, halves, text_encoder=text_encoder))
    assert [p.name for p in halves.glob("checkpoint-*")] == ["checkpoint-4"]
    untrained = weights(halves / "checkpoint-4")
    train_adapter(domain, llm_path, halves, resume=True, text_encoder=text_encoder)
    a, b = weights(whole), weights(halves)
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    assert any((a[k] - untrained[k]).abs().max() > 1e-4 for k in a)


def stop_after(steps, train):
    """Runs `train`, and raises out of the optimizer when it has made so many steps."""
    made = []

    def count(*_):
        made.append(None)
        if len(made) > steps:
            raise InterruptedError

    handle = register_optimizer_step_post_hook(count)
    try:
        train()
    finally:
        handle.remove()


def test_the_saved_adapter_is_the_trained_one(domain, llm_path, text_encoder, tmp_path, shop_histories):
    trained = train_adapter(domain, llm_path, tmp_path, steps=2, text_encoder=text_encoder)
    loaded = PersonalizedLM.from_pretrained(tmp_path)
    assert loaded.adapter.domain == "demo" and not trained.training
    states = trained.encoder.read(shop_histories)
    assert torch.allclose(
        trained.soft_rows(states, [ASK] * 3),
        loaded.soft_rows(loaded.encoder.read(shop_histories), [ASK] * 3),
        atol=1e-5,
    )


def test_the_control_learns_without_reading_events(domain, llm_path, text_encoder, tmp_path):
    control = train_adapter(domain, llm_path, tmp_path, steps=3, without_history=True, text_encoder=text_encoder)
    torch.manual_seed(domain.recipe.training.seed)
    before, after = new_model(domain, llm_path, text_encoder).encoder.state_dict(), control.encoder.state_dict()
    assert torch.equal(before["events.norm.weight"], torch.ones(32))
    assert torch.equal(after["events.norm.weight"], torch.ones(32))  # no event went through it
    assert not torch.equal(after["head.norm.weight"], torch.ones(32))


def test_lora_in_a_recipe_is_trained_and_resumed(domain, data, llm_path, text_encoder, tmp_path):
    config = replace(domain.recipe.training, lora_rank=2, steps=4)
    domain = Domain(replace(domain.recipe, training=config), data)
    with pytest.raises(InterruptedError):
        stop_after(3, lambda: train_adapter(domain, llm_path, tmp_path, text_encoder=text_encoder))
    trained = train_adapter(domain, llm_path, tmp_path, resume=True, text_encoder=text_encoder)
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert trained.adapter.lora and any("lora_B" in k and v.abs().max() > 0 for k, v in lora.items())


def test_next_item_loss_is_the_cross_entropy_of_each_next_item(encoder, shop_histories):
    batch = encoder.batch(shop_histories[:2])
    texts = encoder.text_encoder.vectors(encoder.vocabulary.item_texts)
    with torch.no_grad():
        states, _ = encoder.states(batch)
        loss = next_item_loss(encoder, states, batch, texts)
        catalogue = encoder.events.catalogue(texts, torch.arange(len(texts)))
        by_hand = []
        for b in range(2):
            for n, item in enumerate(batch.item[b].tolist()):
                if item:
                    logits = catalogue @ states[b, n] / 32**0.5  # state n has seen rows 0 to n - 1
                    by_hand.append(-logits.log_softmax(-1)[item - 1])
    assert len(by_hand) > 10 and torch.allclose(loss, torch.stack(by_hand).mean(), atol=1e-5)


def test_next_item_loss_of_histories_without_items_is_zero(encoder):
    batch = encoder.batch([History("u", (Event("search", 1.0, text="tea"),))])
    states, _ = encoder.states(batch)
    loss = next_item_loss(encoder, states, batch, torch.zeros(len(encoder.vocabulary.items), 384))
    assert loss.item() == 0.0 and loss.requires_grad


def test_an_unfinished_run_is_neither_overwritten_nor_left_behind(domain, llm_path, text_encoder, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(PersonaError, match="--resume"):
        train_adapter(domain, llm_path, tmp_path, steps=1, text_encoder=text_encoder)
    (tmp_path / "checkpoint-3").rmdir()
    train_adapter(domain, llm_path, tmp_path, steps=1, text_encoder=text_encoder)
    assert {p.name for p in tmp_path.iterdir()} >= {"training.json", "trained_on.json", "adapter_config.json"}
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_adapter_is_replaced_only_when_told(domain, llm_path, text_encoder, tmp_path):
    options = {"text_encoder": text_encoder}
    train_adapter(domain, llm_path, tmp_path, steps=1, **options)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    for resume in (False, True):  # with nothing to resume, too
        with pytest.raises(PersonaError, match="holds an adapter already; give another --out, or --overwrite"):
            train_adapter(domain, llm_path, tmp_path, steps=2, resume=resume, **options)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(InterruptedError):
        stop_after(2, lambda: train_adapter(domain, llm_path, tmp_path, steps=3, overwrite=True, **options))
    train_adapter(domain, llm_path, tmp_path, steps=3, resume=True, **options)  # without `overwrite`
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 3
