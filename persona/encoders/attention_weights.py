"""`state_attention`: which of a user's states the user tokens look at, read off while the tokens are made.

Nothing here is needed to make tokens. The weights come from hooks on the modules that attend, so that those modules
need not know: hooks last for one call, during which nobody else may use the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from persona.encoders.resampler import Resampler
from persona.encoders.user_encoder import InstructionState, UserEncoder, UserState
from persona.errors import PersonaError


@torch.inference_mode()
def state_attention(
    encoder: UserEncoder,
    states: Sequence[UserState],
    instructions: Sequence[str | InstructionState],
    count: int | None = None,
) -> list[torch.Tensor]:
    """The share of the user tokens' attention that falls on each state, `[1 + rows]` for each pair, none negative.

    The mean over the first `count` tokens, all K by default, and over layers and heads: of a resampler's
    cross-attention, whose weights sum to 1 over the states; of the LM's attention at its user positions, where what is
    missing to 1 falls on the instruction and on the user positions themselves. A head that takes the mean of the states
    looks at all of them alike. The first state is the start state. Raises `EventError` for a bad `count`, and
    `PersonaError` for an LM that does not give its weights.
    """
    count = encoder.check_count(count)
    if not states:
        return []
    sizes = [len(state.states) for state in states]
    if encoder.config.backbone == "llm":
        weights = _of_llm(encoder, states, instructions, count)
    elif isinstance(encoder.head, Resampler):
        weights = _of_resampler(encoder, states, instructions, count)
    else:
        return [state.states.new_full((size,), 1 / size) for state, size in zip(states, sizes)]
    return [row[:size].clone() for row, size in zip(weights, sizes)]


def _of_resampler(encoder: UserEncoder, states, instructions, count: int) -> torch.Tensor:
    """`[B, N]`, padded on the right."""
    found = []

    def note(attention: nn.Module, args: tuple) -> None:
        found.append(attention.weights(*args)[:, :, :count].mean((1, 2)))  # the queries stand before the instruction

    hooks = [layer.cross_attention.register_forward_pre_hook(note) for layer in encoder.head.layers]
    try:
        encoder.tokens(states, instructions)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).mean(0)


def _of_llm(encoder: UserEncoder, states, instructions, count: int) -> torch.Tensor:
    """`[B, N + T + K]`: the states padded on the right, then instruction and user positions padded on the left."""
    with _attention_of(encoder.backbone.llm) as found:
        encoder.tokens(states, instructions)
    first = found[0].shape[2] - encoder.config.tokens
    return torch.stack([layer[:, :, first : first + count].mean((1, 2)) for layer in found]).mean(0)


@contextmanager
def _attention_of(llm: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that takes the weights `[B, heads, L, M + L]` of each layer of a Hugging Face model while it runs."""
    found: list[torch.Tensor] = []
    before = llm.config._attn_implementation

    def ask(module, args, kwargs):
        mask, dtype = kwargs["attention_mask"], kwargs["inputs_embeds"].dtype
        added = {kind: _added(m, dtype) for kind, m in mask.items()} if isinstance(mask, dict) else _added(mask, dtype)
        return args, {**kwargs, "attention_mask": added, "output_attentions": True}

    def note(module, args, output) -> None:
        weights = getattr(output, "attentions", None)
        if not weights or any(layer is None for layer in weights):
            raise PersonaError(f"{type(llm).__name__} does not give its attention weights")
        found.extend(weights)

    hooks = llm.register_forward_pre_hook(ask, with_kwargs=True), llm.register_forward_hook(note)
    llm.set_attn_implementation("eager")  # no other one gives weights
    try:
        yield found
    finally:
        llm.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask for eager attention, which adds it: a Boolean one, made for SDPA, would hide nothing."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
