"""Gated cross-attention: a frozen Hugging Face decoder reads user tokens as a memory beside its prompt.

After every n-th block, `h + tanh(g) Wo attention(Wq h, Wk u, Wv u)`, as in Flamingo (arXiv 2204.14198, section 2.2;
there before the block, and with a feed-forward layer of its own) and User-LLM (arXiv 2402.13598, section 3.3). Heads
are those of the LLM's own attention, so that an engine can keep these keys and values in the LLM's own KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from persona.errors import PersonaError

KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass
class _Reading:
    """What the layers of one model read now."""

    of: CrossAttention
    memory: torch.Tensor
    mask: torch.Tensor | None
    kept: dict[str, KeysValues] = field(default_factory=dict)
    """Keys and values that were made already, by layer."""


_NOW: ContextVar[_Reading | None] = ContextVar("persona_reading", default=None)
"""Each thread's own, as an LLM may be asked from several, for several users."""
_SAMPLE = 256
"""Tokens on which the size of hidden states is measured."""


class GatedCrossAttention(nn.Module):
    """One layer. The gate starts at zero, and zero user tokens have zero values: either way nothing is added."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.head_dim = head_dim
        self.norm, self.memory_norm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.to_o = nn.Linear(heads * head_dim, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def keys_values(self, memory: torch.Tensor) -> KeysValues:
        """Keys and values `[B, kv_heads, K, head_dim]` of user tokens `[B, K, width]`."""
        memory = self.memory_norm(memory)
        return self._heads(self.to_k(memory)), self._heads(self.to_v(memory))

    def forward(self, hidden: torch.Tensor, keys_values: KeysValues, mask: torch.Tensor | None) -> torch.Tensor:
        """Hidden states `[B, L, width]` with what was read added; `mask` `[B, 1, 1, K]` is True where there is one."""
        query = self._heads(self.to_q(self.norm(hidden.to(self.gate.dtype))))
        read = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask, enable_gqa=True)
        return hidden + (torch.tanh(self.gate) * self.to_o(read.transpose(1, 2).flatten(2))).to(hidden.dtype)

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class CrossAttention(nn.Module):
    """The layers of one LLM, after blocks 0, n, 2n...; they read only inside `reading`, else the LLM is as it was.

    Holds no reference to the LLM, whose blocks are hooked, so its state is the layers' alone. `scaled` measures the
    LLM for the initial weights, which layers that are to be loaded do not need. Raises `PersonaError` for an LLM whose
    blocks cannot be found, and for `every` below 1.
    """

    def __init__(self, llm: nn.Module, every: int = 2, *, scaled: bool = True):
        super().__init__()
        if every < 1:
            raise PersonaError(f"cross-attention layers stand after every n-th block, with n of 1 or more, not {every}")
        config, blocks = llm.config.get_text_config(), decoder_blocks(llm)
        heads = config.num_attention_heads
        shape = {
            "width": config.hidden_size,
            "heads": heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "eps": config.rms_norm_eps,
        }
        self.every = every
        self.layers = nn.ModuleDict({str(i): GatedCrossAttention(**shape) for i in range(0, len(blocks), every)})
        if scaled:
            self._scale(llm, blocks)
        for name in self.layers:
            blocks[int(name)].register_forward_hook(self._hook(name))

    @torch.no_grad()
    def _scale(self, llm: nn.Module, blocks: nn.ModuleList) -> None:
        """Scales what untrained layers read to the hidden states that it is added to, so that gates are shares of them.

        An LLM's hidden states may be thirty times as large as what a layer with common initial weights puts out; it
        would learn nothing within the steps that a soft prompt needs.
        """
        vocabulary = llm.get_input_embeddings().weight.shape[0]
        ids = torch.arange(vocabulary, device=llm.device)[:: max(1, vocabulary // _SAMPLE)][None, :_SAMPLE]
        found: dict[str, torch.Tensor] = {}
        hooks = [
            blocks[int(name)].register_forward_hook(lambda _, __, hidden, name=name: found.update({name: hidden}))
            for name in self.layers
        ]
        llm(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, layer in self.layers.items():
            # The median token: the first ones may be a thousand times as large as the others.
            size = found[name].float().square().mean(-1).sqrt().median()
            read = layer.to_v(torch.randn(_SAMPLE, layer.to_v.in_features, generator=torch.Generator().manual_seed(0)))
            shared = layer.to_q.out_features // layer.to_v.out_features  # heads that a key-value head serves
            read = read.unflatten(-1, (-1, layer.head_dim)).repeat_interleave(shared, -2).flatten(-2)
            layer.to_o.weight.mul_(size.cpu() / layer.to_o(read).square().mean().sqrt())

    @contextmanager
    def reading(self, memory: torch.Tensor | None, mask: torch.Tensor | None = None) -> Iterator[None]:
        """Within, the LLM reads `memory` `[B, K, width]`, where `mask` `[B, K]` is True; keys and values are made once.

        An all-zero memory leaves the LLM exactly as it was, as does None. Other threads do not see it.
        """
        reading = None if memory is None else _Reading(self, memory, None if mask is None else mask[:, None, None])
        before = _NOW.set(reading)
        try:
            yield
        finally:
            _NOW.reset(before)

    def _hook(self, name: str):
        def read(block: nn.Module, args: tuple, hidden: torch.Tensor) -> torch.Tensor:
            now = _NOW.get()
            if now is None or now.of is not self:
                return hidden
            layer = self.layers[name]
            if name not in now.kept:
                now.kept[name] = layer.keys_values(now.memory.to(layer.gate.dtype))
            keys, values = now.kept[name]
            mask, copies = now.mask, len(hidden) // len(keys)
            if copies > 1:  # generate() with several sequences, or beams, for each prompt
                keys, values = keys.repeat_interleave(copies, 0), values.repeat_interleave(copies, 0)
                mask = None if mask is None else mask.repeat_interleave(copies, 0)
            return layer(hidden, (keys, values), mask)

        return read


def decoder_blocks(llm: nn.Module) -> nn.ModuleList:
    """The decoder's blocks in order. Raises `PersonaError` for a model that has none in the usual place."""
    blocks = getattr(llm.get_decoder(), "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not hasattr(llm.config.get_text_config(), "rms_norm_eps"):
        raise PersonaError(
            f"cross-attention can be added to decoders of the Llama, Qwen, Mistral and Gemma families, not to "
            f"{type(llm).__name__}; use injection: soft_prompt"
        )
    return blocks
