"""What can stand before a frozen LLM: our user tokens, or nothing but an adapted LLM. PPlug has a file of its own.

All are `SoftPromptLM`s with the same three members, so that one trainer and one table serve them:

    soft                 how many user tokens, or other soft rows, come with a prompt
    condition(samples)   arguments of `forward` that say who asks, beside `batch`
    rows(samples)        the soft rows `[B, soft, llm_width]` at inference, or None
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from persona.encoders import UserEncoder
from persona.errors import PersonaError
from persona.evaluation.lamp.recipe import LampRecipe
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS
from persona.history import History
from persona.injection import PersonalizedLM, SoftPromptLM
from persona.injection.soft_prompt_lm import SoftPromptBatch


class OurLM(PersonalizedLM):
    """A `PersonalizedLM` that reads a sample's profile, with the input as instruction."""

    def __init__(self, llm, tokenizer, encoder: UserEncoder, recipe: LampRecipe, *, without_history: bool = False):
        """`without_history` empties every profile: a learned prompt that knows the inputs but no user."""
        injection = recipe.injection
        super().__init__(
            llm, tokenizer, encoder, injection=injection.kind, cross_every=injection.every, domain=recipe.name
        )
        self.recipe, self.without_history = recipe, without_history

    @property
    def soft(self) -> int:
        """K."""
        return self.encoder.config.tokens

    def condition(self, samples: Sequence[Sample]) -> dict:
        """Events, instructions and owners; a profile that several samples share is encoded once."""
        profiles = {id(sample.profile): sample.profile for sample in samples}
        place = {key: i for i, key in enumerate(profiles)}
        return {
            "events": self.encoder.batch([self._seen(profile) for profile in profiles.values()]),
            "instructions": [self._instruction(sample) for sample in samples],
            "owner": torch.tensor([place[id(sample.profile)] for sample in samples], device=self.encoder.device),
        }

    def rows(self, samples: Sequence[Sample]) -> torch.Tensor:
        """`[B, K, llm_width]`."""
        states = self.encoder.read([self._seen(sample.profile) for sample in samples])
        return self.soft_rows(states, [self._instruction(sample) for sample in samples])

    def _instruction(self, sample: Sample) -> str:
        return sample.input if self.recipe.instruction else ""

    def _seen(self, profile: History) -> History:
        if self.without_history:
            return History(profile.user)
        if self.recipe.labels:
            return profile
        return profile.of(map(TASKS[self.recipe.task].unlabelled, profile.events))


class PlainLM(SoftPromptLM):
    """The LLM alone, or with a LoRA that is trained."""

    soft = 0

    def condition(self, samples: Sequence[Sample]) -> dict:
        """Nothing."""
        return {}

    def rows(self, samples: Sequence[Sample]) -> None:
        """None."""

    def forward(self, batch: SoftPromptBatch) -> dict[str, torch.Tensor]:
        """The answer loss and logits; see `SoftPromptLM.answer_loss`."""
        return self.answer_loss(None, batch)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the LoRA to `folder`/lora."""
        self.llm.save_pretrained(Path(folder) / "lora")

    def load_trained(self, folder: Path) -> None:
        """Takes back what `save_pretrained` wrote."""
        self.load_lora(folder / "lora")


def other_people(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions, each with the profile of the next user who asks one: the shuffled-user control.

    Users without a profile are passed over, and those whose profile holds the event asked about, as a co-author's may.
    Raises `PersonaError` where nobody is left.
    """
    profiles = {sample.profile.user: sample.profile for sample in reversed(samples)}  # of each user's first question
    users = list(dict.fromkeys(sample.profile.user for sample in samples))
    place = {user: i for i, user in enumerate(users)}
    ids = {user: {event.event_id for event in profile.events} for user, profile in profiles.items()}
    shuffled = []
    for sample in samples:
        at = place[sample.profile.user]
        others = [*users[at + 1 :], *users[:at]]
        target = sample.target.event_id if sample.target else None
        other = next((user for user in others if ids[user] and (target is None or target not in ids[user])), None)
        if other is None:
            raise PersonaError(f"there is no other user whose profile question {sample.id!r} could be asked with")
        shuffled.append(replace(sample, profile=profiles[other]))
    return shuffled
