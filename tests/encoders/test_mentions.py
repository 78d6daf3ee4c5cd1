"""Items that an instruction names are found by their whole text."""

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


def test_an_item_that_is_named_brings_its_id(vocabulary, text_encoder):
    def tokens(text, mentions):
        torch.manual_seed(0)
        config = EncoderConfig(width=32, heads=2, tokens=2, max_events=64, dropout=0.0, mentions=mentions)
        encoder = UserEncoder(config, vocabulary, text_encoder).eval()
        index = encoder.mentions.find(text)
        with torch.no_grad():
            encoder.events.item.weight[index] += 1.0
        words = encoder._words([text, "something else entirely"])[2]
        return words, index

    name = next(text for text in vocabulary.item_texts if len(text.split()) > 1)
    known, index = tokens(f"Will this user buy {name} next?", True)
    unknown, _ = tokens(f"Will this user buy {name} next?", False)
    assert index and (known[0] - unknown[0]).abs().max() > 0.5 and torch.equal(known[1], unknown[1])
