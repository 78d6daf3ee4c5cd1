"""Other users' events in a history: mixed in for training and for measuring, and never asked about."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from persona.history import Event, History
from persona.training.configs import TrainingConfig
from persona.training.data import Collator, Examples
from persona.training.noise import MOST, fitting, foreign_sources, with_noise
from persona.training.objectives import next_item_loss
from persona.training.questions import Catalogue, QuestionSpec


def test_noise_keeps_the_history_and_its_span():
    own = History("u", tuple(Event("search", 10.0 * i, text=f"own {i}") for i in range(8)))
    pool = [Event("app", 1e9, text=f"noise {i}") for i in range(50)]
    rng = np.random.default_rng(0)
    assert with_noise(own, pool, 0.0, rng) is own and len(with_noise(History("u"), pool, 2.0, rng)) == 0
    for share in (0.25, 1.0, 2.0):
        noisy = with_noise(own, pool, share, np.random.default_rng(0))
        assert len(noisy) == round(8 * (1 + share))
        assert [e for e in noisy.events if e.source == "search"] == list(own.events)
        assert all(0 <= e.timestamp <= 70 for e in noisy.timed)
        assert noisy == with_noise(own, pool, share, np.random.default_rng(0))
    assert with_noise(own.of([replace(own.events[0])]), pool, 2.0, rng).timed[0].text == "own 0"


def test_a_history_is_cut_so_that_foreign_events_fit_the_window():
    assert [fitting(64, share) for share in (0.0, 1.0, 2.0)] == [64, 32, 21] and fitting(1, 2.0) == 1


def test_the_asked_source_is_never_foreign_and_alone_there_is_none():
    names = {"search", "page", "app"}
    seen = {foreign_sources(names, "page", np.random.default_rng(seed)) for seed in range(30)}
    assert seen == {frozenset(s) for s in ({"search"}, {"app"}, {"search", "app"})}
    assert foreign_sources({"page"}, "page", np.random.default_rng(0)) == frozenset()


@pytest.fixture
def disturbed(domain):
    """Every training history has foreign events; purchases and the profile are asked about."""
    city = QuestionSpec(kind="top_attribute", source="profile", attribute="city", prompt="Where does this user live?")
    asked = {**domain.recipe.questions, "city": city}
    training = replace(domain.recipe.training, foreign_share=1.0)
    changed = copy.copy(domain)
    changed.recipe = replace(domain.recipe, training=training, questions=asked)
    users = [domain.histories[user] for user in domain.train]
    changed.catalogue = Catalogue(users, asked)
    return changed


def test_training_mixes_in_what_is_not_asked_about(disturbed):
    examples, questions, mixed, about = Examples(disturbed, 200), disturbed.recipe.questions, 0, set()
    for i in range(200):
        example = examples[i]
        own = disturbed.histories[example.history.user].events
        foreign = [e for e in example.history.events if e not in own]
        mixed += bool(foreign)
        assert {e.source for e in foreign} <= example.foreign
        asked = {questions[q.task].source for q in example.questions}
        assert asked and not asked & example.foreign
        about |= asked
        assert len(example.history.timed) <= disturbed.recipe.window
        assert len(foreign) <= MOST * (len(example.history.timed) - len(foreign)) + 1
    assert any("purchase" in examples[i].foreign for i in range(200))
    assert mixed > 100 and about == {"purchase", "profile"}
    assert examples[7] == Examples(disturbed, 8)[7]


def test_foreign_events_are_those_of_other_training_users(disturbed):
    others = [*disturbed.validation, *disturbed.test]
    held = {u: h.of(replace(e, text="held back") for e in h.events) for u, h in disturbed.histories.items()}
    named = {
        u: h.of(replace(e, event_id=f"{u}/{e.event_id}") for e in h.events) for u, h in disturbed.histories.items()
    }
    disturbed.histories = named | {user: held[user] for user in others}
    examples = Examples(disturbed, 200)
    for example in map(examples.__getitem__, range(200)):
        owners = [
            (e.event_id.split("/")[0], e in disturbed.histories[example.history.user].events)
            for e in example.history.events
        ]
        assert "held back" not in {e.text for e in example.history.events}
        assert all(own == (user == example.history.user) for user, own in owners)


def test_what_is_foreign_is_not_foretold(disturbed, model):
    examples = [Examples(disturbed, 12)[i] for i in range(12)]
    batch = Collator(model)(examples)
    events, names = batch["events"], list(model.encoder.vocabulary.sources)
    for row, example in enumerate(examples):
        for place in range(events.mask.shape[1]):
            source = int(events.source[row, place])
            wanted = bool(events.item[row, place]) and names[source - 1] not in example.foreign
            assert bool(batch["foretold"][row, place]) == wanted
    states, texts = torch.randn(12, 1 + events.mask.shape[1], model.encoder.config.width), torch.zeros(1, 1)
    none = torch.zeros_like(batch["foretold"])
    assert next_item_loss(model.encoder, states, events, texts, foretold=none) == 0


def test_without_it_an_example_is_drawn_as_ever(domain):
    rng = np.random.default_rng([domain.recipe.training.seed, 1, 2])
    cut = domain.training_cut(rng)
    questions = domain.questions(cut, rng, training=True)
    order = rng.permutation(len(questions))[: domain.recipe.training.questions_per_history]
    example = Examples(domain, 3)[2]
    assert example.history == cut.history and example.questions == tuple(questions[i] for i in order)
    assert not example.foreign


def test_one_source_alone_is_left_as_it_is(domain):
    one = copy.copy(domain)
    readers = [reader for reader in domain.recipe.readers if reader.source == "purchase"]
    one.recipe = replace(domain.recipe, sources={"purchase": domain.recipe.sources["purchase"]}, readers=readers)
    other = copy.copy(one)
    other.recipe = replace(one.recipe, training=replace(one.recipe.training, foreign_share=1.0))
    assert [Examples(one, 5)[i] for i in range(5)] == [Examples(other, 5)[i] for i in range(5)]


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match="foreign_share"):
        TrainingConfig(foreign_share=share)
