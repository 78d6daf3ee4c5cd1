"""Items that an instruction names are found by their whole text."""

import pytest
import torch

from persona.encoders import EncoderConfig, UserEncoder
from persona.encoders.mentions import Mentions

ITEMS = ["Toy Story 1995", "Princess Bride, The 1987", "Toy", "", "Story 1995 Animation", "Toy Story 1995"]


def test_whole_names_in_order_the_longest_first():
    mentions = Mentions(ITEMS)
    assert mentions.find("Will this user watch Toy Story 1995 next?") == [1]
    assert mentions.find("Princess Bride, The 1987? Or a (Toy)?") == [2, 3]
    assert mentions.find("Toy Story 1995 Animation") == [1]
    assert mentions.find("Princess Bride 1987") == [] and mentions.find("") == []
    assert Mentions([]).find("Toy") == []


@pytest.mark.parametrize("targets", ["id", "text"])
def test_what_an_instruction_is_about_is_the_item_that_it_names(targets, vocabulary, text_encoder):
    def make(mentions):
        torch.manual_seed(0)
        config = EncoderConfig(width=32, heads=2, tokens=2, item_targets=targets, dropout=0.0, mentions=mentions)
        return UserEncoder(config, vocabulary, text_encoder).eval()

    name = next(text for text in vocabulary.item_texts if len(text.split()) > 1)
    asked, encoder = [f"Will this user buy {name} next?", "something else entirely"], make(True)
    index = torch.tensor(encoder.mentions.find(asked[0])) - 1
    with torch.no_grad():
        plain, named = make(False)._words(asked)[2], encoder._words(asked)[2]
        item = encoder.events.catalogue(text_encoder.vectors([name]), index)[0]
    assert len(index) == 1 and torch.allclose(named[0], item, atol=1e-6) and torch.equal(named[1], plain[1])
    assert (named[0] - plain[0]).abs().max() > 1e-2


def test_the_resampler_sees_how_a_named_item_meets_the_newest_state(vocabulary, text_encoder, shop_histories):
    torch.manual_seed(0)
    config = EncoderConfig(width=32, heads=2, tokens=2, item_targets="id", dropout=0.0, mentions=True)
    encoder = UserEncoder(config, vocabulary, text_encoder).eval()
    name = next(text for text in vocabulary.item_texts if len(text.split()) > 1)
    states = encoder.read(shop_histories[:1])

    def token(text):
        return encoder.tokens(states, [text])[0].tokens

    before = token(name), token("whatever")
    with torch.no_grad():
        encoder.head.match.weight[0, -1] += 5.0  # of the item's next-item score
    assert (token(name) - before[0]).abs().max() > 1e-2
