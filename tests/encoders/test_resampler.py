"""The resampler: how long ago something happened, and which states and words it may see."""

import torch

from persona.encoders.resampler import AGES, Resampler, ages


def test_ages_count_back_from_the_newest_real_row():
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 3:] = False
    buckets = ages(mask)
    assert buckets[0].tolist() == [8, 8, 8, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert buckets[1, :3].tolist() == [2, 1, 0]


def test_ages_grow_with_distance_up_to_the_last_bucket():
    buckets = ages(torch.ones(1, 5000, dtype=torch.bool))[0].flip(0)
    assert (buckets.diff() >= 0).all()
    assert buckets[[7, 8, 15, 16, 31, 32]].tolist() == [7, 8, 9, 10, 11, 12]
    assert buckets.unique().tolist() == list(range(AGES))


def resampler():
    torch.manual_seed(0)
    return Resampler(text_dim=16, width=32, heads=2, layers=2, tokens=4, dropout=0.0).eval()


def test_masked_states_and_words_are_not_seen():
    module = resampler()
    states, words = torch.randn(1, 6, 32), torch.randn(1, 5, 16)
    mask, seen = torch.arange(6)[None] < 4, torch.arange(5)[None] < 3
    topic = torch.randn(1, 32)
    padded = module(states, mask, words, seen, topic)
    assert torch.allclose(padded, module(states[:, :4], mask[:, :4], words[:, :3], seen[:, :3], topic), atol=1e-5)
    states[:, 4:], words[:, 3:] = 100.0, 100.0
    assert torch.allclose(padded, module(states, mask, words, seen, topic), atol=1e-5)


def test_tokens_depend_on_states_on_words_and_on_recency():
    module = resampler()
    states, words = torch.randn(1, 4, 32), torch.randn(1, 3, 16)
    mask, seen = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    topic = torch.randn(1, 32)
    tokens = module(states, mask, words, seen, topic)
    assert tokens.shape == (1, 4, 32)
    for other in (
        module(torch.randn(1, 4, 32), mask, words, seen, topic),
        module(states, mask, torch.randn(1, 3, 16), seen, topic),
        module(states, mask, words, seen, torch.randn(1, 32)),
        module(states.flip(1), mask, words, seen, topic),
    ):
        assert (tokens - other).abs().max() > 1e-3
    assert (tokens[0, 0] - tokens[0, 1]).abs().max() > 1e-3
