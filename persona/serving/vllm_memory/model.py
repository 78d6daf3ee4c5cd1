"""vLLM's own LLMs with gated cross-attention to user tokens after every n-th block.

Nothing of a family is written anew: blocks and attention keep their class and get a forward in front of it. Maths and
names of weights are those of `persona.injection.cross_attention`.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from persona.serving.vllm_memory.layout import MemoryLayout
from persona.serving.vllm_memory.limits import check_backend, check_config
from persona.serving.vllm_memory.metadata import text_backend, user_backend


class UserAttention(nn.Module):
    """One layer that reads user tokens; its keys and values lie in the KV cache of `source`, the block's attention."""

    def __init__(self, source: Attention, layout: MemoryLayout, width: int, eps: float, cache_config, prefix: str):
        super().__init__()
        heads, kv_heads, size = source.num_heads, source.num_kv_heads, source.head_size

        def linear(name: str, inputs: int, outputs: int) -> ReplicatedLinear:
            return ReplicatedLinear(inputs, outputs, bias=False, return_bias=False, prefix=f"{prefix}.{name}")

        self.norm, self.memory_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.to_q = linear("to_q", width, heads * size)
        self.to_k = linear("to_k", width, kv_heads * size)
        self.to_v = linear("to_v", width, kv_heads * size)
        self.to_o = linear("to_o", heads * size, width)
        self.gate = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.attn = Attention(
            heads,
            size,
            size**-0.5,
            num_kv_heads=kv_heads,
            cache_config=cache_config,
            prefix=f"{prefix}.attn",
            attn_backend=user_backend(source.attn_backend, layout),
            kv_sharing_target_layer_name=source.layer_name,
        )

    def keys_values(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[T, kv_heads * head_size]` of rows `[T, width]`."""
        rows = self.memory_norm(rows)
        return self.to_k(rows), self.to_v(rows)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What was read `[T, width]`, and the block's whole output `[T, width]`, which is yet to be added."""
        hidden, residual = self.norm(hidden, residual)
        read = self.to_o(self.attn(self.to_q(hidden), None, None))
        return torch.tanh(self.gate) * read, residual


class _StoresUser:
    """In front of a block's `Attention`: user tokens' keys and values take their slots, if there are `user`."""

    user: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """`in_slots` `[T, 1]`, keys and values `[T, kv_heads * head_size]`; only for the time of one call."""

    def forward(self, query, key, value, *args, **kwargs):
        if self.user is not None:
            in_slots, user_key, user_value = self.user
            key, value = torch.where(in_slots, user_key, key), torch.where(in_slots, user_value, value)
        return super().forward(query, key, value, *args, **kwargs)


class _ReadsUser:
    """In front of a decoder block: after it, its `user_attn` reads the user tokens `rows` `[T, width]`."""

    def forward(self, positions, hidden_states, residual, in_slots, rows):
        attention = self.self_attn.attn
        attention.user = (in_slots, *self.user_attn.keys_values(rows))
        hidden_states, residual = super().forward(positions, hidden_states, residual)
        attention.user = None
        return self.user_attn(hidden_states, residual)


class _TakesUser:
    """In front of a decoder: the first M positions of a request are user tokens, and its text begins after them."""

    layout: MemoryLayout

    def forward(self, input_ids, positions, intermediate_tensors, inputs_embeds=None):
        rows = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        in_slots = (positions < self.layout.slots).unsqueeze(-1)
        positions = (positions - self.layout.slots).clamp(min=0)
        hidden_states, residual = torch.where(in_slots, 0, rows), None
        for number, layer in enumerate(self.layers):
            user = (in_slots, rows) if self.layout.reads(number) else ()
            hidden_states, residual = layer(positions, hidden_states, residual, *user)
        return self.norm(hidden_states, residual)[0]


class _WithUser:
    """In front of a causal LM of vLLM. Raises `PersonaError` for what `limits` refuses."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        layout = MemoryLayout.from_config(vllm_config.model_config.hf_config)
        check_config(vllm_config, layout)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        add_user_attention(self.model, layout, vllm_config, maybe_prefix(prefix, "model"))


def add_user_attention(decoder: nn.Module, layout: MemoryLayout, vllm_config, prefix: str) -> None:
    """Makes a decoder of vLLM read user tokens by `layout`."""
    config = decoder.config
    for number, layer in enumerate(decoder.layers):
        attention = layer.self_attn.attn
        check_backend(attention.attn_backend)
        if layout.reads(number):
            layer.user_attn = UserAttention(
                attention,
                layout,
                config.hidden_size,
                config.rms_norm_eps,
                vllm_config.cache_config,
                f"{prefix}.layers.{number}.user_attn",
            )
            _put_in_front(attention, _StoresUser)
            _put_in_front(layer, _ReadsUser)
        attention.attn_backend = text_backend(attention.attn_backend, layout)
    decoder.layout = layout
    _put_in_front(decoder, _TakesUser)
    if not decoder.do_not_compile:
        TorchCompileWithNoGuardsWrapper.__init__(decoder)  # which holds on to the forward of before


def _put_in_front(module: nn.Module, mixin: type) -> None:
    """Lets `mixin` come before the module's own class."""
    own = type(module)
    module.__class__ = type(f"{mixin.__name__.strip('_')}{own.__name__}", (mixin, own), {"__module__": __name__})


class PersonaLlamaForCausalLM(_WithUser, LlamaForCausalLM):
    """Llama."""


class PersonaMistralForCausalLM(_WithUser, MistralForCausalLM):
    """Mistral, without a sliding window."""

    def maybe_remap_mistral(self, name, loaded_weight):
        if ".user_attn." in name:  # it would take our `norm` for the last one of Mistral's own format
            return name, loaded_weight
        return super().maybe_remap_mistral(name, loaded_weight)


class PersonaQwen2ForCausalLM(_WithUser, Qwen2ForCausalLM):
    """Qwen2."""


class PersonaQwen3ForCausalLM(_WithUser, Qwen3ForCausalLM):
    """Qwen3."""


class PersonaGemmaForCausalLM(_WithUser, GemmaForCausalLM):
    """Gemma; user tokens are not scaled by its embeddings' factor."""
