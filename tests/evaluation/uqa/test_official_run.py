"""Official questions asked of a real adapter, against answers got one by one."""

import json
from collections import Counter

import numpy as np
import pytest
from typer.testing import CliRunner

from persona.cli import app
from persona.errors import DataError, PersonaError
from persona.evaluation.uqa.official import OfficialFile, to_history
from persona.evaluation.uqa.official_run import evaluate_official, strangers
from persona.evaluation.uqa.tasks import SUB_TASKS, route
from persona.injection import PersonalizedLM, load_llm


def decode(ids):
    """A title for token ids."""
    return f"title {ids[0]}"


def quiet(message):
    """Takes progress."""


def one_by_one(model, file, owners, **options):
    """The token that follows each question of `file`, where the LLM reads the clicks of row `owner`, or of nobody.

    By Hugging Face's `generate`, one question at a time, and not stripped.
    """
    answers = []
    for row, owner in zip(file, owners):
        states = None if owner is None else model.encoder.read([to_history(file[owner], "user", **options)])
        rows = None if owner is None else model.soft_rows(states, [row.question])[0]
        batch = model.collate([model.template.prompt(row.question, 0 if rows is None else len(rows))])
        embeds = model.embed(rows, batch)
        token = model.llm.generate(
            inputs_embeds=embeds, attention_mask=batch.attention_mask, max_new_tokens=1, do_sample=False
        )
        answers += model.template.tokenizer.batch_decode(token, skip_special_tokens=True)
    return answers


@pytest.fixture
def file(model, write, make_row, questions):
    """Questions whose gold answers are the model's own, where it has one."""
    asked = [questions[1], *questions, questions[1], questions[1], questions[1]]
    rows = [make_row(range(3 * n, 5 * n), question) for n, question in enumerate(asked)]
    own = one_by_one(model, (plain := OfficialFile(write(rows))), range(len(plain)), decode=decode)
    return OfficialFile(
        write([make_row(range(3 * n, 5 * n), q, gold or "nothing") for n, (q, gold) in enumerate(zip(asked, own))])
    )


@pytest.mark.parametrize("batch", [4, 32])
def test_answers_are_those_got_one_by_one(model, file, batch):
    result = evaluate_official(model, file, batch=batch, decode=decode, seed=5, progress=quiet)
    other, right = strangers(range(len(file)), 5), {}
    for name, owners in {"ours": range(len(file)), "shuffled_user": other, "no_history": [None] * len(file)}.items():
        answers = one_by_one(model, file, owners, decode=decode)
        hits = [answer.startswith(row.answer) for row, answer in zip(file, answers)]
        right[name] = result[name]["overall"]["accuracy"]
        assert right[name] == round(100 * np.mean(hits), 2)
        lengths = [hit for row, hit in zip(file, hits) if route(row.question).name == "match_feature"]
        assert result[name]["sub_tasks"]["match_feature"]["accuracy"] == round(100 * np.mean(lengths), 2)
    assert right["ours"] > right["shuffled_user"] > 0 and right["ours"] > right["no_history"]


def test_sub_tasks_say_how_many_questions_they_had(model, write, rows):
    result = evaluate_official(model, OfficialFile(write(rows[:7])), limit=99, progress=quiet)
    assert set(result) == {"ours", "shuffled_user", "no_history"}
    for part in result.values():
        assert {name: cell["n"] for name, cell in part["sub_tasks"].items()} == {t.name: 1 for t in SUB_TASKS}
        assert part["overall"]["n"] == 7


def test_a_limit_takes_the_first_questions_and_progress_is_told(model, write, rows):
    said = []
    result = evaluate_official(model, OfficialFile(write(rows)), limit=5, batch=2, progress=said.append)["ours"]
    assert result["overall"]["n"] == 5 and list(result["sub_tasks"]) == [task.name for task in SUB_TASKS[:5]]
    assert said == ["2 of 5 questions", "4 of 5 questions", "5 of 5 questions"]


def test_users_without_clicks_and_with_one_are_asked(model, write, make_row, questions):
    rows = [make_row(range(n), questions[0]) for n in (0, 1)]
    assert evaluate_official(model, OfficialFile(write(rows)), progress=quiet)["ours"]["overall"]["n"] == 2


def test_titles_reach_the_encoder(model, write, rows):
    told = []
    evaluate_official(model, OfficialFile(write(rows)), limit=2, decode=lambda i: told.append(i) or "t", progress=quiet)
    assert told == [[1, 0], [1, 0]]  # the one click of row 1, for itself and for row 0


def test_an_adapter_of_another_domain_is_refused(llm_path, encoder, write, rows):
    llm, tokenizer = load_llm(llm_path)
    shop = PersonalizedLM(llm, tokenizer, encoder).eval()
    with pytest.raises(PersonaError, match=r"knows no source 'click', only .*purchase"):
        evaluate_official(shop, OfficialFile(write(rows)), progress=quiet)


def wrong(make_row, case):
    """Rows that cannot be evaluated."""
    good, question = (
        [make_row([n], "用户近期最感兴趣的类目是什么？") for n in range(3)],
        "用户近期最感兴趣的类目是什么？",
    )
    return {
        "no questions": [make_row([1]), make_row([2])],
        "no rows": [],
        "one row": good[:1],
        "empty gold": [*good, make_row([9], question, "")],
        "no sub-task": [*good, make_row([9], "What next?")],
        "bad row": [*good, {**good[0], "text": "x"}],
        "one user": [*good, *[make_row([7], question)] * 4],
    }[case]


@pytest.mark.parametrize(
    "case, message",
    [
        ("no questions", "align_data_eval.arrow: has no questions"),
        ("no rows", "has no questions"),
        ("one row", "1 questions are too few"),
        ("empty gold", "gold answer of question 3"),
        ("no sub-task", "no sub-task of UQABench asks 'What next"),
        ("bad row", "row 3"),
        ("one user", "4 of 7 questions are of one user"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_asked(model, write, make_row, case, message):
    said = []
    with pytest.raises(DataError, match=message):
        evaluate_official(model, OfficialFile(write(wrong(make_row, case))), batch=1, progress=said.append)
    assert not said


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_of_nothing_is_refused(model, write, rows, limit):
    with pytest.raises(DataError, match="0 questions are too few"):
        evaluate_official(model, OfficialFile(write(rows)), limit=limit, progress=quiet)


@pytest.mark.parametrize("users", [[1, 2], [5, 5, 7, 7], [1, 1, 1, 2, 3, 4], [2, 9, 2, 9, 1, 3, 3], list(range(50))])
def test_strangers_are_a_derangement_of_users(users):
    for seed in range(20):
        given = strangers(users, seed)
        assert sorted(given) == list(range(len(users)))
        assert all(users[i] != users[g] for i, g in enumerate(given))
        assert given == strangers(users, seed)


def test_strangers_are_drawn_from_everybody():
    drawn = Counter(strangers(range(5), seed)[0] for seed in range(400))
    assert set(drawn) == {1, 2, 3, 4} and np.ptp(list(drawn.values())) < 60


def test_the_verb_asks_and_writes(model, file, tmp_path):
    folder, out = model.save_pretrained(tmp_path / "adapter"), tmp_path / "deep" / "official.json"
    run = CliRunner().invoke(
        app, ["bench", "official", str(folder), "--file", str(file.path), "--out", str(out), "--limit", "7"]
    )
    assert run.exit_code == 0, run.output
    result = json.loads(out.read_text())
    assert set(result["results"]) == {"ours", "shuffled_user", "no_history"} and result["seed"] == 0
    assert result["results"]["ours"]["overall"]["n"] == 7 and "shuffled_user" in run.output
