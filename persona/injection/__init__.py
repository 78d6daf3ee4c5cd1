"""User tokens into a frozen LLM: projector, soft prompt placement, and `PersonalizedLM` for Hugging Face."""

from persona.injection.cross_attention import CrossAttention
from persona.injection.llm import load_llm
from persona.injection.model import PersonalizedLM
from persona.injection.projector import Projector
from persona.injection.soft_prompt import PLACEHOLDER, Prompt, PromptTemplate
from persona.injection.soft_prompt_lm import SoftPromptLM

__all__ = [
    "PLACEHOLDER",
    "CrossAttention",
    "PersonalizedLM",
    "Projector",
    "Prompt",
    "PromptTemplate",
    "SoftPromptLM",
    "load_llm",
]
