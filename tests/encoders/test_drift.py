"""Drift between two encoders' spaces: what a rotation explains is brought back, and what it does not is measured."""

import numpy as np
import pytest
from scipy.stats import ortho_group

from persona.encoders.drift import Drift
from persona.errors import DataError
from persona.evaluation.drift import measure


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def drawn(n, d, seed=0):
    return unit(np.random.default_rng(seed).standard_normal((n, d)))


def test_a_rotated_and_shifted_space_is_recovered():
    old = drawn(300, 16)
    new = 0.4 * old @ ortho_group.rvs(16, random_state=1) + np.linspace(-1, 1, 16)
    drift = Drift.fit(old[:100], new[:100])
    assert drift.scale == pytest.approx(0.4, rel=1e-6)
    mapped = drift.map(old)
    assert mapped.shape == (300, 16) and mapped.dtype == np.float32
    np.testing.assert_allclose(mapped, unit(new), atol=1e-5)
    loss = measure(old, new)
    assert loss.mapped[0] == 1 and loss.cosine[0] == pytest.approx(1, abs=1e-5) and loss.unmapped[0] < 0.5
    assert loss.users == 150 and "recall@10 among 150 held-out users: mapped 1.000 [1.000, 1.000]" in str(loss)


def test_a_wider_space_holds_the_old_one_as_it_is():
    old = drawn(80, 8)
    new = np.pad(old, ((0, 0), (0, 4))) @ ortho_group.rvs(12, random_state=2)
    drift = Drift.fit(old[:40], new[:40])
    np.testing.assert_allclose(drift.rotation @ drift.rotation.T, np.eye(8), atol=1e-9)
    np.testing.assert_allclose(drift.map(old), new, atol=1e-5)
    assert measure(old, new, k=5).mapped[0] == 1


def test_independent_spaces_have_the_recall_of_chance():
    loss = measure(drawn(400, 16), drawn(400, 16, seed=1), k=10)
    assert loss.chance == pytest.approx(10 / 199)
    mean, low, high = loss.mapped
    assert low < mean < high < 3 * loss.chance and abs(loss.cosine[0]) < 0.15


def test_noise_on_a_rotation_costs_some_recall():
    """Against neighbours counted one by one."""
    old = drawn(60, 8)
    noise = 0.15 * np.random.default_rng(5).standard_normal((60, 8))
    new = unit(old @ ortho_group.rvs(8, random_state=3) + noise)
    loss = measure(old, new, k=3, seed=7)
    order = np.random.default_rng(7).permutation(60)
    fitted, held = order[:30], order[30:]
    mapped, asked = Drift.fit(old[fitted], new[fitted]).map(old[held]), new[held]
    shares = []
    for i in range(30):
        others = [j for j in range(30) if j != i]
        right = sorted(others, key=lambda j: -(asked[i] @ asked[j]))[:3]
        found = sorted(others, key=lambda j: -(asked[i] @ mapped[j]))[:3]
        shares.append(len(set(right) & set(found)) / 3)
    assert loss.mapped[0] == pytest.approx(np.mean(shares)) and loss.unmapped[0] < loss.mapped[0] < 1


def test_the_interval_is_narrower_with_more_users():
    widths = []
    for n in (60, 600):
        old = drawn(n, 8)
        noise = 0.2 * np.random.default_rng(5).standard_normal((n, 8))
        _, low, high = measure(old, unit(old + noise), k=5).mapped
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(
    "old, new, message",
    [
        (drawn(9, 4), drawn(9, 3), "4 dimensions and new ones 3, which cannot hold them"),
        (drawn(9, 4), drawn(8, 4), "9 old and 8 new"),
        (drawn(1, 4), drawn(1, 4), "at least 2"),
        (np.full((9, 4), np.nan), drawn(9, 4), "old vectors of the shape"),
        (drawn(9, 4), np.ones(9), "new vectors of the shape"),
    ],
)
def test_what_cannot_be_fitted_is_refused(old, new, message):
    with pytest.raises(DataError, match=message):
        Drift.fit(old, new)


def test_other_widths_are_not_mapped_and_small_samples_not_measured():
    with pytest.raises(DataError, match="5 dimensions, and the map takes 4"):
        Drift.fit(drawn(9, 4), drawn(9, 4)).map(drawn(2, 5))
    with pytest.raises(DataError, match=r"sample of 20 users is too small to measure recall@10; take at least 24"):
        measure(drawn(20, 4), drawn(20, 4))


def test_vectors_that_are_all_one_are_mapped_to_the_new_mean():
    new = drawn(9, 4)
    mapped = Drift.fit(np.ones((9, 4)), new).map(np.ones((2, 4)))
    np.testing.assert_allclose(mapped, unit(new.mean(0)[None]).repeat(2, 0), atol=1e-6)
