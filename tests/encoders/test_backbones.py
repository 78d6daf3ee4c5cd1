"""All backbones: the past never sees the future, padding is nothing, and a cache continues exactly."""

import pytest
import torch
from torch.nn import functional as F

from persona.encoders.backbones import BACKBONES, build_backbone
from persona.encoders.backbones.hstu import BUCKETS, CHUNK, time_buckets
from persona.encoders.backbones.mamba4rec import chunked_scan
from persona.encoders.backbones.matching import matched_inner, parameter_count
from persona.errors import RecipeError

DAY = 86_400.0


def build(name, positions=512):
    torch.manual_seed(0)
    return build_backbone(name, width=32, heads=2, layers=2, dropout=0.1, positions=positions).eval()


def seconds(batch, length):
    """Times as real ones: seconds since 1970, of which float32 could not tell two in a minute apart."""
    return 1.7e9 + (torch.rand(batch, length, dtype=torch.float64) * DAY).cumsum(1)


@pytest.fixture(params=sorted(BACKBONES))
def name(request):
    return request.param


@pytest.fixture
def backbone(name):
    return build(name)


def test_future_rows_do_not_change_old_states(backbone):
    x = torch.randn(1, 9, 32)
    before = backbone(x)[0]
    x[:, 5:] = torch.randn(1, 4, 32)
    after = backbone(x)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().min(dim=-1).values.max() > 1e-4


def test_past_rows_and_their_order_change_the_state(name, backbone):
    x = torch.randn(1, 6, 32)
    other, swapped = x.clone(), x[:, [1, 0, 2, 3, 4, 5]]
    other[:, 1] = torch.randn(32)
    last = backbone(x)[0][:, -1]
    assert (last - backbone(other)[0][:, -1]).abs().max() > 1e-4
    difference = (last - backbone(swapped)[0][:, -1]).abs().max()
    assert difference < 1e-5 if name == "set" else difference > 1e-4


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 3, 4, 5, 6, 7), (6, 7)])
def test_a_cache_continues_exactly(backbone, cuts):
    x, times = torch.randn(2, 8, 32), seconds(2, 8)
    whole, expected = backbone(x, times=times)
    states, cache = [], None
    for part, when in zip(x.tensor_split(cuts, dim=1), times.tensor_split(cuts, dim=1)):
        new, cache = backbone(part, cache=cache, times=when)
        states.append(new)
    assert torch.allclose(torch.cat(states, dim=1), whole, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(cache, expected, strict=True))


def test_a_cache_continues_beyond_the_positions(name):
    backbone, x, times = build(name, positions=3), torch.randn(1, 8, 32), seconds(1, 8)
    whole = backbone(x, times=times)[0]
    cache = backbone(x[:, :5], times=times[:, :5])[1]
    assert torch.allclose(backbone(x[:, 5:], cache=cache, times=times[:, 5:])[0], whole[:, 5:], atol=1e-5)


def test_a_row_kept_from_a_padded_batch_continues_exactly(backbone):
    sizes, x, times = (1, 3, 8, 5), torch.randn(4, 8, 32), seconds(4, 8)
    mask = torch.arange(8) < torch.tensor(sizes)[:, None]
    new, later = torch.randn(1, 3, 32), times[:, -1:] + torch.tensor([[5.0, 600.0, DAY]])
    cache = backbone(x, mask, times=times)[1]
    for row, size in enumerate(sizes):
        kept = backbone.keep(cache, row, 8 - size)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in kept)
        states = backbone(new, cache=kept, times=later[row : row + 1])[0]
        both = torch.cat([x[row : row + 1, :size], new], dim=1)
        whole = backbone(both, times=torch.cat([times[row, :size], later[row]])[None])[0]
        assert torch.allclose(states, whole[:, size:], atol=1e-5)


def test_a_padded_batch_continues_a_cache(backbone):
    x, times = torch.randn(2, 7, 32), seconds(2, 7)
    mask = torch.arange(3) < torch.tensor([[3], [1]])
    cache = backbone(x[:, :4], times=times[:, :4])[1]
    cache = backbone(x[:, 4:], mask, cache, times[:, 4:])[1]
    last, when = torch.randn(1, 1, 32), times[1:, -1:] + DAY
    state = backbone(last, cache=backbone.keep(cache, 1, 2), times=when)[0]
    whole = backbone(torch.cat([x[1:, :5], last], dim=1), times=torch.cat([times[1:, :5], when], dim=1))[0]
    assert torch.allclose(state, whole[:, -1:], atol=1e-5)


def test_padding_is_zero_and_changes_nothing(backbone):
    x, mask = torch.randn(1, 6, 32), torch.arange(6)[None] < 4
    states = backbone(x, mask)[0]
    assert torch.allclose(states[:, :4], backbone(x[:, :4])[0], atol=1e-5)
    assert not states[:, 4:].any()


def test_a_row_of_padding_alone_is_zero_and_trains(backbone):
    x, mask = torch.randn(2, 5, 32), torch.tensor([[True], [False]]).expand(2, 5)
    states = backbone.train()(x, mask)[0]
    assert not states[1].any() and states[0].all(dim=-1).all()
    states.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())


def test_every_parameter_learns(backbone):
    states = backbone.train()(torch.randn(3, 7, 32), times=seconds(3, 7))[0]
    (states * torch.randn_like(states)).sum().backward()
    for name, parameter in backbone.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


@pytest.mark.parametrize("batch, length", [(1, 1), (3, 1), (1, 2_048)])
def test_any_length_gives_finite_states(backbone, batch, length):
    with torch.inference_mode():
        states = backbone(torch.randn(batch, length, 32), times=seconds(batch, length))[0]
    assert states.shape == (batch, length, 32) and torch.isfinite(states).all()


def test_bfloat16_autocast_is_close_and_continues(backbone):
    x, times = torch.randn(2, 9, 32), seconds(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        whole = backbone(x, times=times)[0]
        whole.float().sum().backward()
        cache = backbone(x[:, :6], times=times[:, :6])[1]
        rest = backbone(x[:, 6:], cache=cache, times=times[:, 6:])[0]
    exact = backbone(x, times=times)[0]
    for states, expected in ((whole, exact), (rest, exact[:, 6:])):
        assert F.cosine_similarity(states.float(), expected, dim=-1).min() > 0.99


def test_only_hstu_reads_times(name, backbone):
    x, times = torch.randn(2, 6, 32), seconds(2, 6)
    assert torch.equal(backbone(x, times=times)[0], backbone(x, times=times + 1e6)[0])
    slower = (times - times[:, :1]) * 50 + times[:, :1]
    difference = (backbone(x, times=times)[0] - backbone(x, times=slower)[0]).abs()
    assert difference.max() > 1e-5 if name == "hstu" else not difference.any()
    assert torch.equal(backbone(x)[0], backbone(x, times=torch.full((2, 6), 5.0, dtype=torch.float64))[0])


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_far_positions_share_the_last_one(name):
    short, long = build(name, positions=4), build(name, positions=9)
    weights = short.state_dict()
    for key, table in weights.items():
        if key.endswith(("positions", "position_bias")):
            dim = table.shape.index(4)
            weights[key] = torch.cat([table, *[table.narrow(dim, 3, 1)] * 5], dim=dim)
    long.load_state_dict(weights)
    x = torch.randn(1, 12, 32)
    assert torch.allclose(short(x)[0], long(x)[0], atol=1e-6)


def test_hstu_gives_the_first_row_no_time_of_its_own():
    backbone, x, times = build("hstu"), torch.randn(1, 6, 32), seconds(1, 6)
    elsewhere = torch.cat([torch.zeros_like(times[:, :1]), times[:, 1:]], dim=1)
    assert torch.equal(backbone(x, times=times)[0], backbone(x, times=elsewhere)[0])


def test_time_buckets_are_half_octaves():
    edges = torch.tensor([0.0, 1.4, 1.5, 2, 3, 4, 6, 8, 2.0**31, 1e12], dtype=torch.float64)
    expected = [0, 0, 1, 2, 3, 4, 5, 6, BUCKETS - 1, BUCKETS - 1]
    assert time_buckets(edges.clone()).tolist() == time_buckets(-edges).tolist() == expected


def test_hstu_attention_is_the_papers():
    """In the open, over more than one chunk: scores, both biases, SiLU, the mean over the keys, and their gradients."""
    length = CHUNK + 9
    block = build("hstu", positions=64).blocks[0].double()
    q, k, v = (torch.randn(4, length, e, dtype=torch.double) for e in (16, 16, 16))  # [hB, N, e]
    places = build("hstu", positions=64).places(seconds(2, length), length)
    weights = torch.randn(4, length, 16, dtype=torch.double)

    def gradients(attended):
        block.zero_grad()
        (attended * weights).sum().backward()
        return attended, block.position_bias.grad.clone(), block.time_bias.grad.clone()

    distance = torch.arange(length)[:, None] - torch.arange(length)
    bucket = torch.zeros(2, length, length, dtype=torch.long)
    for start, (_, part) in zip((0, CHUNK), places):
        bucket[:, start : start + CHUNK, : part.shape[2]] = part
    bias = block.position_bias[:, distance.clamp(0, 63)][:, None] + block.time_bias[:, bucket]  # [h, B, N, N]
    scores = F.silu(q @ k.mT + bias.flatten(0, 1)) * (distance >= 0)
    expected = gradients(scores @ v / torch.arange(1, length + 1)[:, None])
    for ours, plain in zip(gradients(block.attend(q, k, v, places)), expected):
        assert torch.allclose(ours, plain)


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 128, 200])
def test_the_chunked_scan_equals_the_recurrence(length):
    torch.manual_seed(length)
    v, k, q = (torch.randn(2, length, *shape) for shape in ((3, 8), (4,), (4,)))
    step, decay, state = torch.rand(2, length, 3), -torch.tensor([0.1, 1.0, 16.0]), torch.randn(2, 3, 8, 4)
    y, last = chunked_scan(v, step, decay, k, q, state)
    for n in range(length):
        entered = (step[:, n, :, None] * v[:, n])[..., None] * k[:, n, None, None]  # [B, h, p, s]
        state = (step[:, n] * decay).exp()[..., None, None] * state + entered
        assert torch.allclose(y[:, n], (state @ q[:, n, None, :, None])[..., 0], atol=1e-4)
    assert torch.allclose(last, state, atol=1e-4)


@pytest.mark.parametrize("name", ["hstu", "mamba4rec", "gru4rec", "set"])
def test_a_cache_continues_across_chunks(name):
    backbone, x, times = build(name), torch.randn(1, 200, 32), seconds(1, 200)
    with torch.inference_mode():
        whole, cache = backbone(x, times=times)[0], None
        states = []
        for part, when in zip(x.tensor_split((63, 64, 128, 130), 1), times.tensor_split((63, 64, 128, 130), 1)):
            new, cache = backbone(part, cache=cache, times=when)
            states.append(new)
    assert torch.allclose(torch.cat(states, dim=1), whole, atol=1e-5)


@pytest.mark.parametrize("width, heads, inner", [(64, 2, 256), (128, 4, 512), (192, 6, 768)])
def test_matched_backbones_have_as_many_parameters_as_sasrec(width, heads, inner):
    target = parameter_count("sasrec", width, heads, 2, 51, inner)
    for name in BACKBONES:
        matched = matched_inner(name, width, heads, 2, 51, target)
        built = build_backbone(name, width, heads, 2, 0.0, matched, 51)
        assert abs(sum(p.numel() for p in built.parameters()) - target) <= 0.05 * target, name
    assert matched_inner("sasrec", width, heads, 2, 51, target) == inner


def test_a_size_that_no_inner_gives():
    with pytest.raises(RecipeError, match="no inner width gives sasrec 1000 parameters"):
        matched_inner("sasrec", 64, 2, 2, 51, 1000)


@pytest.mark.parametrize("name", ["hstu", "mamba4rec"])
def test_inner_must_be_a_multiple_of_heads(name):
    with pytest.raises(RecipeError, match=r"encoder\.inner must be a multiple of 2 heads, not 33"):
        build_backbone(name, 32, 2, 2, 0.1, 33)


def test_unknown_name():
    with pytest.raises(RecipeError, match=r"encoder\.backbone is 'lstm'; there are .*transformer"):
        build_backbone("lstm", 32, 2, 2, 0.1)
