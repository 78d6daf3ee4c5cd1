"""Attention of the user tokens, read off, against what the modules do with it."""

import pytest
import torch

from persona.encoders import EncoderConfig, make_encoder
from persona.encoders.attention_weights import state_attention
from persona.encoders.resampler import Attention
from persona.errors import EventError
from persona.history import History

QUESTION = "What does this user buy most?"


@pytest.mark.parametrize("masked", [True, False])
def test_the_weights_are_those_that_make_the_output(masked):
    torch.manual_seed(0)
    attention, x, y = Attention(16, 2), torch.randn(3, 4, 16), torch.randn(3, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1]]).bool() if masked else None
    keys_values = attention.keys_values(y)
    weights = attention.weights(x, keys_values, mask)
    assert weights.shape == (3, 2, 4, 5) and torch.allclose(weights.sum(-1), torch.ones(3, 2, 4))
    assert mask is None or not weights.transpose(1, 3)[~mask].any()
    made = attention.out((weights @ keys_values[1]).transpose(1, 2).reshape(3, 4, 16))
    assert torch.allclose(made, attention(x, keys_values, mask), atol=1e-6)


def test_attention_is_a_share_and_does_not_depend_on_the_batch(any_encoder, shop_histories, strange_history):
    states = any_encoder.read([*shop_histories, strange_history, History("nobody")])
    questions = [QUESTION, "tea", "Will this user buy an oak violin music next?", "", "What?"]
    together = state_attention(any_encoder, states, questions)
    for state, question, share in zip(states, questions, together):
        assert share.shape == (len(state.states),) and (share >= 0).all() and share.sum() <= 1 + 1e-5
        assert torch.allclose(share, state_attention(any_encoder, [state], [question])[0], atol=1e-5)
    assert state_attention(any_encoder, [], []) == []
    with pytest.raises(EventError, match="1 to 4 tokens, not 5"):
        state_attention(any_encoder, states, questions, 5)


def test_making_tokens_is_not_changed_by_reading_off_attention(any_encoder, shop_histories):
    states = any_encoder.read(shop_histories)
    before = any_encoder.tokens(states, [QUESTION] * 3)
    state_attention(any_encoder, states, [QUESTION] * 3)
    after = any_encoder.tokens(states, [QUESTION] * 3)
    assert all(torch.equal(b.tokens, a.tokens) for b, a in zip(before, after))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in any_encoder.head.modules())


@torch.inference_mode()
def test_the_resampler_as_a_whole_can_be_recomputed_from_its_weights(encoder, shop_histories):
    """Attention by weights in place of the fused kernel gives the same tokens, and the shares are these weights'."""
    states = encoder.read(shop_histories)
    expected, used = encoder.tokens(states, [QUESTION] * 3), []

    def by_weights(attention, args, output):
        weights = attention.weights(*args)
        used.append(weights)
        summed = (weights @ args[1][1]).transpose(1, 2)
        return attention.out(summed.reshape(output.shape))

    for layer in encoder.head.layers:
        layer.cross_attention.register_forward_hook(by_weights)
    made = encoder.tokens(states, [QUESTION] * 3)
    assert all(torch.allclose(m.tokens, e.tokens, atol=1e-5) for m, e in zip(made, expected))
    for count in (1, 4):
        share = sum(layer[0, head, :count].mean(0) for layer in used for head in range(2)) / (2 * len(used))
        got = state_attention(encoder, states[:1], [QUESTION], count)[0]
        assert torch.allclose(got, share[: len(got)], atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 4])
def test_the_lms_attention_is_that_of_one_pass_over_all_it_reads(llm_encoder, shop_histories, count):
    """Without cache, padding and masks of ours: start, events, instruction and user positions in one row."""
    encoder, llm, history = llm_encoder, llm_encoder.backbone.llm, shop_histories[1]
    state = encoder.read([shop_histories[0], history])[1]
    batch = encoder.batch([history])
    words = llm.get_input_embeddings()(torch.tensor(encoder.backbone.tokenizer(QUESTION)["input_ids"]))
    _, after = encoder.backbone.frame  # what the chat template has behind a question
    vectors = [encoder.start[None], encoder.events(batch)[0] * encoder.scale, words, after, encoder.head.positions]
    llm.set_attn_implementation("eager")
    out = llm(inputs_embeds=torch.cat(vectors)[None], output_attentions=True)
    llm.set_attn_implementation("sdpa")
    assert torch.allclose(out.last_hidden_state[0, -4:], encoder.tokens([state], [QUESTION])[0].tokens, atol=1e-4)
    rows = torch.stack(out.attentions)[:, 0, :, -4 : -4 + count or None]  # [layers, heads, count, all]
    expected = rows.mean((0, 1, 2))[: len(state.states)]
    assert torch.allclose(state_attention(encoder, [state], [QUESTION], count)[0], expected, atol=1e-5)
    assert llm.config._attn_implementation == "sdpa" and not llm._forward_hooks and not llm._forward_pre_hooks


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_an_lm_with_sliding_windows_gives_its_weights(
    family_llm, vocabulary, text_encoder, tokenizer, shop_histories, tmp_path
):
    family_llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = EncoderConfig(backbone="llm", llm=str(tmp_path), width=64, heads=2, tokens=4, max_events=64, lora_rank=0)
    encoder = make_encoder(config, vocabulary, text_encoder).eval()
    states = encoder.read(shop_histories)
    for state, weights in zip(states, state_attention(encoder, states, [QUESTION] * 3)):
        assert weights.shape == (len(state.states),) and (weights >= 0).all() and 0 < weights.sum() <= 1
