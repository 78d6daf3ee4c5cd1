"""Other users' events in a history: mixed in for training and for measuring, and never asked about."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from persona.history import Event, History
from persona.training.configs import TrainingConfig
from persona.training.data import Examples
from persona.training.noise import MOST, foreign_events, with_noise


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


def test_the_asked_source_is_never_foreign_and_alone_there_is_none():
    pools = {name: [Event(name, 1.0, text=name)] for name in ("search", "page", "app")}
    seen = set()
    for seed in range(30):
        sources, events = foreign_events(pools, "page", np.random.default_rng(seed))
        assert sources and "page" not in sources and {e.source for e in events} == sources
        seen.add(frozenset(sources))
    assert seen == {frozenset(s) for s in ({"search"}, {"app"}, {"search", "app"})}
    assert foreign_events({"page": pools["page"]}, "page", np.random.default_rng(0)) == (set(), [])


@pytest.fixture
def disturbed(domain):
    domain = copy.copy(domain)
    domain.recipe = replace(domain.recipe, training=replace(domain.recipe.training, foreign_share=1.0))
    return domain


def test_training_mixes_in_what_is_not_asked_about(disturbed):
    examples, sources, mixed = Examples(disturbed, 200), disturbed.recipe.questions, 0
    for i in range(200):
        example = examples[i]
        own = disturbed.histories[example.history.user].events
        foreign = [e for e in example.history.events if e not in own]
        mixed += bool(foreign)
        assert not {e.source for e in foreign} & {sources[q.task].source for q in example.questions}
        assert len(example.history.timed) <= disturbed.recipe.window
        assert len(foreign) <= MOST * (len(example.history.timed) - len(foreign)) + 1
    assert mixed > 100
    assert examples[7] == Examples(disturbed, 8)[7]


def test_foreign_events_are_those_of_training_users(disturbed):
    others = [*disturbed.validation, *disturbed.test]
    held = {u: h.of(replace(e, text="held back") for e in h.events) for u, h in disturbed.histories.items()}
    disturbed.histories = disturbed.histories | {user: held[user] for user in others}
    examples = Examples(disturbed, 200)
    assert "held back" not in {e.text for i in range(200) for e in examples[i].history.events}


def test_without_it_examples_are_those_of_before(domain, disturbed):
    clean = copy.copy(domain)
    clean.recipe = replace(domain.recipe, training=replace(domain.recipe.training, foreign_share=0.0))
    assert Examples(clean, 3)[2] == Examples(domain, 3)[2] != Examples(disturbed, 3)[2]


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match="foreign_share"):
        TrainingConfig(foreign_share=share)
