"""Full-ranking metrics of next-item models: Recall@k and NDCG@k over all items (UQABench, stage 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from persona.encoders import UserEncoder
from persona.history import Event, History

DEPTHS = (10, 20)


@dataclass(frozen=True)
class Held:
    """Histories and the one event that came next in each."""

    histories: list[History]
    """What a model may read."""
    targets: list[Event]
    """What it has to foretell."""

    def __len__(self) -> int:
        return len(self.targets)


def leave_one_out(histories: Sequence[History], position: int = -1) -> Held:
    """Each history's last item event (`position` -1) or the one before it (-2), and all that came before that event.

    Events of equal time keep the order of the records: half of MovieLens' times are not distinct, and public
    leave-one-out results break these ties by the order of the file, too. Histories with fewer than three item events
    are left out.
    """
    kept, targets = [], []
    for history in histories:
        places = [i for i, e in enumerate(history.events) if e.item_id is not None and e.timestamp is not None]
        if len(places) < 3:
            continue
        at = places[position]
        kept.append(history.of(history.events[:at]))
        targets.append(history.events[at])
    return Held(kept, targets)


@torch.inference_mode()
def encoder_scores(encoder: UserEncoder, histories: Sequence[History], batch_size: int = 256) -> torch.Tensor:
    """Logits `[users, items]` of every vocabulary item as the next one."""
    texts = encoder.text_encoder.vectors(encoder.vocabulary.item_texts).to(encoder.device)
    rows = []
    for start in range(0, len(histories), batch_size):
        states, mask = encoder.states(encoder.batch(histories[start : start + batch_size]))
        last = mask.sum(1) - 1
        rows.append(encoder.item_scores(states[torch.arange(len(states)), last], texts).cpu())
    return torch.cat(rows)


def ranking_values(encoder: UserEncoder, held: Held, *, seen: bool = True) -> dict[str, np.ndarray]:
    """`recall@k` and `ndcg@k` of each user, `[users]`; a target that the vocabulary does not know is never found.

    Without `seen`, items of a user's own history are no candidates (but for the target).
    """
    scores = encoder_scores(encoder, held.histories).numpy()
    items = encoder.vocabulary.items
    targets = np.array([items.get(f"{e.source}/{e.item_id}", 0) - 1 for e in held.targets])
    if not seen:
        for row, history, target in zip(scores, held.histories, targets):
            met = [items.get(f"{e.source}/{e.item_id}", 0) - 1 for e in history.events]
            row[[i for i in met if i >= 0 and i != target]] = -np.inf
    return metrics_of_ranks(ranks(scores, targets))


def ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Rank of each row's target, from 0, among `scores` `[users, items]`; equal scores count against it.

    A target of -1 is not among the items and ranks behind all of them.
    """
    own = scores[np.arange(len(scores)), targets][:, None]
    rank = (scores >= own).sum(1) - 1
    return np.where(targets < 0, scores.shape[1], rank)


def metrics_of_ranks(rank: np.ndarray) -> dict[str, np.ndarray]:
    """With one right item, Recall@k is whether it is among the first k, and NDCG@k is 1 / log2(rank + 2) if it is."""
    values = {}
    for k in DEPTHS:
        found = rank < k
        values[f"recall@{k}"] = found.astype(float)
        values[f"ndcg@{k}"] = np.where(found, 1 / np.log2(rank + 2), 0.0)
    return values
