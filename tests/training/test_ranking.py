"""Leave-one-out and full ranking, held against scikit-learn's metrics."""

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score, top_k_accuracy_score

from persona.encoders import EncoderConfig, UserEncoder, Vocabulary
from persona.history import Event, History, SourceSpec
from persona.training.ranking import encoder_scores, leave_one_out, metrics_of_ranks, ranking_values, ranks


def buys(user, *items, time=0.0):
    return History(user, tuple(Event("buy", time or float(n), item_id=i) for n, i in enumerate(items, 1)))


def test_the_last_and_the_one_before_it():
    histories = [buys("a", "x", "y", "z", "w"), buys("b", "x", "y")]
    test, validation = leave_one_out(histories), leave_one_out(histories, -2)
    assert [e.item_id for e in test.targets] == ["w"] and [e.item_id for e in validation.targets] == ["z"]
    assert [[e.item_id for e in h.events] for h in test.histories] == [["x", "y", "z"]]
    assert [[e.item_id for e in h.events] for h in validation.histories] == [["x", "y"]]
    assert len(test) == 1


def test_events_of_equal_time_keep_the_order_of_the_records():
    held = leave_one_out([buys("a", "x", "y", "z", time=5.0)])
    assert held.targets[0].item_id == "z" and [e.item_id for e in held.histories[0].events] == ["x", "y"]


def test_metrics_equal_scikit_learns():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(50, 40)), rng.integers(40, size=50)
    values = metrics_of_ranks(ranks(scores, targets))
    for k in (10, 20):
        assert values[f"recall@{k}"].mean() == pytest.approx(
            top_k_accuracy_score(targets, scores, k=k, labels=np.arange(40))
        )
        assert values[f"ndcg@{k}"].mean() == pytest.approx(ndcg_score(np.eye(40)[targets], scores, k=k))


def test_equal_scores_count_against_the_target_and_an_unknown_one_is_never_found():
    assert ranks(np.zeros((1, 5)), np.array([2])).tolist() == [4]
    assert ranks(np.array([[3.0, 2.0, 1.0]]), np.array([-1])).tolist() == [3]
    assert metrics_of_ranks(np.array([0, 1000]))["ndcg@10"].tolist() == [1.0, 0.0]


def test_what_a_user_has_seen_can_be_left_out(text_encoder):
    torch.manual_seed(0)
    histories = [buys(user, *"abcdefghijklmnopq"[n : n + 6]) for n, user in enumerate("uvwxyz")]
    config = EncoderConfig(width=32, heads=2, max_events=10, item_targets="id", dropout=0.0)
    encoder = UserEncoder(config, Vocabulary.fit(histories, {"buy": SourceSpec("item")}, 1), text_encoder).eval()
    held = leave_one_out(histories)
    scores = encoder_scores(encoder, held.histories).numpy()
    for row, history, target, got in zip(
        scores, held.histories, held.targets, ranking_values(encoder, held, seen=False)["ndcg@20"]
    ):
        index = {key.split("/")[1]: i - 1 for key, i in encoder.vocabulary.items.items()}
        unseen = [row[i] for item, i in index.items() if item not in {e.item_id for e in history.events}]
        rank = sum(score > row[index[target.item_id]] for score in unseen)
        assert got == pytest.approx(1 / np.log2(rank + 2))
    assert (ranking_values(encoder, held)["ndcg@20"] <= ranking_values(encoder, held, seen=False)["ndcg@20"]).all()
