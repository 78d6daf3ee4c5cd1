"""States as bytes: the same after the trip, for every kind of encoder, and nothing else is taken for one."""

import dataclasses

import pytest
import torch
from safetensors.torch import save

from persona.encoders.state_bytes import events_digest, state_from_bytes, state_to_bytes
from persona.errors import CheckpointError
from persona.history import Event, History


def test_a_state_comes_back_whole_and_is_continued(any_encoder, shop_histories):
    history = shop_histories[1]
    old, new = history.events[:-2], history.events[-2:]
    state = any_encoder.read([History("u", old)])[0]
    read = state_from_bytes(state_to_bytes(state, old))
    assert (read.count, read.digest) == (len(old), events_digest(old))
    for field in dataclasses.fields(state):
        before, after = getattr(state, field.name), getattr(read.state, field.name)
        for a, b in zip(before, after, strict=True) if isinstance(before, list) else [(before, after)]:
            assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
    asked = ["What does this user buy most?"]
    for one, other in ((state, read.state), (any_encoder.extend(state, new), any_encoder.extend(read.state, new))):
        (a,), (b,) = (any_encoder.tokens([each], asked) for each in (one, other))
        assert torch.equal(a.tokens, b.tokens)


def test_an_empty_history_and_half_precision(encoder):
    state = encoder.read([History("nobody")])[0]
    assert state_from_bytes(state_to_bytes(state, ())).state.last_timestamp is None
    half = dataclasses.replace(state, states=state.states.bfloat16())
    assert state_from_bytes(state_to_bytes(half, ())).state.states.dtype == torch.bfloat16


def test_a_digest_tells_events_apart():
    one, other = Event("s", 1.0, text="a", attributes={"a": 1.0, "b": 2.0}), Event("s", 1.0, text="b")
    assert events_digest([one]) == events_digest([Event("s", 1.0, text="a", attributes={"b": 2.0, "a": 1.0})])
    assert len({events_digest(events) for events in ([], [one], [other], [one, other], [other, one])}) == 5


@pytest.mark.parametrize(
    "value",
    [b"", b"no state at all", save({"x": torch.zeros(2)}), save({"x": torch.zeros(2)}, {"state": "[1, 2]"})],
)
def test_other_bytes_are_refused(value):
    with pytest.raises(CheckpointError, match=f"these {len(value)} bytes are no user's state"):
        state_from_bytes(value)


def test_a_state_that_was_cut_off_is_refused(encoder, shop_histories):
    value = state_to_bytes(encoder.read(shop_histories[:1])[0], shop_histories[0].events)
    with pytest.raises(CheckpointError, match="no user's state"):
        state_from_bytes(value[:-1])
