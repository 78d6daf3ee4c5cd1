"""Questions find their sub-task, in the official order."""

import pytest

from persona.errors import DataError
from persona.evaluation.uqa.tasks import DIMENSIONS, SUB_TASKS, route


def test_there_is_one_question_of_each_sub_task(questions):
    assert [route(q) for q in questions] == list(SUB_TASKS)
    assert [task.abbreviation for task in SUB_TASKS] == ["df", "mf", "ip", "ap", "li", "si", "it"]


@pytest.mark.parametrize("task, part", [(task, part) for task in SUB_TASKS for part in task.routes])
def test_each_wording_is_taken(task, part):
    assert route(f"请回答：{part}\nA. 手机\nB. 书") is task


def test_the_first_of_two_wordings_counts():
    both = "用户下一个可能点击的商品的标题是什么"
    assert SUB_TASKS[3].routes[0] in both and route(both).name == "next_item"
    assert route("用户近期最感兴趣的，长度是多少？").name == "match_feature"


def test_dimensions_hold_every_sub_task_once():
    assert DIMENSIONS == {
        "sequence understanding": ("direct_feature", "match_feature"),
        "action prediction": ("next_item", "next_attribute"),
        "interest perception": ("long_term_interest", "short_term_interest", "interest_trajectory"),
    }


@pytest.mark.parametrize("question", ["", "Which film will this user watch next?", "次(从1开始计数)浏览的"])
def test_other_questions_are_refused(question):
    with pytest.raises(DataError, match="no sub-task of UQABench asks"):
        route(question)


def test_a_refused_question_is_quoted_up_to_60_characters():
    with pytest.raises(DataError) as error:
        route("问" * 60 + "答")
    assert "问" * 60 in str(error.value) and "答" not in str(error.value)
