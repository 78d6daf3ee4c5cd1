"""`UserEncoder`: a state does not depend on who shares the batch or on how the events arrived."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona.encoders import EncoderConfig, UserEncoder, UserTokens
from persona.encoders.backbones import BACKBONES
from persona.errors import EventError, RecipeError
from persona.history import Event, History

ASK = "What does this user buy most?"


def close(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def many(count, start=0):
    return History("m", tuple(Event("search", 60.0 * i, text=f"query {i % 7}") for i in range(start, start + count)))


def test_a_history_alone_equals_the_same_in_a_padded_batch(encoder, shop_histories, strange_history):
    histories = [*shop_histories, strange_history, History("nobody")]
    together = encoder.read(histories)
    assert len({len(s.states) for s in together}) >= 4
    for state, history in zip(together, histories):
        alone = encoder.read([history])[0]
        assert close(state.states, alone.states)
        assert all(close(a, b) for a, b in zip(state.cache, alone.cache))
        assert (state.events, state.last_timestamp) == (len(history.timed), alone.last_timestamp)
    batched = encoder.tokens(together, [ASK] * len(histories))
    for tokens, state in zip(batched, together):
        assert close(tokens.tokens, encoder.tokens([state], [ASK])[0].tokens)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 3))
def test_any_mixture_of_lengths_in_any_batch_size(encoder, lengths, batch_size):
    histories = [many(length) for length in lengths]
    for state, history in zip(encoder.read(histories, batch_size=batch_size), histories):
        assert close(state.states, encoder.read([history])[0].states)


def test_the_training_pass_equals_encode_then_tokens(encoder, shop_histories):
    states, mask = encoder.states(encoder.batch(shop_histories))
    owner = torch.tensor([2, 0])
    with torch.inference_mode():
        made = encoder.resample(states[owner], mask[owner], [ASK, "Which app?"])
        again = encoder(encoder.batch(shop_histories), [ASK, "Which app?"], owner)[0]
    cached = encoder.read(shop_histories)
    served = encoder.tokens([cached[2], cached[0]], [ASK, "Which app?"])
    assert close(made, torch.stack([t.tokens for t in served])) and close(made, again)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_extend_equals_encoding_again(encoder, strange_history, kept):
    timed = strange_history.timed
    first = strange_history.of([e for e in strange_history.events if e.timestamp is None] + list(timed[:kept]))
    whole = encoder.read([strange_history])[0]
    at_once = encoder.extend(encoder.read([first])[0], timed[kept:])
    one_by_one = encoder.read([first])[0]
    for event in timed[kept:]:
        one_by_one = encoder.extend(one_by_one, [event])
    for state in (at_once, one_by_one):
        assert close(state.states, whole.states)
        assert all(close(a, b) for a, b in zip(state.cache, whole.cache))
        assert (state.events, state.last_timestamp) == (6, whole.last_timestamp)
        assert close(encoder.tokens([state], [ASK])[0].tokens, encoder.tokens([whole], [ASK])[0].tokens)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_extend_equals_encoding_again_with_every_backbone(backbone, vocabulary, text_encoder, strange_history):
    torch.manual_seed(1)
    config = EncoderConfig(backbone=backbone, width=32, heads=2, layers=2, tokens=4, max_events=64, dropout=0.0)
    encoder = UserEncoder(config, vocabulary, text_encoder).eval()
    plain = many(9, start=28_000_000)
    half = strange_history.of([*strange_history.events[:1], *strange_history.timed[:2]])
    begun = encoder.read([History("nobody"), many(4, start=28_000_000), half])
    rest = [plain.events, plain.events[4:], strange_history.timed[2:]]
    for state, events, history in zip(begun, rest, (plain, plain, strange_history)):
        whole = encoder.read([history])[0]
        assert close(encoder.extend(state, events).states, whole.states)
        for event in events:
            state = encoder.extend(state, [event])
        assert close(state.states, whole.states)
        assert all(close(a, b) for a, b in zip(state.cache, whole.cache))


def test_extend_reads_only_the_new_events(encoder, shop_histories):
    history = shop_histories[0]
    state = encoder.read([history])[0]
    seen = []
    hook = encoder.events.register_forward_pre_hook(lambda _, args: seen.append(args[0].mask.sum().item()))
    encoder.extend(state, [Event("search", state.last_timestamp + 1, text="tea")])
    hook.remove()
    assert seen == [1]


def test_extend_sorts_and_takes_equal_times(encoder):
    a, b, c = (Event("search", t, text=x) for t, x in ((5, "a"), (5, "b"), (9, "c")))
    state = encoder.extend(encoder.read([History("u", (a,))])[0], [c, b])
    assert close(state.states, encoder.read([History("u", (a, b, c))])[0].states)


def test_extend_refuses_what_only_encoding_again_can_do(encoder):
    state = encoder.read([many(10)])[0]
    for event in (Event("search", 1.0, text="old"), Event("profile", attributes={"tier": "gold"})):
        with pytest.raises(EventError, match="cannot extend"):
            encoder.extend(state, [event])
    with pytest.raises(EventError, match="at most 64 events"):
        encoder.extend(state, many(55, start=10).events)
    assert encoder.extend(state, many(54, start=10).events).events == 64
    assert encoder.extend(state, []) is state


def test_the_newest_events_of_a_long_history_are_read_and_the_result_says_so(encoder):
    long, short, full = encoder.read([many(10_000), many(64, start=9_936), many(64)])
    assert (long.truncated, short.truncated, full.truncated) == (True, False, False)
    assert (long.events, long.last_timestamp, len(long.states)) == (64, 60.0 * 9_999, 65)
    assert close(long.states, short.states)
    tokens = encoder.tokens([long, short], [ASK] * 2)
    assert (tokens[0].truncated, tokens[1].truncated) == (True, False)
    assert close(tokens[0].tokens, tokens[1].tokens)


def test_a_profile_does_not_count_as_an_event(encoder):
    profile = Event("profile", attributes={"tier": "gold", "age": 30.0})
    state = encoder.read([many(64).of([profile, *many(64).events])])[0]
    assert (state.events, state.truncated, len(state.states)) == (64, False, 1 + 2 + 64)


def test_order_of_events_matters(encoder):
    one, two = Event("search", 1.0, text="tea"), Event("search", 2.0, text="carburettor")
    swapped = [Event("search", 1.0, text="carburettor"), Event("search", 2.0, text="tea")]
    a, b = encoder.read([History("u", (one, two)), History("u", tuple(swapped))])
    a, b = encoder.tokens([a, b], [ASK] * 2)
    assert (a.tokens - b.tokens).abs().max() > 1e-3


def test_no_events_and_one_event(encoder):
    states = encoder.read([History("u"), many(1)])
    assert len(states[0].states) == 1 and len(states[1].states) == 2
    empty, one = encoder.tokens(states, [ASK, ASK])
    assert torch.isfinite(empty.tokens).all() and empty.tokens.shape == one.tokens.shape == (4, 32)
    assert (empty.tokens - one.tokens).abs().max() > 1e-3
    assert encoder.read([]) == [] and encoder.tokens([], []) == []


def test_everything_strange_gives_finite_tokens(encoder, strange_history):
    tokens = encoder.tokens(encoder.read([strange_history]), ["שלום 👋"])[0]
    assert torch.isfinite(tokens.tokens).all()


@pytest.mark.parametrize("place", [0.5, 1.5, 2.5])
def test_an_unknown_source_changes_nothing(encoder, place):
    known = [Event("search", 1.0, text="tea"), Event("search", 2.0, text="cake")]
    other = Event("horoscope", place * 1.0, text="luck", item_id="x", value=3.0)
    plain = encoder.read([History("u", tuple(known))])[0]
    mixed = encoder.read([History("u", (*known, other))])[0]
    assert close(plain.states, mixed.states)
    step_by_step = encoder.read([History("u")])[0]
    for event in sorted([*known, other], key=lambda e: e.timestamp):
        step_by_step = encoder.extend(step_by_step, [event])
    assert close(plain.states, step_by_step.states)
    assert step_by_step.events == mixed.events == 3
    after = Event("search", 9.0, text="jam")
    assert close(encoder.extend(plain, [after]).states, encoder.extend(mixed, [after]).states)


def test_instructions_decide_the_tokens(encoder, shop_histories):
    state = encoder.read(shop_histories[:1])[0]
    a, b, again = encoder.tokens([state] * 3, [ASK, "Will this user buy a chess robot next?", ASK])
    assert torch.equal(a.tokens, again.tokens)
    assert (a.tokens - b.tokens).abs().max() > 1e-3


def test_users_decide_the_tokens(encoder, shop_histories):
    a, b, _ = encoder.tokens(encoder.read(shop_histories), [ASK] * 3)
    assert (a.tokens - b.tokens).abs().max() > 1e-3


def test_an_instruction_encoded_before_asks_the_same(encoder, shop_histories):
    states, texts = encoder.read(shop_histories[:3]), [ASK, "Which app does this user open most of all apps?", ""]
    asked = encoder.instruct(texts)
    assert len({len(a.latents) for a in asked}) == 3
    for mixed in (asked, [asked[0], texts[1], asked[2]]):
        for own, expected in zip(encoder.tokens(states, mixed), encoder.tokens(states, texts)):
            assert close(own.tokens, expected.tokens)
    alone = [encoder.tokens([state], encoder.instruct([text]))[0] for state, text in zip(states, texts)]
    assert all(close(a.tokens, b.tokens) for a, b in zip(alone, encoder.tokens(states, texts)))


def test_every_prefix_of_the_tokens_is_what_count_gives(encoder, shop_histories):
    state = encoder.read(shop_histories[:1])
    whole = encoder.tokens(state, [ASK])[0].tokens
    for count in range(1, 5):
        assert torch.equal(encoder.tokens(state, [ASK], count)[0].tokens, whole[:count])
    for count in (0, -1, 5):
        with pytest.raises(EventError, match=f"1 to 4 tokens, not {count}"):
            encoder.tokens(state, [ASK], count)


def test_the_vector_has_length_one(encoder, shop_histories):
    tokens = encoder.tokens(encoder.read(shop_histories), [ASK] * 3)
    for t in tokens:
        assert t.vector.shape == (32,) and abs(t.vector.norm().item() - 1) < 1e-5
        assert torch.allclose(t.vector * t.tokens.mean(0).norm(), t.tokens.mean(0), atol=1e-5)
    assert UserTokens(torch.ones(2, 4)).vector.tolist() == [0.5] * 4


def test_the_text_encoder_is_no_part_of_the_weights(encoder):
    assert not any("text_encoder" in name for name in encoder.state_dict())


def test_unknown_backbone(vocabulary, text_encoder):
    with pytest.raises(RecipeError, match=r"encoder\.backbone is 'abacus'"):
        UserEncoder(EncoderConfig(backbone="abacus"), vocabulary, text_encoder)
