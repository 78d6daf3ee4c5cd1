"""Retrieval against rank_bm25 and against vectors, and what does not depend on words."""

import numpy as np
import pytest
from rank_bm25 import BM25Okapi

from persona.evaluation.lamp.retrieval import Bm25, Dense, OkapiIndex, Random, Recency
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS
from persona.history import Event, History

TASK = TASKS["LaMP_3"]


def sample(query, texts, id="1"):
    items = [Event("lamp", float(n), event_id=str(n), attributes={"text": t}) for n, t in enumerate(texts)]
    return Sample(id, f"What is the score? review: {query}", History("u", tuple(items)))


def places(items):
    return [int(item.event_id) for item in items]


def corpus(rng, documents, vocabulary):
    """Texts of up to 12 words, of which the first few are in most documents."""
    chances = 1 / np.arange(1, vocabulary + 1)
    return [
        " ".join(f"w{i}" for i in rng.choice(vocabulary, rng.integers(0, 13), p=chances / chances.sum()))
        for _ in range(documents)
    ]


@pytest.mark.parametrize("documents", [1, 2, 3, 7, 40, 200])
def test_scores_are_those_of_rank_bm25_to_the_last_bit(documents):
    rng, negative = np.random.default_rng(documents), 0
    for vocabulary in (2, 5, 30, 300):
        texts = ["w0 w1", *corpus(rng, documents - 1, vocabulary)]  # rank_bm25 cannot take a corpus without words
        split = [text.split() for text in texts]
        expected, index, retrieve = BM25Okapi(split, k1=1.5, b=0.75, epsilon=0.25), OkapiIndex(split), Bm25()
        negative += sum(np.mean([word in text for text in split]) > 0.5 for word in expected.idf)
        for query in corpus(rng, 20, vocabulary + 3):
            scores = expected.get_scores(query.split())
            assert (index.score(query.split()) == scores).all()
            best = np.argsort(-scores, kind="stable")[:5]
            assert places(retrieve(sample(query, texts), TASK, 5)) == best.tolist()
    assert negative  # words in more than half of the documents


def test_bm25_keeps_case_and_marks():
    texts = ["oak table", "Oak table", "oak, table"]
    assert places(Bm25()(sample("Oak", texts), TASK, 1)) == [1]
    assert places(Bm25()(sample("oak,", texts), TASK, 1)) == [2]


@pytest.mark.parametrize("query", ["", "unknown words"])
def test_of_equals_the_earlier_comes_first(query):
    assert places(Bm25()(sample(query, ["a b", "a c", "a d"]), TASK, 2)) == [0, 1]


@pytest.mark.parametrize("texts", [[], [""], ["", " "]])
def test_profiles_without_words(texts):
    assert places(Bm25()(sample("oak", texts), TASK, 4)) == list(range(len(texts)))


def test_profiles_and_tasks_are_not_mixed_up():
    """Same user, same ids, same number of items, and an index that is asked for again after many others."""
    retrieve = Bm25()
    asked = [sample("oak", ["oak" if n == place else f"ash{n}" for n in range(20)]) for place in range(20)]
    for _ in range(2):
        assert [places(retrieve(s, TASK, 1)) for s in asked] == [[place] for place in range(20)]
    items = (
        Event("lamp", 0.0, event_id="0", attributes={"title": "oak", "text": "ash"}),
        Event("lamp", 1.0, event_id="1", attributes={"title": "elm", "text": "oak oak"}),
        Event("lamp", 2.0, event_id="2", attributes={"title": "fir", "text": "fir"}),
        Event("lamp", 3.0, event_id="3", attributes={"title": "fir", "text": "fir"}),
    )
    both = Sample("1", "article: ash", History("u", items))
    assert places(retrieve(both, TASKS["LaMP_4"], 1)) == places(retrieve(both, TASKS["LaMP_6"], 1)) == [0]
    titled = Sample("1", "article: elm", both.profile)
    assert places(retrieve(titled, TASKS["LaMP_4"], 1)) == [1]
    assert places(retrieve(titled, TASKS["LaMP_6"], 1)) == [0]  # which does not read titles


def test_dense_finds_what_means_the_same(text_encoder):
    texts = ["The parliament voted on taxes.", "My puppy loves long walks.", "A recipe for onion soup."]
    retrieve = Dense(text_encoder)
    assert places(retrieve(sample("How to train a young dog", texts), TASK, 1)) == [1]
    ranked = places(retrieve(sample("cooking dinner", texts), TASK, 3))
    vectors = text_encoder.vectors([*texts, "cooking dinner"])
    assert ranked == (vectors[:3] @ vectors[3]).argsort(descending=True).tolist()
    assert retrieve(sample("dog", []), TASK, 3) == []


def test_recency_is_newest_first():
    assert places(Recency()(sample("x", ["a", "b", "c"]), TASK, 2)) == [2, 1]
    assert places(Recency()(sample("x", ["a"]), TASK, 4)) == [0]


def test_random_depends_on_the_seed_and_the_sample_alone():
    texts = [str(n) for n in range(50)]
    one, two = sample("x", texts, "1"), sample("x", texts, "2")
    drawn = places(Random(3)(one, TASK, 5))
    assert len(set(drawn)) == 5
    Random(3)(two, TASK, 5)
    assert places(Random(3)(one, TASK, 5)) == drawn
    assert places(Random(3)(two, TASK, 5)) != drawn != places(Random(4)(one, TASK, 5))
    assert sorted(places(Random()(sample("x", texts[:3]), TASK, 9))) == [0, 1, 2]
    assert places(Random(0)(one, TASK, 3)) == [8, 47, 12]  # pinned: the same in every process
