import numpy as np
import pytest
import torch

from persona.encoders.chunks import answers_in_chunks, encode_in_chunks
from persona.encoders.embedding import pooled
from persona.errors import EventError
from persona.history import History

ASK = "What does this user buy most?"


def test_encode_is_the_normalised_mean_of_the_tokens(encoder, shop_histories):
    found = encoder.encode([*shop_histories, History("nobody")], ASK, batch_size=2)
    assert found.shape == (4, 32) and found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    tokens = encoder.tokens(encoder.read(shop_histories[:1]), [ASK])[0]
    assert np.allclose(found[0], tokens.vector.numpy(), atol=1e-5)


def test_a_stored_prefix_is_the_smaller_embedding(encoder, shop_histories):
    states = encoder.read(shop_histories)
    stored = torch.stack([t.tokens for t in encoder.tokens(states, [ASK] * 3)])
    for tokens, dim in ((1, 8), (2, 32), (4, 16)):
        asked = encoder.encode(shop_histories, ASK, tokens=tokens, dim=dim, convert_to_tensor=True)
        assert asked.shape == (3, dim) and torch.allclose(asked, pooled(stored, tokens, dim), atol=1e-5)


def test_one_instruction_for_each_user(encoder, shop_histories):
    each = encoder.encode(shop_histories, [ASK, "", "Which app?"])
    assert np.allclose(each[1], encoder.encode(shop_histories)[1], atol=1e-5)
    assert np.allclose(each[0], encoder.encode(shop_histories, ASK)[0], atol=1e-5)
    assert not np.allclose(each[2], encoder.encode(shop_histories, ASK)[2], atol=1e-3)


def test_one_user_or_one_answer_gives_one_vector(encoder, shop_histories):
    (first, *_), (word,) = encoder.encode(shop_histories, ASK, dim=8), encoder.encode_answers(["garden"])
    for alone in (encoder.encode(shop_histories[0], ASK, dim=8), encoder.encode(shop_histories[0], [ASK], dim=8)):
        assert alone.shape == (8,) and np.allclose(alone, first, atol=1e-5)
    assert encoder.encode(shop_histories[0], convert_to_tensor=True).shape == (32,)
    assert np.allclose(encoder.encode_answers("garden"), word, atol=1e-6)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"histories": ["a"]}, r"histories\[0\] must be a History, not str"),
        ({"histories": "a"}, "histories must be a History or a list of them, not str"),
        ({"histories": None}, "histories must be a History or a list of them, not NoneType"),
        ({"instruction": None}, "instruction must be a string or a list of them, not NoneType"),
        ({"instruction": [ASK, None, ASK]}, r"instruction\[1\] must be a string, not NoneType"),
        ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
        ({"batch_size": "8"}, r"batch_size must be a whole number, not '8' \(str\)"),
        ({"dim": 8.0}, r"dim must be a whole number, not 8.0 \(float\)"),
        ({"tokens": True}, "the number of tokens must be a whole number, not True"),
    ],
)
def test_what_cannot_be_encoded_is_refused(encoder, shop_histories, given, message):
    with pytest.raises(EventError, match=message):
        encoder.encode(**{"histories": shop_histories, **given})
    if given.keys() & {"dim", "batch_size"}:
        with pytest.raises(EventError, match=message):
            encoder.encode_answers(["x"], **given)


def test_texts_of_answers_are_strings(encoder):
    for texts, message in ((None, "texts must be a string or a list"), (["a", 7], r"texts\[1\] must be a string")):
        with pytest.raises(EventError, match=message):
            encoder.encode_answers(texts)


def test_nobody_to_encode(encoder):
    assert encoder.encode([], ASK).shape == (0, 32) and encoder.encode_answers([], dim=4).shape == (0, 4)


def test_answers_are_normalised(encoder):
    found = encoder.encode_answers(["garden", "music"], dim=16)
    assert found.shape == (2, 16) and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_bad_sizes_are_refused(encoder, shop_histories):
    with pytest.raises(EventError, match="3 histories, but 2 instructions"):
        encoder.encode(shop_histories, ["a", "b"])
    for dim in (0, 33):
        with pytest.raises(EventError, match=f"1 to 32 dimensions, not {dim}"):
            encoder.encode(shop_histories, dim=dim)
        with pytest.raises(EventError, match="dimensions"):
            encoder.encode_answers(["x"], dim=dim)
    with pytest.raises(EventError, match="1 to 4 tokens, not 5"):
        encoder.encode(shop_histories, tokens=5)


def test_chunks_give_the_same_gradients_dropout_or_not(encoder, shop_histories):
    batch, owner = encoder.batch(shop_histories), torch.tensor([2, 0, 1, 0])
    asked, answers = [ASK, "Which app?", "", ASK], ["garden", "mail", "music"]

    def gradients(make):
        encoder.zero_grad()
        tokens, states, made = make()
        (tokens.square().sum() + states.sin().sum() + made.square().sum()).backward()
        return tokens, [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    whole, expected = gradients(lambda: (*encoder(batch, asked, owner), encoder.answer_vectors(answers)))
    for size in (1, 2, 5):
        tokens, found = gradients(
            lambda size=size: (
                *encode_in_chunks(encoder, batch, asked, owner, size),
                answers_in_chunks(encoder, answers, size),
            )
        )
        assert torch.allclose(tokens, whole, atol=1e-5) and len(found) == len(expected)
        assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(found, expected))
