"""Heads: the mean of the states as tokens, whatever is asked; and serving's three steps give what training gives."""

import pytest
import torch

from persona.encoders import EncoderConfig, UserEncoder
from persona.encoders.heads import HEADS, MeanHead
from persona.errors import RecipeError


def make(head, vocabulary, text_encoder):
    torch.manual_seed(0)
    config = EncoderConfig(width=32, heads=2, tokens=4, max_events=64, dropout=0.0, head=head)
    return UserEncoder(config, vocabulary, text_encoder).eval()


@pytest.mark.parametrize("head", HEADS)
def test_cached_states_give_what_a_whole_pass_gives(head, vocabulary, text_encoder, shop_histories):
    encoder = make(head, vocabulary, text_encoder)
    questions = ["What does this user buy most?", "tea", "What next?"]
    with torch.no_grad():
        whole = encoder(encoder.batch(shop_histories), questions, torch.arange(3))[0]
    cached = encoder.tokens(encoder.read(shop_histories), questions)
    assert whole.shape == (3, 4, 32)
    assert all(torch.allclose(w, c.tokens, atol=1e-5) for w, c in zip(whole, cached))
    grown = encoder.extend(
        encoder.read([shop_histories[0].of(shop_histories[0].events[:-3])])[0], list(shop_histories[0].events[-3:])
    )
    assert torch.allclose(encoder.tokens([grown], questions[:1])[0].tokens, whole[0], atol=1e-4)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_mean_does_not_hear_the_question_but_the_resampler_does(head, vocabulary, text_encoder, shop_histories):
    def difference(encoder):
        states = encoder.read(shop_histories[:1]) * 2
        one, other = encoder.tokens(states, ["tea", "What does this user buy most?"])
        return (one.tokens - other.tokens).abs().max()

    assert difference(make(head, vocabulary, text_encoder)) == 0
    assert difference(make("resampler", vocabulary, text_encoder)) > 1e-3


def test_the_mean_is_over_real_states_alone():
    head = MeanHead(width=8, tokens=3)
    states, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    latents, seen = head.ask(torch.zeros(2, 1, 4), torch.ones(2, 1).bool(), torch.zeros(2, 8))
    got = head.read(latents, seen, head.memory(states, mask), mask, None)
    want = torch.stack([head.out(states[0, :3].mean(0)), head.out(states[1].mean(0))]).view(2, 3, 8)
    assert torch.allclose(got, want, atol=1e-6)


def test_an_unknown_head(vocabulary, text_encoder):
    with pytest.raises(RecipeError, match=r"encoder\.head is 'crown'; there are"):
        make("crown", vocabulary, text_encoder)
