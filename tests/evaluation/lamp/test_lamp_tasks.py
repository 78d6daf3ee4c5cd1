"""What an input asks about, and what retrieval reads of an item, task by task."""

import pytest

from persona.errors import DataError
from persona.evaluation.lamp.tasks import TASKS, read_task
from persona.history import Event

LAMP_1 = (
    'For an author who has written the paper with the title "On "title" wars", which reference is related? '
    "Just answer with [1] or [2] without explanation. "
)
ASKED = {
    "LaMP_2": (TASKS["LaMP_2"].input.format(description="A description: two friends."), "A description: two friends."),
    "LaMP_2N": (TASKS["LaMP_2N"].input.format(text="An article: short."), "An article: short."),
    "LaMP_3": (TASKS["LaMP_3"].input.format(text="My review: good.\nVery."), "My review: good.\nVery."),
    "LaMP_4": ("Generate a headline for the following article: Rain: more of it.", "Rain: more of it."),
    "LaMP_5": (
        "Generate a title for the following abstract of a paper: This paper: a proof.",
        "This paper: a proof.",
    ),
    "LaMP_6": ("Generate a subject for the following email: Hi: see you.", "Hi: see you."),
    "LaMP_7": (
        "Paraphrase the following tweet without any explanation before or after it: so: tired http://t.co/x",
        "so: tired http://t.co/x",
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_query_is_all_that_follows_the_instruction(name):
    text, query = ASKED[name]
    assert TASKS[name].query(text) == query


def test_lamp_1_asks_about_both_references():
    assert TASKS["LaMP_1"].query(f'{LAMP_1}[1]: "Deep nets" [2]: "Sparse trees"') == "Deep nets Sparse trees"


def test_quotes_inside_references_are_kept():
    first, second = 'The "curse" of width', '"Attention" is "all"'
    assert TASKS["LaMP_1"].query(f'{LAMP_1}[1]: "{first}" [2]: "{second}"') == f"{first} {second}"


def test_an_input_without_its_instruction_is_all_query():
    """LaMP_2, dev, id 110."""
    text = "A weary detective hunts a poet: one of them is dreaming."
    assert TASKS["LaMP_2"].query(text) == text


def test_the_inputs_of_the_benchmark():
    inputs = {name: task.input for name, task in TASKS.items()}
    assert inputs["LaMP_1"].format(title="T", first="A", second="B") == (
        'For an author who has written the paper with the title "T", which reference is related? Just answer with [1] '
        'or [2] without explanation. [1]: "A" [2]: "B"'
    )
    assert inputs["LaMP_2"].format(description="D") == (
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
        "explanation. tags: [sci-fi, based on a book, comedy, action, twist ending, dystopia, dark comedy, classic, "
        "psychology, fantasy, romance, thought-provoking, social commentary, violence, true story] description: D"
    )
    assert inputs["LaMP_2N"].format(text="A") == (
        "Which category does this article relate to among the following categories? Just answer with the category name "
        "without further explanation. categories: [women, religion, politics, style & beauty, entertainment, culture & "
        "arts, sports, science & technology, travel, business, crime, education, healthy living, parents, food & "
        "drink] article: A"
    )
    assert inputs["LaMP_3"].format(text="R") == (
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
        "further explanation. review: R"
    )


@pytest.mark.parametrize(
    ("name", "read"),
    {
        "LaMP_1": "T A",
        "LaMP_2": "D",
        "LaMP_2N": "X",
        "LaMP_3": "X",
        "LaMP_4": "T X",
        "LaMP_5": "T A",
        "LaMP_6": "X",
        "LaMP_7": "X",
    }.items(),
)
def test_what_retrieval_reads(name, read):
    values = {"title": "T", "abstract": "A", "description": "D", "text": "X", "tag": "comedy", "category": "c"}
    item = Event("lamp", attributes={**values, "score": "5"})
    assert TASKS[name].describe(item) == read


def test_tasks_are_found_by_short_names():
    assert read_task("5") is read_task("LaMP_5") is TASKS["LaMP_5"]
    assert read_task("2n") is TASKS["LaMP_2N"]
    with pytest.raises(DataError, match="no LaMP task '8'; the tasks are LaMP_1"):
        read_task("8")
