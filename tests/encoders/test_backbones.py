"""The causal transformer: the past never sees the future, and a cache continues it exactly."""

import pytest
import torch

from persona.encoders.backbones import BACKBONES, build_backbone
from persona.errors import RecipeError


@pytest.fixture(params=sorted(BACKBONES))
def backbone(request):
    torch.manual_seed(0)
    return build_backbone(request.param, width=32, heads=2, layers=2, dropout=0.1).eval()


def test_future_rows_do_not_change_old_states(backbone):
    x = torch.randn(1, 9, 32)
    before = backbone(x)[0]
    x[:, 5:] = torch.randn(1, 4, 32)
    after = backbone(x)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().min(dim=-1).values.max() > 1e-4


def test_past_rows_and_their_order_change_the_state(backbone):
    x = torch.randn(1, 6, 32)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    assert (backbone(x)[0][:, -1] - backbone(swapped)[0][:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 3, 4, 5, 6, 7), (6, 7)])
def test_a_cache_continues_exactly(backbone, cuts):
    x = torch.randn(2, 8, 32)
    whole = backbone(x)[0]
    states, cache = [], None
    for part in x.tensor_split(cuts, dim=1):
        new, cache = backbone(part, cache=cache)
        states.append(new)
    assert torch.allclose(torch.cat(states, dim=1), whole, atol=1e-5)


def test_padding_is_zero_and_changes_nothing(backbone):
    x, mask = torch.randn(1, 6, 32), torch.arange(6)[None] < 4
    states = backbone(x, mask)[0]
    assert torch.allclose(states[:, :4], backbone(x[:, :4])[0], atol=1e-5)
    assert not states[:, 4:].any()


def test_unknown_name():
    with pytest.raises(RecipeError, match=r"encoder\.backbone is 'lstm'; there are .*transformer"):
        build_backbone("lstm", 32, 2, 2, 0.1)
