"""The facade and the engines that serve it."""

from persona.serving.persona import Answer, Persona
from persona.serving.vllm_offline import VLLMEngine

__all__ = ["Answer", "Persona", "VLLMEngine"]
