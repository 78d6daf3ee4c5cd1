"""The rows of LaMP's table as data: what text, which model, whose profile, and what of the recipe is changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from persona.errors import PersonaError
from persona.evaluation.lamp.tasks import Task


@dataclass(frozen=True)
class Method:
    """One row."""

    model: Literal["llm", "ours", "pplug", "lora", "user_lora"] = "llm"
    """What answers: the frozen LLM, or it with our user tokens, PPlug's rows, a task's LoRA, a user's LoRA."""
    retriever: Literal["bm25", "dense", "recency", "random"] | None = None
    """Who chooses the profile items that stand in the prompt as text."""
    items: int = 0
    """How many."""
    trained: str | None = None
    """The method whose weights are used; None for weights of its own."""
    profile: Literal["own", "none", "other"] = "own"
    """Whose profile the model reads: the user's, nobody's (the learned prompt), or another user's."""
    tokens: int | None = None
    """Our first so many user tokens; None takes all."""
    changes: tuple[str, ...] = ()
    """Fields of the recipe that differ, as `load_config` takes them."""
    ablation: bool = False
    """Whether the row explains others: it takes something away, or retrieves by chance."""


CROSS = ("injection.kind=cross_attention",)
"""Our user tokens as a memory beside the prompt, with controls of their own."""

METHODS: dict[str, Method] = {
    "no_history": Method(),
    **{
        f"{retriever}_k{items}": Method(retriever=retriever, items=items)
        for retriever in ("bm25", "dense", "recency")
        for items in (1, 4, 16)
    },
    "learned_prompt": Method("ours", profile="none"),
    "shuffled_user": Method("ours", trained="ours", profile="other"),
    "pplug": Method("pplug"),
    "ours": Method("ours"),
    "learned_prompt_cross": Method("ours", profile="none", changes=CROSS),
    "shuffled_user_cross": Method("ours", trained="ours_cross", profile="other", changes=CROSS),
    "ours_cross": Method("ours", changes=CROSS),
    "ours_bm25_k1": Method("ours", "bm25", 1),
    "lora": Method("lora"),
    "lora_bm25_k4": Method("lora", "bm25", 4),
    "user_lora": Method("user_lora", trained="lora"),
    "random_k4": Method(retriever="random", items=4, ablation=True),
    # What helped: each takes one thing away, or adds it to PPlug.
    "ours_k1": Method("ours", trained="ours", tokens=1, ablation=True),
    "ours_k2": Method("ours", trained="ours", tokens=2, ablation=True),
    "ours_k4": Method("ours", trained="ours", tokens=4, ablation=True),
    "ours_cross_k1": Method("ours", trained="ours_cross", tokens=1, changes=CROSS, ablation=True),
    "ours_k16": Method("ours", changes=("encoder.tokens=16",), ablation=True),
    "ours_cross_no_instruction": Method("ours", changes=(*CROSS, "instruction=false"), ablation=True),
    "ours_cross_no_labels": Method("ours", changes=(*CROSS, "labels=false"), ablation=True),
    "ours_cross_set": Method("ours", changes=(*CROSS, "encoder.backbone=set"), ablation=True),
    "ours_no_instruction": Method("ours", changes=("instruction=false",), ablation=True),
    "ours_no_labels": Method("ours", changes=("labels=false",), ablation=True),
    "ours_set": Method("ours", changes=("encoder.backbone=set",), ablation=True),
    "ours_gru4rec": Method("ours", changes=("encoder.backbone=gru4rec",), ablation=True),
    "pplug_no_labels": Method("pplug", changes=("labels=false",), ablation=True),
    "pplug_unscaled": Method("pplug", changes=("pplug.scaled=false",), ablation=True),
    "pplug_sharp": Method("pplug", changes=("pplug.temperature=0.05",), ablation=True),
    "pplug_frozen_input": Method("pplug", changes=("pplug.trained_input=false",), ablation=True),
}
MAIN = tuple(name for name, method in METHODS.items() if not method.ablation)
"""The rows of the table; the others explain it."""


def check_methods(methods: Iterable[str], task: Task) -> None:
    """Raises `PersonaError` for a method that a task cannot have."""
    if task.splice_after and (wrong := [name for name in methods if METHODS[name].model == "user_lora"]):
        raise PersonaError(f"{wrong[0]}: an item of {task.name} does not say what its question and answer are")


def read_methods(names: list[str]) -> dict[str, Method]:
    """Methods by name, in the order of `METHODS`; "main" and "all" stand for several. Raises `PersonaError`."""
    wanted: set[str] = set()
    for name in names:
        if name not in METHODS and name not in ("main", "all"):
            raise PersonaError(f"there is no method {name!r}; there are main, all, {', '.join(METHODS)}")
        wanted |= {"main": set(MAIN), "all": set(METHODS)}.get(name, {name})
    return {name: method for name, method in METHODS.items() if name in wanted}
