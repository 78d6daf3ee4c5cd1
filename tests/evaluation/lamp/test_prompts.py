"""Prompts against the benchmark's strings, and the budget of tokens."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from persona.errors import DataError
from persona.evaluation.lamp.prompts import profile_prompt
from persona.evaluation.lamp.tasks import TASKS
from persona.history import Event

DEMO = Path(__file__).parents[3] / "adapters" / "demo" / "lm"
WIDE = 10_000
CITE = (
    'For an author who has written the paper with the title "Titles", which reference is related? '
    'Just answer with [1] or [2] without explanation. [1]: "A title" [2]: "B"'
)
SHOWN = {
    "LaMP_1": (
        [{"title": "T1"}, {"title": "T2"}],
        CITE,
        'For an author who has written the paper with the title, and "T1", and "T2" "Titles", which reference is '
        'related? Just answer with [1] or [2] without explanation. [1]: "A title" [2]: "B"',
    ),
    "LaMP_2": (
        [{"description": "a heist", "tag": "action"}, {"description": "a joke", "tag": "comedy"}],
        "Which tag? description: a duel",
        'the tag for the movie: "a heist" is "action" , and the tag for the movie: "a joke" is "comedy" . '
        "Which tag? description: a duel",
    ),
    "LaMP_2N": (
        [{"text": "a vote", "category": "politics"}, {"text": "a goal", "category": "sports"}],
        "Which category? article: a bill",
        'the category for the article: "a vote" is "politics" , and the category for the article: "a goal" is '
        '"sports" . Which category? article: a bill',
    ),
    "LaMP_3": (
        [{"text": "good", "score": "5"}, {"text": "bad", "score": "1"}],
        "What is the score of this? review: fine",
        '5 is the score for "good" , and 1 is the score for "bad" . What is the score of this? review: fine',
    ),
    "LaMP_4": (
        [{"title": "Rain", "text": "It rains."}, {"title": "Sun", "text": "It shines."}],
        "Generate a headline for the following article: Snow.",
        '"Rain" is the title for "It rains." , and "Sun" is the title for "It shines." . '
        "Generate a headline for the following article: Snow.",
    ),
    "LaMP_5": (
        [{"title": "Nets", "abstract": "We train."}, {"title": "Trees", "abstract": "We split."}],
        "Generate a title for the following abstract of a paper: We prove.",
        '"Nets" is a title for "We train." , and "Trees" is a title for "We split." . Following the given patterns '
        "Generate a title for the following abstract of a paper: We prove.",
    ),
    "LaMP_6": (
        [{"title": "Lunch", "text": "At noon?"}, {"title": "Re: Lunch", "text": "Yes."}],
        "Generate a subject for the following email: Late.",
        '"Lunch" is the title for "At noon?" , and "Re: Lunch" is the title for "Yes." . '
        "Generate a subject for the following email: Late.",
    ),
    "LaMP_7": (
        [{"text": "so tired {x}"}, {"text": "coffee  ☕\nnow"}],
        "Paraphrase the following tweet without any explanation before or after it: monday",
        '"so tired {x}" , and "coffee  ☕\nnow"  are written by a person. Following the given patterns '
        "Paraphrase the following tweet without any explanation before or after it: monday",
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def count(tokenizer, text):
    return len(tokenizer(text).input_ids)


def events(*fields):
    return [Event("lamp", event_id=str(n), attributes=own) for n, own in enumerate(fields)]


def reviews(*texts):
    return events(*({"text": text, "score": str(n + 1)} for n, text in enumerate(texts)))


def words(n, word="word"):
    return " ".join([word] * n)


@pytest.mark.parametrize("name", SHOWN)
def test_a_prompt_that_fits_is_the_benchmarks(name, tokenizer):
    items, text, expected = SHOWN[name]
    assert profile_prompt(TASKS[name], text, events(*items), tokenizer, WIDE) == expected


@pytest.mark.parametrize("name", SHOWN)
def test_without_items_it_is_the_input(name, tokenizer):
    text = SHOWN[name][1] + words(500)
    assert profile_prompt(TASKS[name], text, [], tokenizer) == text


def test_lamp_1_without_its_instruction_has_the_items_in_front(tokenizer):
    items = events({"title": "T1"}, {"title": "T2"})
    assert profile_prompt(TASKS["LaMP_1"], "Subtitles?", items, tokenizer) == '"T1", and "T2". Subtitles?'


def test_items_keep_the_order_given(tokenizer):
    first, second = reviews("good", "bad")
    prompt = profile_prompt(TASKS["LaMP_3"], "review: fine", [second, first], tokenizer)
    assert prompt == '2 is the score for "bad" , and 1 is the score for "good" . review: fine'


def test_only_the_long_field_is_cut(tokenizer):
    title = words(20, "headline")
    (item,) = events({"title": title, "text": words(300)})
    prompt = profile_prompt(TASKS["LaMP_4"], "Generate: x", [item], tokenizer, 128)
    start, end = f'"{title}" is the title for "', '" . Generate: x'
    assert prompt.startswith(start) and prompt.endswith(end)
    kept = prompt[len(start) : -len(end)]
    assert kept and words(300).startswith(kept)
    assert 128 - 3 <= count(tokenizer, prompt) <= 128


def test_a_field_without_any_room_is_empty_and_the_others_stay(tokenizer):
    items = events(*({"title": words(20, "headline"), "text": words(30)} for _ in range(2)))
    prompt = profile_prompt(TASKS["LaMP_4"], "Generate: x", items, tokenizer, 32)
    part = f'"{words(20, "headline")}" is the title for "" '
    assert prompt == f"{part}, and {part}. Generate: x"


def test_what_an_item_does_not_use_goes_to_the_next(tokenizer):
    task, text, long = TASKS["LaMP_3"], "review: fine", words(300)

    def kept(*texts):
        prompt = profile_prompt(task, text, reviews(*texts), tokenizer, 200)
        assert 200 - 6 <= count(tokenizer, prompt) <= 200 or texts[-1] != long  # all is used, but for rounding
        return [part.split('"')[1].count("word") for part in prompt.split(", and ")]

    even, after_short, before_short = kept(long, long, long), kept("ok", "ok", long), kept(long, "ok", "ok")
    assert max(even) - min(even) <= 1
    assert after_short[2] > 2 * even[0]
    assert before_short[0] == even[0]  # nothing comes back from later items


@pytest.mark.parametrize(("length", "counted"), [(30, 30), (59, 59), (60, 60), (61, 60), (500, 60)])
def test_an_input_counts_up_to_its_share_and_is_never_cut(length, counted, tokenizer):
    text = words(length - 1)
    assert count(tokenizer, text) == length
    (item,) = reviews(words(300))
    prompt = profile_prompt(TASKS["LaMP_3"], text, [item], tokenizer, 100)
    assert prompt.endswith(f'" . {text}')
    fixed = sum(count(tokenizer, t) for t in ('1 is the score for "', '" ', ". "))
    kept = tokenizer.decode(tokenizer(words(300)).input_ids[: 100 - counted - fixed])
    assert prompt == f'1 is the score for "{kept}" . {text}'


@pytest.mark.parametrize("name", SHOWN)
def test_prompts_fit_where_the_input_does(name, tokenizer):
    task, draw = TASKS[name], random.Random(name)
    vocabulary = ["word", "naïve", "☕", "don't", "U.S.", "3.14", '"quoted"', "(x)", "the", "user", "oak\n", "日本"]
    for _ in range(50):
        items = [
            {field: " ".join(draw.choices(vocabulary, k=draw.randint(0, 60))) for field in task.fields}
            | {"tag": "comedy", "category": "crime", "score": "4"}
            | ({"title": "a title"} if task.long != "title" else {})
            for _ in range(draw.randint(1, 4))
        ]
        prompt = profile_prompt(task, "the paper with the title: oak", events(*items), tokenizer, 160)
        assert count(tokenizer, prompt) <= 160
        assert "�" not in prompt


def test_special_tokens_of_the_tokenizer_count_once(text_encoder):
    tokenizer = text_encoder.model.tokenizer  # it adds two to any text
    (item,) = reviews(words(300))
    prompt = profile_prompt(TASKS["LaMP_3"], "review: fine", [item], tokenizer, 64)
    assert len(tokenizer(prompt).input_ids) == 64
    assert "[SEP]" not in prompt


def test_an_item_without_its_field_is_named(tokenizer):
    with pytest.raises(DataError, match="LaMP_3: profile item '0' has no field 'score'; items of this task need text"):
        profile_prompt(TASKS["LaMP_3"], "review: x", events({"text": "good"}), tokenizer)
