"""`persona demo`: the main job on a generated shop, in one command."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from persona.demo.shop import generate_shop
from persona.evaluation.report import terminal_table
from persona.evaluation.runner import run_table
from persona.history.render import render_history
from persona.injection import PersonalizedLM
from persona.serving import Persona
from persona.store import EventStore
from persona.training.recipe import Domain, load_recipe

FRESH_SHOP = {"users": 400, "seed": 1}
"""Users that the committed adapter, trained on seed 0 by `make demo-weights`, has never seen."""


def run_demo(adapter: Path, *, question: str, engine: str, say: Callable[[str], None]) -> None:
    """Prints three histories, everybody's answers side by side, and the small table. Writes to a temporary folder."""
    recipe = load_recipe(adapter / "recipe.yaml")
    with tempfile.TemporaryDirectory() as folder:
        say("1/4 drawing a shop that nobody was trained on: purchases, visits, pages, apps, searches, profiles")
        generate_shop(folder, **FRESH_SHOP)
        domain = Domain(recipe, folder)
        say(f"    {domain.report}")
        say(f"2/4 starting the LLM in {engine} with soft prompts (a minute on two cores)")
        store = EventStore(f"sqlite:///{folder}/persona.db")
        persona = Persona.from_pretrained(adapter / "weights", store=store, engine=engine)
        users = domain.test[:3]
        for user in users:
            persona.observe(user, domain.histories[user].events)
        for user in users:
            history = persona.store.history(user)
            newest = render_history(history.of(history.events[:1] + history.events[-8:]), recipe.sources)
            print(f"\n{user}: {len(history)} events, the profile and the newest eight of them")
            print("\n".join(f"    {line}" for line in newest.split("\n")))
        say("\n3/4 the same questions for each of them and for nobody")
        _side_by_side(persona, users, [question] if question else _questions(domain))
        store.close()
        say(f"\n4/4 the same, measured on {len(domain.test)} users, with the controls")
        model, control = (PersonalizedLM.from_pretrained(adapter / name) for name in ("weights", "control"))
        result = run_table(domain, model, control, cost=False, progress=lambda line: say(f"    {line}"))
        print(f"\n{terminal_table(result)}")


def _questions(domain: Domain) -> list[str]:
    """One question of each kind; where it needs an item, the two most popular ones."""
    questions = []
    for spec in domain.recipe.questions.values():
        items = domain.catalogue.items.get(spec.source, {}).values()
        popular = sorted(items, key=lambda item: (-item.count, item.item_id))[:2]
        questions += (
            [spec.prompt.format(item=item.text) for item in popular] if "{item}" in spec.prompt else [spec.prompt]
        )
    return questions


def _side_by_side(persona: Persona, users: list[str], questions: list[str]) -> None:
    people: list[str | None] = [*users, None]
    width = max(len(q) for q in questions) + 2
    print(f"\n{'':{width}}" + "".join(f"{user or 'nobody':>14}" for user in people))
    for question in questions:
        answers = persona.generate_batch([(user, question) for user in people], max_new_tokens=8)
        print(f"{question:{width}}" + "".join(f"{answer.text:>14}" for answer in answers))
    tokens = persona.model.adapter.tokens
    print(f"{'':{width}}" + "".join(f"{f'{tokens} soft tokens' if u else 'plain':>14}" for u in people))
