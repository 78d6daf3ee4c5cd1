"""OPPU (Tan et al. 2024, arXiv 2402.04401): the task's LoRA is merged into the LLM, then each user gets a LoRA.

A user's LoRA learns from that user's own profile alone and begins anew for each user; the published code goes on
from the user before, which leaks across users.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from transformers import set_seed

from persona.errors import PersonaError
from persona.evaluation.lamp.models import PlainLM
from persona.evaluation.lamp.recipe import LampRecipe
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS
from persona.evaluation.lamp.training import Write

TARGETS = ("q_proj", "v_proj")


class UserLora:
    """Answers with one LoRA for each user, on a `PlainLM` with the task's LoRA, which is merged and so used up."""

    def __init__(self, model: PlainLM, recipe: LampRecipe, write: Write):
        if TASKS[recipe.task].splice_after:
            raise PersonaError(f"user_lora: an item of {recipe.task} does not say what its question and answer are")
        model.llm = model.llm.merge_and_unload().requires_grad_(False)
        model.add_lora(recipe.lora.rank, TARGETS)
        self.model, self.recipe, self.write = model, recipe, write
        self.task = TASKS[recipe.task]
        self.fresh = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def answers(self, samples: Sequence[Sample]) -> dict:
        """`{"answers", "tokens", "seconds"}`; seconds are per question, with the user's training in them."""
        by_user: dict[str, list[Sample]] = {}
        for sample in samples:
            by_user.setdefault(sample.profile.user, []).append(sample)
        answers: dict[str, str] = {}
        tokens, start = 0, time.perf_counter()
        for own in by_user.values():
            self.learn(min(own, key=_newest))
            prompts = [self.model.template.prompt(self.write(sample)) for sample in own]
            tokens += sum(len(prompt.ids) for prompt in prompts)
            made = self.model.eval().complete(prompts, None, max_new_tokens=self.recipe.new_tokens)
            answers |= dict(zip((sample.id for sample in own), made))
        seconds = (time.perf_counter() - start) / len(samples)
        ordered = {sample.id: answers[sample.id] for sample in samples}
        return {"answers": ordered, "tokens": round(tokens / len(samples), 1), "seconds": round(seconds, 4)}

    def learn(self, sample: Sample) -> None:
        """Begins anew and learns the items of a sample's profile; of a user's samples, the first one asked."""
        model, config = self.model, self.recipe.lora
        trained = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.fresh.items():
                trained[name].copy_(value)
        own = [trained[name] for name in self.fresh]
        optimizer = torch.optim.AdamW(own, lr=config.learning_rate)
        items = sample.profile.events[-config.user_items :]
        set_seed(self.recipe.training.seed)
        model.train()
        for _ in range(config.user_epochs):
            order = torch.randperm(len(items)).tolist()
            for first in range(0, len(items), config.user_batch):
                part = [items[i] for i in order[first : first + config.user_batch]]
                prompts = [self._prompt(sample, item) for item in part]
                outs = [model.template.answer("?", item.attributes[self.task.label]) for item in part]
                model(model.collate(prompts, outs))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()

    def _prompt(self, sample: Sample, item):
        text = self.task.input.format_map(item.attributes)
        return self.model.template.prompt(self.write(Sample(item.event_id, text, sample.profile)))


def _newest(sample: Sample) -> float:
    """When the newest item of a profile happened; later profiles may hold what earlier questions ask about."""
    return sample.profile.events[-1].timestamp if sample.profile.events else -math.inf
