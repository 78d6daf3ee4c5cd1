"""What each attention sees, slot by slot, read back from the metadata as a kernel would read it."""

from itertools import pairwise

import pytest
import torch

from persona.serving.vllm_memory import MemoryLayout
from persona.serving.vllm_offline import import_vllm

pytestmark = pytest.mark.vllm

BLOCK = 32
CHUNK_INSIDE = (0, 48)
"""(computed, new) of a first chunk that ends inside 64 slots."""
CHUNK_ACROSS = (48, 30)
"""The next one, which ends in the text."""


@pytest.fixture(scope="module")
def metadata():
    import_vllm()
    from persona.serving.vllm_memory import metadata

    return metadata


def make_batch(requests, padding=0):
    """Metadata of (computed, new) positions of each request, in shuffled blocks; then requests that are padding."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    real = len(requests)
    computed, new = torch.tensor([*requests, *[(0, 0)] * padding], dtype=torch.int32).T
    ends, count = computed + new, real + padding
    columns = 12
    blocks = 1 + torch.randperm(count * columns, generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([torch.zeros(1), new.cumsum(0)]).to(torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=bounds.clone(),
        query_start_loc_cpu=bounds,
        seq_lens=ends.clone(),
        seq_lens_cpu_upper_bound=ends,
        num_reqs=count,
        num_actual_tokens=int(bounds[-1]),
        max_query_len=int(new.max()),
        max_seq_len=int(ends.max()),
        block_table_tensor=blocks.view(count, columns).to(torch.int32),
        slot_mapping=torch.arange(int(bounds[-1])),
        is_prefilling=torch.tensor([c < 200 for c in computed]),
    )


def seen(batch):
    """For each position in the batch, the slots `block * BLOCK + offset` that a kernel would read."""
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu_upper_bound.tolist()
    assert batch.query_start_loc.tolist() == batch.query_start_loc_cpu.tolist()
    assert len(batch.block_table_tensor) == len(batch.seq_lens) == batch.num_reqs == len(batch.is_prefilling)
    bounds = batch.query_start_loc_cpu.tolist()
    assert max(b - a for a, b in pairwise(bounds)) <= batch.max_query_len
    assert max(batch.seq_lens.tolist()) <= batch.max_seq_len
    found = []
    for number, end in enumerate(batch.seq_lens.tolist()):
        new = bounds[number + 1] - bounds[number]
        for position in range(new):
            visible = end - new + position + 1 if batch.causal else end
            assert 0 <= visible <= batch.block_table_tensor.shape[1] * BLOCK
            found.append(slots_of(batch, number, range(visible)))
    return found


def slots_of(batch, number, positions):
    """Where these positions of a request have their keys."""
    table = batch.block_table_tensor[number].tolist()
    return [table[p // BLOCK] * BLOCK + p % BLOCK for p in positions]


def positions_of(requests):
    """(request, position) of each position in the batch."""
    return [(i, computed + p) for i, (computed, new) in enumerate(requests) for p in range(new)]


BATCHES = {
    "decode": [(70, 1), (64, 1), (300, 1)],
    "whole prompts": [(0, 64 + 9), (0, 64 + 1), (0, 64)],
    "a chunk inside the slots": [CHUNK_INSIDE],
    "a chunk across their end": [CHUNK_ACROSS],
    "from the prefix cache": [(32, 64), (64, 20), (96, 7)],
    "everything at once": [(70, 1), CHUNK_ACROSS, (0, 100), (128, 1), CHUNK_INSIDE, (64, 33), (63, 2), (63, 1)],
}


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES)
def test_text_sees_its_text_and_user_attention_the_user(metadata, requests, padding):
    batch = make_batch(requests, padding)
    text = seen(metadata.text_only(batch, slots=64, block_size=BLOCK))
    user = seen(metadata.user_only(batch, tokens=37, slots=64, block_size=BLOCK))
    positions = positions_of(requests)
    assert len(text) == len(user) == len(positions)
    for (number, position), own_text, own_user in zip(positions, text, user):
        assert own_user == slots_of(batch, number, range(37))
        if position >= 64:
            assert own_text == slots_of(batch, number, range(64, position + 1))
        else:
            assert own_text == slots_of(batch, number, range(position + 1))


def test_what_does_not_change(metadata):
    batch = make_batch(BATCHES["everything at once"])
    before = make_batch(BATCHES["everything at once"])
    for made in (
        metadata.text_only(batch, slots=32, block_size=BLOCK),
        metadata.user_only(batch, tokens=32, slots=32, block_size=BLOCK),
    ):
        assert made.num_actual_tokens == batch.num_actual_tokens
        assert made.slot_mapping is batch.slot_mapping
        assert made.query_start_loc_cpu[-1] == batch.query_start_loc_cpu[-1]
    assert torch.equal(batch.seq_lens, before.seq_lens)
    assert torch.equal(batch.block_table_tensor, before.block_table_tensor)


def test_decoding_keeps_one_row_per_request(metadata):
    requests = [(70, 1), (64, 1)]
    text = metadata.text_only(make_batch(requests), slots=64, block_size=BLOCK)
    assert text.num_reqs == 2 and text.seq_lens.tolist() == [7, 1]
    split = metadata.text_only(make_batch([(0, 70), (0, 10)]), slots=64, block_size=BLOCK)
    assert split.num_reqs == 3 and split.query_start_loc.tolist() == [0, 64, 70, 80]
    assert split.seq_lens.tolist() == [64, 6, 10] and split.is_prefilling.tolist() == [True] * 3


def test_lengths_only_on_the_device(metadata):
    batch = make_batch(BATCHES["everything at once"])
    expected = metadata.text_only(batch, slots=64, block_size=BLOCK)
    found = metadata.text_only(batch.replace(seq_lens_cpu_upper_bound=None), slots=64, block_size=BLOCK)
    assert torch.equal(found.seq_lens, expected.seq_lens)
    assert metadata.user_only(batch.replace(seq_lens_cpu_upper_bound=None), tokens=1, slots=64, block_size=BLOCK)


def test_backends_differ_only_in_what_they_see(metadata):
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    layout = MemoryLayout(tokens=4, slots=32, every=2)
    text = metadata.text_backend(CPUAttentionBackend, layout)
    user = metadata.user_backend(CPUAttentionBackend, layout)
    names = {backend.full_cls_name() for backend in (text, user, CPUAttentionBackend)}
    assert len(names) == 3  # vLLM makes one group of metadata for each name
    for backend in (text, user):
        assert issubclass(backend, CPUAttentionBackend)
        assert backend.get_impl_cls() is CPUAttentionBackend.get_impl_cls()
        builder = backend.get_builder_cls()
        assert issubclass(builder, CPUAttentionBackend.get_builder_cls())
        assert builder.get_cudagraph_support(None, None) is AttentionCGSupport.NEVER
