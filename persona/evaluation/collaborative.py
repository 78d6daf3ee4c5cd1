"""What collaborative filtering reaches without an LM: item cosine and EASE, fitted on who took what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.preprocessing import normalize

from persona.history import Event, History


class ItemModel:
    """Items of one source and the binary user-item matrix of the histories given. Subclasses weigh pairs of items."""

    def __init__(self, histories: Iterable[History], source: str):
        self.source = source
        pairs = [
            (n, e.item_id)
            for n, history in enumerate(histories)
            for e in history.events
            if e.source == source and e.item_id is not None
        ]
        self.index = {i: n for n, i in enumerate(dict.fromkeys(i for _, i in pairs))}
        """Column of each item."""
        rows, columns = [n for n, _ in pairs], [self.index[i] for _, i in pairs]
        self.matrix = csr_matrix((np.ones(len(pairs)), (rows, columns)))
        self.matrix.data[:] = 1.0

    def met(self, events: Iterable[Event]) -> list[int]:
        """Columns of the known items of some events."""
        return [self.index[e.item_id] for e in events if e.source == self.source and e.item_id in self.index]

    def scores(self, met: Sequence[int]) -> np.ndarray:
        """Score of every item `[items]` for a user with the items `met`; zeros when there are none."""
        raise NotImplementedError

    def score(self, events: Iterable[Event], item_id: str | None) -> float:
        """Score of one item; 0 for an unknown item and for events without a known one."""
        met = self.met(events)
        return float(self.scores(met)[self.index[item_id]]) if met and item_id in self.index else 0.0


class ItemCosine(ItemModel):
    """Mean cosine between an item's and the history items' columns (item-KNN with all neighbours)."""

    def __init__(self, histories: Iterable[History], source: str):
        super().__init__(histories, source)
        columns = normalize(self.matrix.T.tocsr())  # [items, users]
        self._weights = (columns @ columns.T).tocsr()

    def scores(self, met: Sequence[int]) -> np.ndarray:
        if not len(met):
            return np.zeros(len(self.index))
        return np.asarray(self._weights[list(met)].mean(axis=0)).ravel()


class Ease(ItemModel):
    """The closed-form linear autoencoder (Steck 2019). Its weights are dense: `items` squared, 8 bytes each."""

    def __init__(self, histories: Iterable[History], source: str, ridge: float = 200.0):
        super().__init__(histories, source)
        gram = (self.matrix.T @ self.matrix).toarray()
        gram[np.diag_indices_from(gram)] += ridge
        inverse = np.linalg.inv(gram)
        self._weights = -inverse / np.diag(inverse)
        self._weights[np.diag_indices_from(self._weights)] = 0.0

    def scores(self, met: Sequence[int]) -> np.ndarray:
        return self._weights[list(dict.fromkeys(met))].sum(axis=0) if len(met) else np.zeros(len(self.index))
