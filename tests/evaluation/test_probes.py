"""Probes against numbers by hand and scikit-learn's own, and what they say about data that cannot be probed."""

import sys

import numpy as np
import pytest
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from persona.errors import DataError, MissingExtraError
from persona.evaluation.probes import (
    Probe,
    linear_probe,
    look_alike_scores,
    look_alikes,
    recall_of_answers,
    with_interval,
)


def clusters(sizes, seed=0, noise=1.0, dim=4):
    """Embeddings `[sum of sizes, dim]`, each class around its own axis, and their labels."""
    rng = np.random.default_rng(seed)
    labels = [chr(ord("a") + k) for k, size in enumerate(sizes) for _ in range(size)]
    centres = np.repeat(2 * np.eye(dim)[: len(sizes)], sizes, axis=0)
    return centres + noise * rng.normal(size=centres.shape), labels


def probe(truth, probabilities, classes=("a", "b"), common=0):
    probabilities = np.array(probabilities)
    return Probe(classes, np.arange(len(truth)), np.array(truth), probabilities, common, 1.0, {})


def test_numbers_of_two_classes_by_hand():
    # rows by score: b .9, a .8, b .4, a .3, a .1 -> five of six pairs in order; at .4 two of two less one of three
    yes = np.array([0.9, 0.8, 0.4, 0.3, 0.1])
    found = probe([1, 0, 1, 0, 0], np.stack([1 - yes, yes], axis=1))
    assert found.auc == pytest.approx(5 / 6) and found.ks == pytest.approx(2 / 3)
    assert found.correct.tolist() == [1, 0, 0, 1, 1] and found.accuracy == pytest.approx(0.6)
    assert found.majority == pytest.approx(0.6) and found.n == 5


def test_numbers_of_several_classes_are_scikit_learns():
    rng = np.random.default_rng(0)
    truth, raw = rng.integers(0, 3, 200), rng.random((200, 3))
    raw[np.arange(200), truth] += 0.3
    probabilities = raw / raw.sum(1, keepdims=True)
    found = probe(truth, probabilities, ("a", "b", "c"))
    assert found.auc == pytest.approx(roc_auc_score(truth, probabilities, multi_class="ovr", average="macro"))
    apart = [ks_2samp(probabilities[truth == k, k], probabilities[truth != k, k]).statistic for k in range(3)]
    assert found.ks == pytest.approx(np.mean(apart))


def test_scores_of_rows_that_lack_a_class():
    found = probe([0, 0, 1, 2], np.eye(3)[[0, 0, 1, 2]], ("a", "b", "c"))
    assert found.scores().tolist() == [1, 1, 1]
    assert found.scores(np.array([0, 2])).tolist() == [1, 1, 1]  # c is left out
    auc, ks, accuracy = found.scores(np.array([0, 1]))
    assert np.isnan(auc) and np.isnan(ks) and accuracy == 1


def test_a_probe_learns_what_can_be_learned():
    (x, y), (test_x, test_y) = clusters([80, 40, 40], 0), clusters([40, 30, 30], 1)
    found = linear_probe(x, y, test_x, test_y)
    assert found.classes == ("a", "b", "c") and found.n == 100 and found.majority == pytest.approx(0.4)
    assert found.auc > 0.9 and found.accuracy > 0.75 and 0.6 < found.ks < 1 and found.dropped == {}
    np.testing.assert_allclose(found.probabilities.sum(1), 1)
    again = linear_probe(x, y, test_x, test_y)
    assert np.array_equal(found.probabilities, again.probabilities) and found.strength == again.strength
    text = str(found)
    assert f"AUC {found.auc:.3f}" in text and "(majority 0.400) of 3 classes, 100 rows" in text


def test_a_probe_of_noise_finds_nothing():
    rng = np.random.default_rng(0)
    labels = rng.choice(["no", "yes"], 400).tolist()
    found = linear_probe(rng.normal(size=(200, 8)), labels[:200], rng.normal(size=(200, 8)), labels[200:])
    assert abs(found.auc - 0.5) < 0.1 and found.strength <= 1e-2  # and is held back


def test_scales_of_columns_do_not_matter():
    (x, y), (test_x, test_y) = clusters([40, 40], 0), clusters([40, 40], 1)
    scale, shift = np.array([1e-6, 1e6, 1.0, 1e3]), np.array([0.0, 1e7, -5.0, 0.0])
    plain, scaled = (
        linear_probe(x, y, test_x, test_y),
        linear_probe(x * scale + shift, y, test_x * scale + shift, test_y),
    )
    np.testing.assert_allclose(plain.probabilities, scaled.probabilities, atol=1e-6)
    constant = linear_probe(np.ones((80, 3)), y, np.ones((80, 3)), test_y)
    assert constant.auc == 0.5 and constant.ks == 0


def test_rare_and_unseen_classes_are_left_out_and_named():
    (x, y), (test_x, test_y) = clusters([20, 20, 4], 0), clusters([10, 10, 3, 2], 1)
    found = linear_probe(x, y, test_x, test_y)
    assert found.classes == ("a", "b") and found.dropped == {"c": (4, 3), "d": (0, 2)}
    assert found.n == 20 and found.rows.tolist() == list(range(20))
    assert "left out: 'c' (4 training rows, 3 test rows), 'd' (0 training rows, 2 test rows)" in str(found)
    kept = linear_probe(x[:40], y[:40], test_x[:20], test_y[:20])
    assert np.array_equal(kept.probabilities, found.probabilities)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_y": ["a"] * 20}, r"two classes of at least 5 training rows; there are 'a' \(20\)"),
        ({"train_y": [str(i) for i in range(20)]}, r"two classes of at least 5 training rows; there are '0' \(1\)"),
        ({"train_x": np.zeros((0, 4)), "train_y": []}, "two classes of at least 5 training rows; there are no rows"),
        ({"train_x": np.zeros((1, 4)), "train_y": ["a"]}, "two classes"),
        ({"test_y": ["a"] * 20}, "the test rows have fewer than two of the classes 'a', 'b'"),
        ({"test_y": ["z"] * 20}, "the test rows have fewer than two of the classes"),
        ({"test_x": np.zeros((0, 4)), "test_y": []}, "the test rows have fewer than two of the classes"),
        ({"train_y": ["a"] * 19}, "train_y has 19 labels for 20 rows"),
        ({"train_y": ["a", *range(19)]}, r"train_y\[1\] is 0; a label is a string"),
        ({"test_y": [None] * 20}, r"test_y\[0\] is None"),
        ({"test_x": np.ones((20, 5))}, "train_x has 4 columns, but test_x 5"),
        ({"train_x": np.full((20, 4), np.nan)}, "train_x holds NaN or an infinity in row 0"),
        ({"test_x": np.ones(20)}, r"test_x has the shape \[20\]"),
        ({"test_x": [["a"] * 4] * 20}, "test_x is not a matrix of numbers"),
        ({"test_x": [[1.0], [1.0, 2.0]]}, "test_x is not a matrix of numbers"),
    ],
)
def test_what_cannot_be_probed(change, message):
    x, y = clusters([10, 10])
    with pytest.raises(DataError, match=message):
        linear_probe(**{"train_x": x, "train_y": y, "test_x": x, "test_y": y, **change})


def test_recall_by_hand():
    answers = np.eye(4)
    users = np.array([[3, 2, 1, 0], [0, 3, 2, 1], [1, 0, 2, 3], [2, 2, 2, 2.0]])
    found = recall_of_answers(users, answers, [0, 3, 1, 0])
    assert found["ranks"].tolist() == [1, 3, 4, 4]  # who scores all answers the same has found none
    assert found["recall@1"] == 0.25 and found["recall@3"] == 0.5 and found["recall@10"] == 1
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 4 + 1 / 4) / 4)
    some = recall_of_answers(users, answers, [0, 3, 1, 0], [[0, 1], [3, 1], [1], [0, 0, 3]])
    assert some["ranks"].tolist() == [1, 2, 1, 2]  # an option that is named twice is one option


def test_recall_of_many_users_is_that_of_each():
    rng = np.random.default_rng(0)
    users, answers, right = rng.normal(size=(2500, 3)), rng.normal(size=(30, 3)), rng.integers(0, 30, 2500)
    found = recall_of_answers(users, answers, right)
    each = [1 + (-(answers @ user)).argsort().tolist().index(r) for user, r in zip(users, right)]
    assert found["ranks"].tolist() == each
    options = [range(30)] * 2500
    assert np.array_equal(recall_of_answers(users, answers, right, options)["ranks"], found["ranks"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"right": [0]}, "there are 2 users, but 1 right answers"),
        ({"right": [0, 3]}, "right holds 3; indices are 0 to 2"),
        ({"right": [0, -1]}, "right holds -1"),
        ({"right": [0.0, 1.0]}, "right is not a list of indices"),
        ({"options": [[0]]}, "there are 2 users, but 1 options"),
        ({"options": [[0], [0, 2]]}, "the right answer of user 1, 1, is not among the options"),
        ({"options": [[0], []]}, "the right answer of user 1, 1, is not among the options"),
        ({"options": [[0, 9], [1]]}, "options of user 0 holds 9"),
        ({"answers": np.eye(3)[:, :2]}, "users have 3 dimensions, but answers 2"),
        ({"users": np.zeros((0, 3)), "right": []}, "no users"),
        ({"answers": np.zeros((0, 3))}, "right holds 0; indices are 0 to -1"),
        ({"users": np.array([[0, 0, np.inf]] * 2)}, "users holds NaN or an infinity in row 0"),
    ],
)
def test_what_cannot_be_recalled(change, message):
    with pytest.raises(DataError, match=message):
        recall_of_answers(**{"users": np.eye(3)[:2], "answers": np.eye(3), "right": [0, 1], **change})


def test_look_alikes_by_hand():
    embeddings = np.array([[1, 0], [10, 10], [0, 1], [5, 1], [-1, 0], [0, 0], [1, 0.0]])
    assert look_alikes(embeddings, [0], 6).tolist() == [6, 3, 1, 2, 5, 4]  # length does not matter; nothing is level
    assert look_alikes(embeddings, [0, 2, 2], 2).tolist() == [1, 3]
    assert look_alikes(embeddings, np.array([0, 4]), 1).tolist() == [1]  # seeds that cancel out: all are level


def test_look_alike_scores_of_classes_apart_and_mixed():
    x, y = clusters([30, 20, 10], noise=0.05)
    found = look_alike_scores(x, y, 0.2)
    assert found.classes == ("a", "b", "c") and found.auc == 1 and found.precision == 1 and found.dropped == ()
    assert found.seeds.tolist() == [6, 4, 2] and found.rest.tolist() == [24, 16, 8]
    np.testing.assert_allclose(found.chance_of, [24 / 54, 16 / 56, 8 / 58])
    noise = np.random.default_rng(0).normal(size=(600, 4))
    mixed = look_alike_scores(noise, ["a", "b"] * 300, 0.1)
    assert abs(mixed.auc - 0.5) < 0.05 and abs(mixed.precision - 0.5) < 0.07
    drawn = [look_alike_scores(noise, ["a", "b"] * 300, 0.1, seed).auc for seed in (0, 1)]
    assert drawn[0] == mixed.auc != drawn[1]


def test_users_in_one_place_are_as_good_as_chance_whatever_their_order():
    labels = ["a"] * 10 + ["b"] * 30
    found = look_alike_scores(np.ones((40, 3)), labels, 0.5)
    assert found.auc_of.tolist() == [0.5, 0.5]
    np.testing.assert_allclose(found.precision_of, found.chance_of)


def test_precision_at_r_by_hand():
    # Whichever a is the seed, both b come before the other a; whichever b is, the other b comes first.
    angles = np.radians([0, 40, 15, 22, 90, 180])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = look_alike_scores(embeddings, ["a", "a", "b", "b", "c", "d"], 0.5)
    assert found.classes == ("a", "b") and found.dropped == ("c", "d")
    assert found.precision_of.tolist() == [0, 1] and found.auc_of.tolist() == [0.5, 1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: look_alikes(x, [], 1), "at least one seed"),
        (lambda x: look_alikes(x, [6], 1), "seeds holds 6"),
        (lambda x: look_alikes(x, [0], 6), "there are 5 users besides the seeds; 6 of them"),
        (lambda x: look_alikes(x, [0], 0), "0 of them cannot be named"),
        (lambda x: look_alikes(x * np.nan, [0], 1), "embeddings holds NaN"),
        (lambda x: look_alike_scores(x, ["a"] * 6), "two classes"),
        (lambda x: look_alike_scores(x, list("abcdef")), "one of them with two users"),
        (lambda x: look_alike_scores(x[:0], []), "two classes"),
        (lambda x: look_alike_scores(x, ["a"] * 5), "labels has 5 labels for 6 rows"),
        (lambda x: look_alike_scores(x, list("aabbcc"), 1.0), "seed_share is between 0 and 1, not 1.0"),
        (lambda x: look_alike_scores(x, list("aabbcc"), float("nan")), "seed_share is between 0 and 1, not nan"),
    ],
)
def test_what_has_no_look_alikes(call, message):
    with pytest.raises(DataError, match=message):
        call(np.eye(6))


def test_intervals_hold_the_value_and_shrink_with_rows():
    few, many = (with_interval(np.tile([0, 1, 1, 1], n)) for n in (5, 500))
    assert few.value == many.value == 0.75 and isinstance(few.low, float)
    assert few.low < many.low < 0.75 < many.high < few.high
    half = 1.96 * np.sqrt(0.75 * 0.25 / 2000)  # of the normal approximation
    assert many.high - many.low == pytest.approx(2 * half, rel=0.1)
    assert few == with_interval(np.tile([0, 1, 1, 1], 5))
    assert with_interval([1, 1, 1]) == (1, 1, 1)


def test_intervals_of_a_probe():
    (x, y), (test_x, test_y) = clusters([30, 30], 0), clusters([30, 30], 1)
    found = linear_probe(x, y, test_x, test_y)
    made = with_interval(np.arange(found.n), found.scores, n=200)
    np.testing.assert_allclose(made.value, [found.auc, found.ks, found.accuracy])
    assert (made.low <= made.value).all() and (made.value <= made.high).all() and (made.high - made.low < 0.4).all()
    ranks = recall_of_answers(np.eye(4), np.eye(4), [0, 1, 2, 0])["ranks"]
    assert with_interval(ranks <= 1).value == 0.75


@pytest.mark.parametrize("rows", [[], [1.0], 3.0])
def test_what_has_no_interval(rows):
    with pytest.raises(DataError, match="at least two rows"):
        with_interval(rows)


@pytest.mark.parametrize("name", ["probes", "look_alikes"])
def test_scikit_learn_is_missing(monkeypatch, name):
    from importlib import import_module

    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    for module in ("probes", "look_alikes"):
        monkeypatch.delitem(sys.modules, f"persona.evaluation.{module}", raising=False)
    with pytest.raises(MissingExtraError, match=r"persona\[eval\]"):
        import_module(f"persona.evaluation.{name}")
