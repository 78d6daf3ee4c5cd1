"""LoRA for a task, saved and read back, and LoRA for a user, which each user's own items train anew."""

import numpy as np
import pytest
import torch

from persona.errors import PersonaError
from persona.evaluation.lamp.models import PlainLM
from persona.evaluation.lamp.recipe import LampRecipe, LoraConfig
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS
from persona.evaluation.lamp.training import Collate
from persona.evaluation.lamp.user_lora import UserLora
from persona.history import Event, History
from persona.injection import load_llm

from .films import ANN, FILMS, SAMPLES, TASK, ask, make_item, make_recipe, train_a_step, write


@pytest.fixture
def plain(llm_path):
    """`plain(seed)` is the tiny LLM with a LoRA for the task that is not zero."""

    def make(rank=4, seed=0):
        model = PlainLM(*load_llm(llm_path))
        torch.manual_seed(seed)
        model.add_lora(rank)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        return model.eval()

    return make


# --- LoRA for the task ----------------------------------------------------------------------------------------------


def test_a_lora_alone_is_trained_saved_and_read_back(plain, tmp_path):
    model = plain()
    assert model.condition(SAMPLES) == {} and model.rows(SAMPLES) is None and model.soft == 0
    moved = train_a_step(model)
    assert moved and all("lora_" in name for name in moved)
    model.save_pretrained(tmp_path)
    other, given = plain(seed=5), Collate(model, write)([SAMPLES])
    with torch.no_grad():
        assert not torch.allclose(other(**given)["logits"], model(**given)["logits"], atol=1e-3)
        other.load_trained(tmp_path)
        assert torch.allclose(other(**given)["logits"], model(**given)["logits"], atol=1e-6)


# --- LoRA for a user ------------------------------------------------------------------------------------------------


def user_lora(plain, written=write, **fields):
    lora = LoraConfig(**{"rank": 4, "learning_rate": 3e-2, "user_epochs": 4, "user_batch": 2, **fields})
    return UserLora(plain(), make_recipe(lora=lora), written)


@torch.no_grad()
def loss_of(answerer, samples):
    return float(answerer.model(**Collate(answerer.model, write)([samples]))["loss"])


def lora_weights(answerer):
    return {name: p.detach().clone() for name, p in answerer.model.named_parameters() if p.requires_grad}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_tasks_lora_is_merged_and_only_the_users_learns(plain):
    model, given = plain(), Collate(plain(), write)([SAMPLES])
    with torch.no_grad():
        expected = model(**given)["logits"]
        answerer = user_lora(plain)
        assert torch.allclose(answerer.model(**given)["logits"], expected, atol=1e-4)
    before = {name: value.clone() for name, value in answerer.model.state_dict().items()}
    answerer.learn(SAMPLES[0])
    moved = {name for name, value in answerer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in moved)


def test_learning_makes_the_users_own_answers_likely(plain):
    own = [
        Sample(event.event_id, TASK.input.format_map(event.attributes), History("ann"), event.attributes["score"])
        for event in ANN.events
    ]
    answerer = user_lora(plain)
    before = loss_of(answerer, own)
    answerer.learn(SAMPLES[0])
    assert loss_of(answerer, own) < before - 0.5
    only_last = user_lora(plain, user_items=1, user_epochs=8)
    only_last.learn(SAMPLES[0])
    assert loss_of(only_last, own[-1:]) < loss_of(user_lora(plain), own[-1:]) - 0.5


def test_each_user_begins_anew(plain):
    answerer = user_lora(plain)
    both = answerer.answers(SAMPLES)["answers"]
    alone = user_lora(plain)
    assert alone.answers(SAMPLES[1:2])["answers"] == {SAMPLES[1].id: both[SAMPLES[1].id]}
    answerer.learn(SAMPLES[0])
    after_ann = lora_weights(answerer)
    answerer.learn(SAMPLES[1])
    alone.learn(SAMPLES[1])
    assert same(lora_weights(answerer), lora_weights(alone)) and not same(lora_weights(answerer), after_ann)
    answerer.learn(SAMPLES[3])  # who has no items
    assert same(lora_weights(answerer), lora_weights(user_lora(plain)))


def test_answers_come_in_order_with_their_cost(plain):
    found = user_lora(plain, user_epochs=1).answers(SAMPLES)
    assert list(found["answers"]) == [sample.id for sample in SAMPLES]
    assert found["seconds"] > 0
    template = plain().template
    assert found["tokens"] == round(np.mean([len(template.prompt(s.input).ids) for s in SAMPLES]), 1)


def test_a_user_learns_from_the_profile_of_the_first_question(plain):
    """Later profiles hold what the earlier questions ask about; capped, all of them are of one length."""
    events = [make_item(place, 1 + place % 5, user="ann") for place in range(6)]
    early, late = (ask(History("ann", tuple(events[n : n + 4])), FILMS[n + 4], id=f"{n}") for n in (0, 1))
    expected = user_lora(plain, user_epochs=1)
    expected.learn(early)
    for order in ([early, late], [late, early]):
        answerer = user_lora(plain, user_epochs=1)
        answerer.answers(order)
        assert same(lora_weights(answerer), lora_weights(expected))


def test_a_task_whose_items_are_not_of_the_form_of_its_questions_is_refused(plain):
    items = (Event("profile", 0.0, "Bees", attributes={"title": "Bees", "abstract": "We count bees."}, event_id="0"),)
    text = TASKS["LaMP_1"].input.format(title="Ants", first="Bees", second="Trees")
    with pytest.raises(PersonaError, match="LaMP_1"):
        UserLora(plain(), LampRecipe("x", "LaMP_1", official="user"), write).answers(
            [Sample("1", text, History("ann", items), "[1]")]
        )
