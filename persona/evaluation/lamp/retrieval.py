"""Which items of a profile a prompt shows: by shared words, by meaning, by age, or by chance."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np
from cachetools import LRUCache
from scipy.sparse import csc_array

from persona.encoders import TextEncoder
from persona.errors import MissingExtraError
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import Task
from persona.history import Event, History

try:
    import bm25s
except ImportError as error:
    raise MissingExtraError("retrieval for LaMP needs bm25s: pip install 'persona[eval]'") from error

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG

PROFILES = 8
"""Indexed profiles that a retriever keeps. One of 10,000 items of 200 words takes some 30 MB."""

Index = TypeVar("Index")


class Retriever(Protocol):
    """Chooses items of a sample's profile for its prompt."""

    def __call__(self, sample: Sample, task: Task, count: int) -> list[Event]:
        """At most `count` items, best first."""
        ...


class Recency:
    """The newest items, newest first; of equal times the later in the profile."""

    def __call__(self, sample: Sample, task: Task, count: int) -> list[Event]:
        return list(reversed(sample.profile.events))[:count]


class Random:
    """Items by chance, the same ones for the same sample and seed, in any process and order."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def __call__(self, sample: Sample, task: Task, count: int) -> list[Event]:
        items = sample.profile.events
        return random.Random(f"{self.seed} {sample.id}").sample(items, min(count, len(items)))


class Bm25:
    """Items that share words with the query, as the benchmark ranks them: see `OkapiIndex`. The earlier of equals."""

    def __init__(self):
        self._index = _Indexed(lambda texts: OkapiIndex([text.split() for text in texts]))

    def __call__(self, sample: Sample, task: Task, count: int) -> list[Event]:
        if not sample.profile.events:
            return []
        scores = self._index(sample.profile, task).score(task.query(sample.input).split())
        return _best(sample.profile, scores, count)


class Dense:
    """Items whose vectors have the largest dot product with the query's. The earlier of equals.

    `facebook/contriever` is the benchmark's encoder (Izacard et al. 2022, mean pooling). `TextEncoder` normalises
    vectors, so this ranks by cosine, where the benchmark takes the plain dot product.
    """

    def __init__(self, text_encoder: TextEncoder):
        self.text_encoder = text_encoder
        self._index = _Indexed(text_encoder.vectors)

    def __call__(self, sample: Sample, task: Task, count: int) -> list[Event]:
        items = self._index(sample.profile, task)  # [items, dim]
        (query,) = self.text_encoder.vectors([task.query(sample.input)])
        return _best(sample.profile, (items @ query).numpy(), count)


class OkapiIndex(bm25s.BM25):
    """BM25Okapi (Robertson et al. 1994) as the package rank_bm25 computes it, to the last bit, from an index.

    bm25s has no such idf: log((N - df + 0.5) / (df + 0.5)), and a quarter of its mean over all words in place of a
    negative one. So this overrides the step of bm25s that turns counts into scores, which is meant to be overridden.
    """

    EPSILON = 0.25

    def __init__(self, documents: list[list[str]]):
        super().__init__(k1=1.5, b=0.75, dtype="float64")
        words: dict[str, int] = {}  # in order of appearance, which fixes how the mean idf is rounded
        ids = [[words.setdefault(word, len(words)) for word in document] for document in documents]
        self.index((ids, words), create_empty_token=False, show_progress=False)

    def build_index_from_ids(self, unique_token_ids, corpus_token_ids, **progress) -> dict:
        """The matrix `[documents, words]` of scores, by columns."""
        total, lengths = len(corpus_token_ids), np.array([len(ids) for ids in corpus_token_ids])
        rows, columns = np.repeat(np.arange(total), lengths), np.concatenate(corpus_token_ids).astype(int)
        counts = csc_array((np.ones(len(rows)), (rows, columns)), shape=(total, len(unique_token_ids)))
        documents = np.diff(counts.indptr)  # [words]: how many hold the word
        idf = np.array([math.log(total - n + 0.5) - math.log(n + 0.5) for n in documents.tolist()])
        idf[idf < 0] = self.EPSILON * (sum(idf.tolist()) / max(1, len(idf)))
        norm = self.k1 * (1 - self.b + self.b * lengths / (lengths.mean() or 1))  # [documents]
        data = counts.data * (self.k1 + 1) / (counts.data + norm[counts.indices])
        self.nonoccurrence_array = None  # bm25s asks for it; other variants need one
        return {
            "data": np.repeat(idf, documents) * data,
            "indices": counts.indices,
            "indptr": counts.indptr,
            "num_docs": total,
        }

    def score(self, query: list[str]) -> np.ndarray:
        """Scores `[documents]`; a word counts as often as the query holds it."""
        known = self.get_tokens_ids(query)
        return self.get_scores_from_ids(known) if known else np.zeros(self.scores["num_docs"])


class _Indexed(Generic[Index]):
    """What `make` makes of the texts of a profile, kept for the last few profiles."""

    def __init__(self, make: Callable[[list[str]], Index]):
        self.make = make
        self._kept: LRUCache[tuple[int, str], tuple[History, Index]] = LRUCache(PROFILES)

    def __call__(self, profile: History, task: Task) -> Index:
        key = id(profile), task.name
        if key not in self._kept:
            # The profile is kept as well: while it lives, no other has its id.
            self._kept[key] = profile, self.make([task.describe(item) for item in profile.events])
        return self._kept[key][1]


def _best(profile: History, scores: np.ndarray, count: int) -> list[Event]:
    return [profile.events[i] for i in (-scores).argsort(kind="stable")[:count]]
