"""What each of the two attentions sees of a request's KV cache, whatever the attention backend.

A request's slots are M for user tokens, then its text; M is a whole number of blocks. Self-attention sees the text
alone: its block table begins after the user's blocks and its sequence is M shorter. The other attention sees the first
K slots alone, from every position. Both are vLLM's own backend with another metadata builder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from persona.errors import PersonaError
from persona.serving.vllm_memory.layout import MemoryLayout

_FORGET = {"_num_computed_tokens_cache": None, "_token_to_req_indices_cache": None, "req_idx": None}
"""What vLLM derived from the lengths of before."""


def text_only(batch: CommonAttentionMetadata, *, slots: int, block_size: int) -> CommonAttentionMetadata:
    """Self-attention's view: the text of each request, as if its M slots were not there.

    A chunk of a prompt that begins inside the slots becomes two requests in the metadata, since its positions there
    see one another (whatever comes of it is not used) and its text sees the text. The order of positions stays.
    """
    blocks = slots // block_size
    bounds, ends = batch.query_start_loc_cpu[: batch.num_reqs + 1].numpy(), _ends(batch)
    lengths = np.diff(bounds)
    in_slots = np.clip(np.minimum(ends, slots) - (ends - lengths), 0, lengths)
    if not in_slots.any():
        upper = batch.seq_lens_cpu_upper_bound
        return batch.replace(
            seq_lens=(batch.seq_lens - slots).clamp(min=0),
            seq_lens_cpu_upper_bound=None if upper is None else (upper - slots).clamp(min=0),
            max_seq_len=max(batch.max_seq_len - slots, 1),
            block_table_tensor=batch.block_table_tensor[:, blocks:].contiguous(),
            **_FORGET,
        )

    # Columns [n, 2] are the part in the slots and the part in the text of each request.
    part_lengths = np.stack([in_slots, lengths - in_slots], axis=1)
    part_ends = np.stack([np.minimum(ends, slots), np.maximum(ends - slots, 0)], axis=1)
    keep = part_lengths > 0
    keep[:, 1] |= lengths == 0  # padding stays one request
    request, part = np.nonzero(keep)
    lengths, ends = part_lengths[keep].astype(np.int32), part_ends[keep].astype(np.int32)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    table = batch.block_table_tensor
    columns = np.arange(table.shape[1])[None] + part[:, None] * blocks
    rows, columns = request[:, None], np.minimum(columns, table.shape[1] - 1)
    prefilling = batch.is_prefilling
    return batch.replace(
        num_reqs=len(lengths),
        query_start_loc=_like(bounds, batch.query_start_loc),
        query_start_loc_cpu=torch.from_numpy(bounds),
        max_query_len=int(lengths.max()),
        seq_lens=_like(ends, batch.seq_lens),
        seq_lens_cpu_upper_bound=torch.from_numpy(ends),
        max_seq_len=max(int(ends.max()), 1),
        block_table_tensor=table[_index(rows, table), _index(columns, table)].contiguous(),
        is_prefilling=None if prefilling is None else prefilling[torch.from_numpy(request)],
        **_FORGET,
    )


def user_only(batch: CommonAttentionMetadata, *, tokens: int, slots: int, block_size: int) -> CommonAttentionMetadata:
    """The other attention's view: every position of a request sees its K user tokens and nothing else."""
    upper = batch.seq_lens_cpu_upper_bound
    return batch.replace(
        seq_lens=(batch.seq_lens > 0) * torch.full_like(batch.seq_lens, tokens),
        seq_lens_cpu_upper_bound=None if upper is None else (upper > 0) * torch.full_like(upper, tokens),
        max_seq_len=tokens,
        causal=False,
        block_table_tensor=batch.block_table_tensor[:, : slots // block_size].contiguous(),
        **_FORGET,
    )


def text_backend(base: type[AttentionBackend], layout: MemoryLayout) -> type[AttentionBackend]:
    """`base`, seeing the text only."""
    return _backend("PersonaText", base, layout, partial(text_only, slots=layout.slots))


def user_backend(base: type[AttentionBackend], layout: MemoryLayout) -> type[AttentionBackend]:
    """`base`, seeing the user tokens only."""
    return _backend("PersonaUser", base, layout, partial(user_only, tokens=layout.tokens, slots=layout.slots))


def _backend(
    name: str, base: type[AttentionBackend], layout: MemoryLayout, view: Callable[..., CommonAttentionMetadata]
) -> type[AttentionBackend]:
    class Builder(base.get_builder_cls()):
        supports_update_block_table = False  # the other kind's metadata differs in more than the block table

        def __init__(self, kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs):
            if layout.slots % kv_cache_spec.block_size:
                raise PersonaError(
                    f"{layout.slots} slots for user tokens are not whole blocks of {kv_cache_spec.block_size}; "
                    "start vLLM with a --block-size that divides them"
                )
            super().__init__(kv_cache_spec, layer_names, _with_room(vllm_config), device, *args, **kwargs)

        @classmethod
        def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
            # A full graph needs the same number of requests and the same tensors in every step: neither holds here.
            return AttentionCGSupport.NEVER

        def build(self, common_prefix_len, common_attn_metadata, fast_build=False, **kwargs):
            seen = view(common_attn_metadata, block_size=self.kv_cache_spec.block_size)
            return super().build(0, seen, fast_build, **kwargs)

    Builder.__name__ = Builder.__qualname__ = f"{name}{base.get_builder_cls().__name__}"
    return subclass_attention_backend(name, base, Builder)


def _with_room(vllm_config):
    """The config with twice the requests, by which builders size their buffers: a chunk may count as two."""
    roomy = copy.copy(vllm_config)
    roomy.scheduler_config = copy.copy(vllm_config.scheduler_config)
    roomy.scheduler_config.max_num_seqs *= 2
    return roomy


def _ends(batch: CommonAttentionMetadata) -> np.ndarray:
    """Length of each request after this step `[n]`."""
    ends = batch.seq_lens_cpu_upper_bound
    return (batch.seq_lens.cpu() if ends is None else ends)[: batch.num_reqs].numpy()


def _like(values: np.ndarray, other: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(device=other.device, dtype=other.dtype, non_blocking=True)


def _index(values: np.ndarray, table: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(table.device)
