"""The contrastive objective: its loss, across processes, and in training."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from persona.encoders import EncoderConfig
from persona.encoders.llm_encoder import LLMUserEncoder
from persona.history import Event, History
from persona.injection import PersonalizedLM
from persona.training.configs import TrainingConfig
from persona.training.data import Collator, Example, Examples
from persona.training.objectives import contrastive_loss, matryoshka_contrastive_loss
from persona.training.questions import Question
from persona.training.trainer import new_model, train_adapter

LABELS = torch.tensor([0, 1, 2, 1, 3, 0])
ASK = "What does this user buy most?"


def rows(seed, n=6, d=8):
    torch.manual_seed(seed)
    return normalize(torch.randn(n, d), dim=-1)


def by_hand(users, answers, labels, temperature, margin):
    """Row by row, in words of the paper."""
    losses = []
    for i in range(len(users)):
        own = users[i] @ answers[i]
        rivals = []
        for j in range(len(users)):
            if labels[i] == labels[j]:
                continue
            for score in (users[i] @ answers[j], users[i] @ users[j], answers[i] @ answers[j]):
                if score <= own + margin:
                    rivals.append(math.exp(score / temperature))
        losses.append(-math.log(math.exp(own / temperature) / (math.exp(own / temperature) + sum(rivals))))
    return float(np.mean(losses))


@pytest.mark.parametrize(("temperature", "margin"), [(0.07, 0.1), (0.5, -0.2), (1.0, 2.0)])
def test_the_loss_is_the_papers(temperature, margin):
    users, answers, labels = rows(0), rows(1), torch.tensor([0, 1, 2, 1, 3, 0])
    found = contrastive_loss(users, answers, labels, temperature=temperature, margin=margin)
    assert float(found) == pytest.approx(by_hand(users, answers, labels, temperature, margin), rel=1e-4)


def test_no_pair_at_all_costs_nothing():
    loss = contrastive_loss(rows(0, 0).requires_grad_(), rows(1, 0), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert float(loss) == 0


def test_a_pair_alone_or_with_its_like_costs_nothing():
    assert float(contrastive_loss(rows(0, 1), rows(1, 1), torch.tensor([7]))) == 0
    assert float(contrastive_loss(rows(0, 3), rows(1, 3), torch.tensor([7, 7, 7]))) == pytest.approx(0, abs=1e-6)


def test_matryoshka_is_the_mean_over_dimensions():
    torch.manual_seed(0)
    tokens, answers, labels = torch.randn(5, 3, 8), torch.randn(5, 8), torch.arange(5)
    each = [
        contrastive_loss(normalize(tokens.mean(1)[:, :d], dim=-1), normalize(answers[:, :d], dim=-1), labels)
        for d in (8, 4, 2)
    ]
    found = matryoshka_contrastive_loss(tokens, answers, labels, (8, 4, 2))
    assert float(found) == pytest.approx(float(torch.stack(each).mean()), rel=1e-6)


def test_two_processes_learn_what_one_does(tmp_path, unused_port):
    """As many pairs in each, more in one, none in one; `contrastive_process.py` has the same rows and labels."""
    command = [sys.executable, str(Path(__file__).with_name("contrastive_process.py")), str(unused_port), str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    weight = torch.eye(8).requires_grad_()
    loss = contrastive_loss(normalize(rows(0) @ weight, dim=-1), rows(1), LABELS)
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 3
        for theirs, gradient in found:
            assert float(theirs) == pytest.approx(float(loss), rel=1e-6)
            assert torch.allclose(gradient, weight.grad, atol=1e-6)


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def recipe(domain, llm_path):
    """The shop's recipe with a small LLM as encoder and both objectives."""
    encoder = EncoderConfig(
        backbone="llm", width=64, heads=2, tokens=4, max_events=64, lora_rank=4, source_adapters=True, dropout=0.0
    )
    training = replace(
        domain.recipe.training, contrastive_weight=1.0, contrastive_dims=(32, 8), empty_share=0.2, drop_sources=0.3
    )
    return replace(domain.recipe, encoder=encoder, training=training)


def with_recipe(domain, recipe):
    import copy

    other = copy.copy(domain)
    other.recipe = recipe
    return other


def test_pairs_leave_out_yes_and_no(domain, recipe, llm_path, text_encoder):
    domain = with_recipe(domain, recipe)
    model = new_model(domain, llm_path, text_encoder)
    examples = [Examples(domain, 4)[i] for i in range(4)]
    batch = Collator(model, recipe.training)(examples)
    questions = [q for e in examples for q in e.questions]
    pairs = batch["pairs"]
    assert [questions[i].answer for i in pairs.index] == pairs.answers
    assert set(pairs.answers).isdisjoint({"yes", "no"}) and 0 < len(pairs.answers) < len(questions)
    labels = dict(zip(pairs.answers, pairs.labels.tolist()))
    assert len(set(labels.values())) == len(labels)
    assert "pairs" not in Collator(model, TrainingConfig())(examples)
    alone = Collator(model, replace(recipe.training, answer_weight=0.0))(examples)
    assert alone["batch"] is None


def test_some_instructions_are_withheld_from_the_encoder_alone(domain, recipe, llm_path, text_encoder):
    domain = with_recipe(domain, recipe)
    model = new_model(domain, llm_path, text_encoder)
    examples = [Examples(domain, 30)[i] for i in range(30)]
    batch = Collator(model, recipe.training)(examples)
    empty = [i for i, text in enumerate(batch["instructions"]) if not text]
    assert 0.05 < len(empty) / len(batch["instructions"]) < 0.4
    again = Collator(model, replace(recipe.training, empty_share=0.0))(examples)
    assert all(again["instructions"]) and torch.equal(batch["batch"].labels, again["batch"].labels)


def test_users_meet_their_answers(domain, recipe, llm_path, text_encoder):
    """Four pairs by contrast alone: each user's embedding ends nearest to the own answer."""
    model = new_model(with_recipe(domain, recipe), llm_path, text_encoder)
    words = {"ana": "music", "ben": "garden", "cyd": "pets", "dan": "toys"}
    histories = [
        History(user, tuple(Event("visit", 60.0 * i, text=word) for i in range(5))) for user, word in words.items()
    ]
    questions = [Question("t", ASK, word, tuple(words.values())) for word in words.values()]
    training = replace(recipe.training, answer_weight=0.0, empty_share=0.0)
    batch = Collator(model, training)([Example(h, (q,)) for h, q in zip(histories, questions)])
    pairs = batch.pop("pairs")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        answers = model.encoder.answer_vectors(pairs.answers)
        loss = matryoshka_contrastive_loss(model(**batch)["tokens"], answers, pairs.labels, (64, 8))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    cosines = model.encoder.encode(histories, ASK) @ model.encoder.encode_answers(list(words.values())).T
    assert cosines.argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.2), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_each_mixture_trains_saves_and_loads(weights, domain, recipe, llm_path, text_encoder, tmp_path):
    names = ("answer_weight", "contrastive_weight", "next_item_weight")
    training = replace(recipe.training, steps=2, contrastive_chunk=1, **dict(zip(names, weights)))
    trained = train_adapter(
        with_recipe(domain, replace(recipe, training=training)), llm_path, tmp_path, text_encoder=text_encoder
    )
    loaded = PersonalizedLM.from_pretrained(tmp_path, llm_path, text_encoder=text_encoder)
    assert isinstance(loaded.encoder, LLMUserEncoder)
    user = [domain.histories[domain.test[0]]]
    assert np.allclose(trained.encoder.encode(user, ASK), loaded.encoder.encode(user, ASK), atol=1e-5)
    assert loaded.generate([ASK], loaded.encoder.read(user)) == trained.generate([ASK], trained.encoder.read(user))


def test_recipes_that_make_no_sense_are_refused(recipe):
    with pytest.raises(ValueError, match="letter"):
        replace(recipe, letters=True)
    with pytest.raises(ValueError, match="an embedding has 64"):
        replace(recipe, training=replace(recipe.training, contrastive_dims=(128,)))


def test_objectives_that_make_no_sense_are_refused():
    for wrong in (
        {"answer_weight": 0.0, "next_item_weight": 0.0},
        {"contrastive_weight": -1.0},
        {"temperature": 0.0},
        {"empty_share": 1.1},
        {"drop_sources": -0.1},
        {"contrastive_dims": (0,)},
        {"contrastive_chunk": -1},
    ):
        with pytest.raises(ValueError, match=r"weights|temperature|share|dims|chunk"):
            TrainingConfig(**wrong)
