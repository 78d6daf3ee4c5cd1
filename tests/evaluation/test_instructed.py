"""Right, empty and wrong instructions, noise, and the three ways to read an embedding."""

import numpy as np
import pytest

from persona.evaluation.instructed import KINDS, Instructed, mean_text
from persona.history import Event, History


@pytest.fixture(scope="module")
def asked(domain):
    return Instructed(domain, probe_users=40)


def test_what_the_encoder_is_told(asked, domain):
    questions = domain.recipe.questions
    assert asked.tasks == asked.probed == ["favourite_category", "recent_category"]
    one = next(a for a in asked.sample.asked if a.question.task == "favourite_category")
    told = {kind: asked.instruction(one, kind) for kind in KINDS}
    assert told == {
        "right": questions["favourite_category"].prompt,
        "empty": "",
        "wrong": questions["recent_category"].prompt,
    }


def test_every_way_gives_accuracies_of_users(asked, model):
    states = model.encoder.read(asked.histories())
    users = len(asked.sample.users)
    for kind in KINDS:
        tokens = asked.tokens(model.encoder, states, kind)
        for found in (asked.by_llm(model, tokens), asked.by_similarity(model.encoder, tokens[:, :2], dim=8)):
            assert found.shape == (users, 2) and 0 <= np.nanmin(found) <= np.nanmax(found) <= 1
    known = model.encoder.read([cut.history for cut in asked.training.cuts])
    train = asked.probe_inputs(asked.tokens(model.encoder, known, "right", training=True), training=True)
    test = asked.probe_inputs(asked.tokens(model.encoder, states, "right"))
    assert [len(x) for x in train] == [sum(a.question.task == t for a in asked.training.asked) for t in asked.probed]
    once, twice = asked.by_probe(train, test), asked.by_probe(train, test, test)
    assert len(once) == 1 and len(twice) == 2
    for accuracy, scores in (*once, *twice):
        assert np.allclose(accuracy, once[0][0], equal_nan=True) and scores == once[0][1]
        assert all(0 <= v <= 1 for task in scores.values() for v in task.values())


def test_the_empty_instruction_says_one_thing_of_a_user(asked, model):
    states = model.encoder.read(asked.histories())
    by_task = asked.probe_inputs(asked.tokens(model.encoder, states, "empty"))
    cuts = [[a.cut for a in asked.sample.asked if a.question.task == task] for task in asked.probed]
    shared = sorted(set(cuts[0]) & set(cuts[1]))
    assert shared and all(
        np.allclose(by_task[0][cuts[0].index(c)], by_task[1][cuts[1].index(c)], atol=1e-5) for c in shared
    )


def test_tokens_are_those_of_each_question_and_some_tasks_can_be_asked_alone(asked, model):
    states = model.encoder.read(asked.histories())
    tokens = asked.tokens(model.encoder, states, "right")
    questions = [a for a in asked.sample.asked if a.question.task in asked.tasks]
    for place in (0, len(questions) // 2, -1):
        one = questions[place]
        (made,) = model.encoder.tokens([states[one.cut]], [one.question.prompt])
        assert np.allclose(tokens[place], made.tokens, atol=1e-5)
    some = asked.only(["recent_category"])
    own = some.by_llm(model, some.tokens(model.encoder, states, "right"))
    assert some.tasks == some.probed == ["recent_category"] and asked.tasks != some.tasks
    assert np.allclose(own[:, 0], asked.by_llm(model, tokens)[:, 1], equal_nan=True)


def test_controls(asked, model):
    chance, common = asked.commonest(chance=True), asked.commonest()
    assert np.allclose(chance[~np.isnan(chance)], 1 / 8)
    assert set(np.unique(common[~np.isnan(common)])) <= {0, 0.25, 0.5, 0.75, 1, 1 / 3, 2 / 3}
    texts = asked.mean_texts(model.encoder.text_encoder, [c.history for c in asked.sample.cuts], asked.sample)
    assert [x.shape[1] for x in texts] == [model.encoder.text_encoder.dim] * 2
    assert asked.text_in_prompt(model, [""] * len(asked.sample.cuts)).shape == chance.shape
    assert asked.about({"purchase"}) == asked.tasks and asked.about({"search"}) == []


def test_mean_texts(text_encoder):
    events = (
        Event("search", 1.0, text="roses"),
        Event("buy", 2.0, item_id="7"),
        Event("profile", attributes={"city": "Oslo", "age": None}),
    )
    vectors = text_encoder.vectors(["city: Oslo", "roses"]).mean(0)
    found = mean_text(text_encoder, History("u", events))
    assert np.allclose(found, vectors / vectors.norm(), atol=1e-6)
    assert not mean_text(text_encoder, History("u")).any()
