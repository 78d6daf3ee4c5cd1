"""User tokens as the rows of a request: repeated, filled up, refused."""

import pytest
import torch

from persona.errors import PersonaError
from persona.serving.vllm_memory import MemoryLayout, memory_rows

SHAPE = {"tokens": 4, "slots": 32, "width": 6}


def test_tokens_come_first_then_filler_that_is_not_zero():
    user = torch.randn(4, 6)
    rows = memory_rows(user, **SHAPE)
    assert rows.shape == (32, 6) and rows.dtype == torch.float32
    assert torch.equal(rows[:4], user)
    assert torch.equal(rows[4:], torch.ones(28, 6))


def test_fewer_tokens_are_repeated_equally_often():
    user = torch.randn(2, 6)
    assert torch.equal(memory_rows(user, **SHAPE)[:4], user[[0, 0, 1, 1]])
    one = torch.randn(1, 6)
    assert torch.equal(memory_rows(one, **SHAPE)[:4], one.expand(4, 6))


def test_nobody_is_zero_rows_only_where_they_are_read():
    rows = memory_rows(None, **SHAPE)
    assert not rows[:4].any()
    assert rows[4:].all()


def test_own_memory_and_type():
    user = torch.randn(32, 6, requires_grad=True)
    rows = memory_rows(user, tokens=32, slots=32, width=6, dtype=torch.bfloat16)
    assert rows.dtype == torch.bfloat16 and not rows.requires_grad
    assert rows.data_ptr() != user.data_ptr()
    assert rows.untyped_storage().nbytes() == 32 * 6 * 2  # torch.save would write all of it


@pytest.mark.parametrize(
    "user, said",
    [
        (torch.randn(4, 5), "need"),
        (torch.randn(4), "need"),
        (torch.randn(2, 4, 6), "need"),
        (torch.randn(3, 6), "divides 4"),
        (torch.randn(8, 6), "divides 4"),
        (torch.randn(0, 6), "divides 4"),
        (torch.full((4, 6), torch.nan), "NaN"),
        (torch.full((4, 6), torch.inf), "NaN"),
    ],
)
def test_refused(user, said):
    with pytest.raises(PersonaError, match=said):
        memory_rows(user, **SHAPE)


def test_refuses_what_is_infinite_in_the_llms_type():
    user = torch.full((4, 6), 1e6)
    assert memory_rows(user, **SHAPE)[:4].eq(1e6).all()
    with pytest.raises(PersonaError, match="infinity"):
        memory_rows(user, **SHAPE, dtype=torch.float16)


@pytest.mark.parametrize("tokens, slots", [(1, 32), (32, 32), (33, 64), (64, 64)])
def test_as_few_slots_as_hold_the_tokens(tokens, slots):
    layout = MemoryLayout.for_tokens(tokens, every=2)
    assert layout.slots == slots
    assert MemoryLayout.for_tokens(tokens, every=2, slots=96).slots == 96


def test_layers_that_read():
    assert [i for i in range(7) if MemoryLayout(4, 32, every=3).reads(i)] == [0, 3, 6]


@pytest.mark.parametrize("numbers", [(33, 32, 1), (0, 32, 1), (4, 0, 1), (4, 32, 0), (True, 32, 1), (4, 32, 2.0)])
def test_layouts_that_cannot_be(numbers):
    with pytest.raises(PersonaError):
        MemoryLayout(*numbers)


@pytest.mark.parametrize(
    "entry", [None, {}, {"tokens": 4, "slots": 32}, {"tokens": 4, "slots": 32, "every": 1, "x": 1}]
)
def test_a_config_that_is_not_ours(entry):
    class Config:
        persona_memory = entry

    with pytest.raises(PersonaError, match="export the checkpoint again"):
        MemoryLayout.from_config(Config())


def test_to_config_and_back():
    layout = MemoryLayout(4, 32, 2)
    config = type("Config", (), layout.to_config())
    assert MemoryLayout.from_config(config) == layout
