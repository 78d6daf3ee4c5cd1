"""Item cosine and EASE on matrices small enough to work out."""

import numpy as np
import pytest

from persona.evaluation.collaborative import Ease, ItemCosine
from persona.history import Event, History


def takes(user, *items):
    return History(user, tuple(Event("film", float(n), item_id=i) for n, i in enumerate(items)))


@pytest.fixture
def histories():
    return [takes("u", "a", "b"), takes("v", "a", "b", "b"), takes("w", "b", "c"), takes("x", "d")]


def test_cosine_is_the_mean_over_the_history(histories):
    model = ItemCosine(histories, "film")
    events = takes("y", "a", "c").events
    assert model.score(events, "b") == pytest.approx((2 / np.sqrt(6) + 1 / np.sqrt(3)) / 2)
    assert model.score(events, "d") == 0 and model.score(events, "unknown") == 0
    assert model.score(takes("y", "unknown").events, "b") == 0 and not model.scores([]).any()


def test_ease_is_ridge_regression_without_the_item_itself(histories):
    model, ridge = Ease(histories, "film", ridge=2.0), 2.0
    x = model.matrix.toarray()
    for item, column in model.index.items():
        others = [j for j in range(x.shape[1]) if j != column]
        want = np.linalg.solve(
            x[:, others].T @ x[:, others] + ridge * np.eye(len(others)), x[:, others].T @ x[:, column]
        )
        for j, weight in zip(others, want):
            assert model.scores([j])[column] == pytest.approx(weight)
        assert model.scores([column])[column] == 0, item
    events = takes("y", "a", "a").events
    assert model.score(events, "b") == pytest.approx(model.scores([model.index["a"]])[model.index["b"]])
    assert model.score((), "b") == 0 and model.score(events, None) == 0
