"""Tells vLLM about models that read user tokens; an entry point that vLLM runs in each of its processes."""

MODELS = "persona.serving.vllm_memory.model"
ARCHITECTURES = {
    f"{base}ForCausalLM": f"Persona{base}ForCausalLM" for base in ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma")
}
"""A base LLM's architecture, and the one that serves it with user tokens."""


def register() -> None:
    """Adds names to vLLM's registry. Nothing is imported until a checkpoint asks for one of them."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"{MODELS}:{name}")
