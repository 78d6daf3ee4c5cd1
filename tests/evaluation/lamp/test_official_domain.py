"""LaMP's own files as a domain: which questions train, validate and test, and what a draw shows of them."""

from dataclasses import replace

import numpy as np
import pytest

from persona.errors import DataError
from persona.evaluation.lamp.domain import PROFILE
from persona.evaluation.lamp.files import read_predictions, read_samples
from persona.evaluation.lamp.floors import floor_answers
from persona.evaluation.lamp.official import OfficialDomain, open_domain
from persona.evaluation.lamp.recipe import LampRecipe, LampSplit
from persona.evaluation.lamp.tasks import TASKS
from persona.training.configs import TrainingConfig

SPLITS = ("user", "time")


def make_recipe(task="LaMP_5", split="user", *, drop=0.5, **more):
    return LampRecipe(
        name="official",
        task=task,
        official=split,
        split=LampSplit(**{"train": 0.1, "validation": 0.34, **more}),
        training=TrainingConfig(drop_events=drop, short_share=0.0),
    )


@pytest.fixture
def files(tmp_path, official, records):
    """`files(task, split)` writes train and dev, whose questions have other ids, and gives the folder."""

    def write(task, split):
        official(tmp_path, task, split, "dev")
        questions, golds = records(task, split)
        for record in [*questions, *golds]:
            record["id"] = f"7{record['id']}"
        official(tmp_path, task, split, "train", (questions, golds))
        return tmp_path

    return write


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", ["LaMP_2", "LaMP_3", "LaMP_5"])
def test_dev_is_the_test_and_a_part_of_train_validates(files, official, task, split):
    folder = files(task, split)
    domain = open_domain(make_recipe(task, split), folder)
    assert isinstance(domain, OfficialDomain) and domain.task is TASKS[task]
    dev = list(read_samples(*official(folder, task, split, "dev"), TASKS[task]))
    assert [(s.input, s.profile, s.output) for s in domain.test] == [(s.input, s.profile, s.output) for s in dev]
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (2, 1, 3)
    assert domain.samples("test") is domain.test and domain.samples("validation") is domain.validation
    assert not {sample.id for sample in domain.train} & {sample.id for sample in domain.validation}
    assert str(domain.report) == f"{task}: 3 train and 3 dev questions"
    assert all(event.source in domain.sources for sample in domain.test for event in sample.profile.events)


def test_questions_keep_their_official_ids(files, official):
    """Predictions in the official format are of use to nobody under other ids."""
    domain = OfficialDomain(make_recipe(), files("LaMP_5", "user"))
    _, outputs = official(files("LaMP_5", "user"), "LaMP_5", "user", "dev")
    assert {sample.id for sample in domain.test} == set(read_predictions(outputs, TASKS["LaMP_5"]))


@pytest.mark.parametrize("split", SPLITS)
def test_fingerprints_are_of_no_two_parts(files, split):
    domain = OfficialDomain(make_recipe(split=split), files("LaMP_5", split))
    train, validation, test = (domain.fingerprints(part) for part in ("train", "validation", "test"))
    assert [len(part) for part in (train, validation, test)] == [2, 1, 3]
    assert not train & validation and not train & test and not validation & test


def test_a_train_and_a_dev_question_of_one_id_are_two(tmp_path, official):
    for part in ("train", "dev"):
        official(tmp_path, "LaMP_5", "user", part)
    domain = OfficialDomain(make_recipe(), tmp_path)
    assert not domain.fingerprints("train") & domain.fingerprints("test")


def test_fingerprints_tell_tasks_apart(files):
    """Ids are local to a task: an LLM that learned one task has seen nothing of another."""
    films, papers = (OfficialDomain(make_recipe(task), files(task, "user")) for task in ("LaMP_2", "LaMP_5"))
    assert {s.id for s in films.train + films.validation} == {s.id for s in papers.train + papers.validation}
    assert not (films.fingerprints("train") | films.fingerprints("validation")) & papers.fingerprints("train")


@pytest.mark.parametrize("split", SPLITS)
def test_a_draw_is_a_training_question_with_some_of_its_profile(files, split):
    domain = OfficialDomain(make_recipe(split=split), files("LaMP_5", split))
    known = {(sample.input, sample.output): sample for sample in domain.train}
    rng, seen, sizes = np.random.default_rng(0), set(), set()
    for _ in range(200):
        drawn = domain.draw(rng, 9)
        (question,) = drawn.questions
        sample = known[question]
        own = [event.event_id for event in sample.profile.events]
        kept = [event.event_id for event in drawn.profile.events]
        assert kept == [id for id in own if id in kept] and drawn.profile.user == sample.profile.user
        seen.add(sample.id)
        sizes.add((len(own), len(kept)))
    assert seen == {sample.id for sample in domain.train}
    assert len({kept for _, kept in sizes}) > 2 and any(own == kept for own, kept in sizes)


def test_a_draw_leaves_an_item_and_shortens_profiles_as_in_a_domain_of_records(files, records, official):
    folder = files("LaMP_5", "user")
    questions, golds = records("LaMP_5", "user")
    for question in questions:
        question["profile"] = [{**question["profile"][0], "id": str(n)} for n in range(30)]
    official(folder, "LaMP_5", "user", "train", (questions, golds))
    recipe = make_recipe()
    dropped = OfficialDomain(replace(recipe, training=TrainingConfig(drop_events=1.0, short_share=0.0)), folder)
    short = OfficialDomain(replace(recipe, training=TrainingConfig(drop_events=0.0, short_share=1.0)), folder)
    rng = np.random.default_rng(0)
    assert min(len(dropped.draw(rng).profile) for _ in range(500)) > 0
    assert max(len(short.draw(rng).profile) for _ in range(100)) == 15


def test_draws_follow_the_seed_and_nothing_is_dropped_where_the_recipe_says_so(files):
    folder = files("LaMP_5", "user")
    domain = OfficialDomain(make_recipe(), folder)
    first, again = ([domain.draw(rng) for _ in range(20)] for rng in map(np.random.default_rng, (0, 0)))
    assert first == again
    whole = OfficialDomain(make_recipe(drop=0.0), folder)
    profiles = {sample.input: sample.profile for sample in whole.train}
    rng = np.random.default_rng(0)
    for drawn in (whole.draw(rng) for _ in range(40)):
        assert drawn.profile == profiles[drawn.questions[0][0]]
    assert list(whole.histories()) == [sample.profile for sample in whole.train]


def test_most_and_the_seed_choose(files):
    folder = files("LaMP_5", "user")
    few = OfficialDomain(make_recipe(most=2, validation=0.67), folder)
    assert (len(few.train), len(few.validation), len(few.test)) == (1, 2, 2)
    every = OfficialDomain(make_recipe(), folder)
    assert [sample for sample in every.test if sample in few.test] == few.test
    same = OfficialDomain(make_recipe(), folder)
    assert same.validation == every.validation and same.train == every.train
    others = {OfficialDomain(make_recipe(seed=seed), folder).validation[0].id for seed in range(6)}
    assert len(others) > 1


def test_profiles_are_whole_for_retrieval(files, official, records):
    folder = files("LaMP_5", "time")
    questions, golds = records("LaMP_5", "time")
    item = questions[0]["profile"][0]
    questions[0]["profile"] = [{**item, "id": str(n), "date": str(1400 + n)} for n in range(PROFILE + 3)]
    official(folder, "LaMP_5", "time", "dev", (questions, golds))
    profile = OfficialDomain(make_recipe(split="time"), folder).test[0].profile
    assert [event.event_id for event in profile.events] == [str(n) for n in range(PROFILE + 3)]


def test_the_test_part_is_asked_where_its_outputs_are(files, official):
    folder = files("LaMP_5", "time")
    official(folder, "LaMP_5", "time", "test")
    domain = OfficialDomain(make_recipe(split="time"), folder)
    assert domain.asked == "test" and "3 train and 3 test questions" in domain.report
    (folder / "time" / "LaMP_5" / "test" / "test_outputs.json").unlink()
    assert OfficialDomain(make_recipe(split="time"), folder).asked == "dev"


def test_an_official_recipe_needs_no_share_of_training_users():
    assert LampRecipe(name="o", task="LaMP_5", official="user", split=LampSplit(validation=0.2)).split.validation == 0.2


def test_too_few_questions_and_missing_files_are_errors(files):
    folder = files("LaMP_5", "user")
    with pytest.raises(DataError, match="LaMP_5: 3 train and 3 dev questions: too few to train, validate and test"):
        OfficialDomain(make_recipe(validation=0.1), folder)
    with pytest.raises(DataError, match=r"time.*train_outputs\.json: cannot be read"):
        OfficialDomain(make_recipe(split="time"), folder)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_floors(files, task):
    domain = OfficialDomain(make_recipe(task, "time"), files(task, "time"))
    found = floor_answers(domain, domain.test)
    kind = domain.task.kind
    assert {"newest_own", "first_words"} <= set(found) if kind == "generation" else "majority" in found
    for answers in found.values():
        assert set(answers) == {sample.id for sample in domain.test}
        if domain.task.labels:
            assert set(answers.values()) <= set(domain.task.labels)
