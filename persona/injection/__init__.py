"""User tokens into a frozen LLM: projector, soft prompt placement, and `PersonalizedLM` for Hugging Face."""

from persona.injection.model import PersonalizedLM, load_llm
from persona.injection.projector import Projector
from persona.injection.soft_prompt import PLACEHOLDER, Prompt, PromptTemplate

__all__ = ["PLACEHOLDER", "PersonalizedLM", "Projector", "Prompt", "PromptTemplate", "load_llm"]
