"""Gated cross-attention to user tokens inside stock vLLM: user tokens are a memory beside the prompt, not part of it.

The first M positions of a request carry its user tokens through `prompt_embeds`. Every n-th layer writes their keys and
values where these positions have their KV cache, so vLLM's scheduling, paging and prefix cache serve them as they
are. Two attentions share that cache: the layer's own sees only the text, a second one only the user tokens.

    layout       how many slots, how many of them are read, and which layers read
    rows         user tokens as the rows that open a request
    export       writes a checkpoint that vLLM serves: the LLM's files, the trained layers, a chat template
    plugin       tells vLLM about our models; runs in each of its processes
    model        the layers, on top of vLLM's own Llama, Qwen, Mistral and Gemma
    metadata     what each of the two attentions sees
    limits       refuses at start-up what was not tested or cannot work
"""

from persona.serving.vllm_memory.layout import ROLE, MemoryLayout
from persona.serving.vllm_memory.plugin import ARCHITECTURES

__all__ = ["ARCHITECTURES", "ROLE", "MemoryLayout", "export_checkpoint", "memory_rows"]


def __getattr__(name: str):
    if name == "memory_rows":  # loaded on first use: vLLM's plug-in imports this package in every process
        from persona.serving.vllm_memory.rows import memory_rows

        return memory_rows
    if name == "export_checkpoint":
        from persona.serving.vllm_memory.export import export_checkpoint

        return export_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
