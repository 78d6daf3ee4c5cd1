"""Questions made by rule: cuts that never leak, fair negatives, no answer where there is a tie."""

from dataclasses import replace

import numpy as np
import pytest

from persona.errors import RecipeError
from persona.history import Event, History
from persona.training.questions import Catalogue, QuestionSpec, build_questions, evaluation_cuts, make_cut
from persona.training.questions.answers import event_answer, true_answers

GENRE = QuestionSpec("top_attribute", "film", "Genre?", attribute="genre", min_value=4)
RECENT = QuestionSpec("top_attribute", "film", "Lately?", attribute="genre", last=2)
NEXT = QuestionSpec("next_item", "film", "Next {item}?", negatives=2)
STARS = QuestionSpec("next_value", "film", "Stars for {item}?")
SPECS = {"genre": GENRE, "recent": RECENT, "next": NEXT, "stars": STARS}


def film(time, number, genre="war", value=5.0):
    return Event(
        "film", float(time), text=f"film {number} {{x}}", item_id=str(number), value=value, attributes={"genre": genre}
    )


@pytest.fixture(scope="module")
def catalogue():
    """100 films, film n seen by 100 - n users."""
    users = [History(f"u{u}", tuple(film(n, n, "war" if n % 2 else "noir") for n in range(u))) for u in range(1, 101)]
    return Catalogue(users, SPECS, bins=10)


def ask(specs, history, at, catalogue, training=False, seed=0):
    cut = make_cut(history, at, window=50)
    return cut, build_questions(cut, specs, catalogue, np.random.default_rng(seed), training=training)


def test_ties_in_time_never_cross_a_cut():
    history = History("u", tuple(film(t, i) for i, t in enumerate((1, 2, 2, 2, 3))))
    for at in (1, 2, 3):
        cut = make_cut(history, at, 50)
        assert [e.timestamp for e in cut.history.events] == [1] and [e.timestamp for e in cut.future] == [2, 2, 2, 3]
    assert make_cut(history, 4, 50).history.timed[-1].timestamp == 2


def test_a_cut_keeps_the_window_and_the_profile():
    profile = Event("profile", attributes={"age": 3.0})
    cut = make_cut(History("u", (profile, *(film(t, t) for t in range(20)))), 15, window=4)
    assert [e.timestamp for e in cut.history.events] == [None, 11, 12, 13, 14] and len(cut.future) == 5
    assert cut.seen == frozenset(("film", str(n)) for n in range(20))


def test_evaluation_cuts_are_spread_and_distinct():
    history = History("u", tuple(film(t, t) for t in range(30)))
    assert [len(c.history.timed) for c in evaluation_cuts(history, 50, 3, 10)] == [10, 20, 29]
    assert evaluation_cuts(history, 50, 3, 30) == []
    tied = History("u", tuple(film(min(t, 11), t) for t in range(30)))
    assert [len(c.history.timed) for c in evaluation_cuts(tied, 50, 4, 10)] == [10, 11]


def test_the_commonest_liked_attribute(catalogue):
    events = [film(1, 1, "war"), film(2, 2, "noir", 1), film(3, 3, "noir", 1), film(4, 4), film(5, 5)]
    _, questions = ask({"genre": GENRE}, History("u", tuple(events)), 4, catalogue)
    assert [(q.prompt, q.answer, q.options) for q in questions] == [("Genre?", "war", ("noir", "war"))]
    _, questions = ask({"recent": RECENT}, History("u", tuple(events)), 3, catalogue)
    assert [q.answer for q in questions] == ["noir"]


def test_a_tie_or_an_unknown_answer_asks_nothing(catalogue):
    tie = History("u", (film(1, 1, "war"), film(2, 2, "noir"), film(3, 3)))
    unknown = History("u", (film(1, 1, "opera"), film(2, 2)))
    assert ask({"genre": GENRE}, tie, 2, catalogue)[1] == [] and ask({"genre": GENRE}, unknown, 1, catalogue)[1] == []


def test_next_item_is_new_and_its_rivals_are_unseen_and_as_popular(catalogue):
    history = History("u", (film(1, 40), film(2, 3), film(3, 40), film(4, 55), film(5, 56)))
    cut, questions = ask({"next": NEXT}, history, 2, catalogue)
    assert [q.answer for q in questions] == ["yes", "no", "no"] and {q.group for q in questions} == {0}
    assert questions[0].prompt == "Next film 55 {x}?"
    asked = [q.prompt.split()[2] for q in questions]
    assert len(set(asked)) == 3 and not {("film", i) for i in asked[1:]} & cut.seen
    counts = [catalogue.items["film"][i].count for i in asked]
    bins = {catalogue._bin_of["film"][i] for i in asked}
    assert len(bins) == 1 and max(counts) - min(counts) <= 12


def test_bins_hold_about_equal_numbers_of_events(catalogue):
    items = catalogue.items["film"]
    totals = [sum(items[i].count for i in ids) for ids in catalogue._bins["film"]]
    assert len(totals) == 10 and max(totals) < 1.5 * sum(totals) / 10


def test_the_true_item_is_not_given_away_by_its_rank(catalogue):
    """The true item is the most popular of its group about one time in three."""
    top = total = 0
    for n in range(5, 95):
        history = History("u", (film(1, 0), film(2, n)))
        _, questions = ask({"next": NEXT}, history, 1, catalogue, seed=n)
        if questions:
            counts = [catalogue.items["film"][q.prompt.split()[2]].count for q in questions]
            top, total = top + (counts[0] == max(counts)), total + 1
    assert total > 80 and 0.2 < top / total < 0.47


def test_too_few_rivals_ask_nothing(catalogue):
    everything = History("u", tuple(film(n, n) for n in range(100)))
    assert ask({"next": NEXT}, everything, 50, catalogue)[1] == []


def test_an_item_or_source_never_met_in_training_asks_nothing(catalogue):
    assert ask({"next": NEXT}, History("u", (film(1, 1), film(2, 900))), 1, catalogue)[1] == []
    song = QuestionSpec("next_item", "song", "Next {item}?")
    history = History("u", (film(1, 1), Event("song", 2.0, item_id="s")))
    assert ask({"song": song}, history, 1, catalogue)[1] == []


def test_next_item_needs_item_ids():
    users = [History(f"u{u}", (Event("film", 1.0, text="x"), Event("song", 2.0, item_id="s"))) for u in range(3)]
    with pytest.raises(RecipeError, match=r"questions\.next: no training event of source 'film' has an item id"):
        Catalogue(users, {"next": NEXT})


def test_next_value(catalogue):
    history = History("u", (film(1, 1), film(2, 7, value=5.0), film(3, 8, value=2.5)))
    _, questions = ask({"stars": STARS}, history, 1, catalogue)
    assert [(q.prompt, q.answer, q.options) for q in questions] == [("Stars for film 7 {x}?", "5", ("5",))]
    assert ask({"stars": STARS}, history, 2, catalogue)[1] == []  # nobody in training gave 2.5


def test_training_draws_from_the_horizon(catalogue):
    spec = QuestionSpec("next_item", "film", "Next {item}?", horizon=3)
    history = History("u", tuple(film(n, 5 * n) for n in range(20)))
    asked = set()
    for seed in range(40):
        _, questions = ask({"next": spec}, history, 10, catalogue, training=True, seed=seed)
        assert [q.answer for q in questions] == ["yes", "no"]
        asked.add(int(questions[0].prompt.split()[2]))
    assert asked == {50, 55, 60}


@pytest.mark.parametrize(
    "bad, message",
    [({"kind": "top_attribute", "prompt": "x"}, "attribute"), ({"kind": "next_item", "prompt": "x"}, "item")],
)
def test_a_spec_checks_itself(bad, message):
    with pytest.raises(ValueError, match=message):
        QuestionSpec(source="film", **bad)


NTH = QuestionSpec("nth_attribute", "film", "Genre of {n}?", attribute="genre", last=3, per_cut=3)
COUNT = QuestionSpec("count_attribute", "film", "How many {value}?", attribute="genre", last=4, per_cut=2, choices=2)
TOP2 = QuestionSpec("top_attribute", "film", "Two?", attribute="genre", top=2, choices=2)
PATH = QuestionSpec("trajectory", "film", "From where to where?", attribute="genre", parts=2, choices=2)
COMING = QuestionSpec("next_attribute", "film", "Genre next?", attribute="genre", per_cut=2)
GENRES = ("war", "noir", "war", "war", "opera", "opera", "opera", "war")


@pytest.fixture(scope="module")
def history():
    return History("u", tuple(film(n, n, genre, value=3 + n % 3) for n, genre in enumerate(GENRES)))


def true(spec, history, at, seed=0, training=False):
    cut = make_cut(history, at, window=50)
    return list(true_answers(spec, cut, np.random.default_rng(seed), training=training))


def test_the_nth_newest(history):
    found = {t.fields["{n}"]: t.answer for t in true(NTH, history, 6)}
    assert found == {"1": "opera", "2": "opera", "3": "war"}
    assert len(true(NTH, history, 1)) == 1 and len(true(replace(NTH, per_cut=1), history, 6)) == 1


def test_how_many_of_the_last(history):
    found = {t.fields["{value}"]: t.answer for t in true(COUNT, history, 6)}
    assert found == {"war": "2", "opera": "2"}
    drawn = [true(replace(COUNT, per_cut=1), history, 5, seed)[0] for seed in range(200)]
    assert {(t.fields["{value}"], t.answer) for t in drawn} == {("noir", "1"), ("war", "2"), ("opera", "1")}
    assert 70 < sum(t.answer == "2" for t in drawn) < 130  # as often as there are such events


def test_several_commonest_values_come_in_alphabetical_order_and_a_tie_gives_none(history):
    assert [t.answer for t in true(TOP2, history, 7)] == ["opera, war"]
    assert true(TOP2, history, 3) != [] and true(replace(TOP2, top=1), history, 6) != []
    assert true(TOP2, history, 1) == []  # one value alone
    assert true(replace(TOP2, top=1), history, 2) == []  # war and noir once each


def test_the_way_from_part_to_part(history):
    assert [t.answer for t in true(PATH, history, 7)] == ["war -> opera"]
    assert true(replace(PATH, parts=3), history, 5) == [] and true(PATH, history, 1) == []


def test_the_next_attribute_is_of_what_comes_after_the_cut(history):
    assert [t.answer for t in true(COMING, history, 3)] == ["war", "opera"]
    drawn = {true(replace(COMING, horizon=5, per_cut=1), history, 3, seed, True)[0].answer for seed in range(20)}
    assert drawn == {"war", "opera"}


def times(answer):
    """When the events that support a true answer or a question happened."""
    return [event.timestamp for event in answer.support]


def test_an_answer_is_supported_by_the_events_that_make_it(history):
    assert [times(t) for t in true(TOP2, history, 7)] == [[0, 2, 3, 4, 5, 6]]
    assert [times(t) for t in true(replace(TOP2, top=1, last=4), history, 7)] == [[4, 5, 6]]
    assert [times(t) for t in true(replace(GENRE, min_value=4), history, 7)] == [[4, 5]]
    assert {t.fields["{n}"]: times(t) for t in true(NTH, history, 6)} == {"1": [5], "2": [4], "3": [3]}
    assert {t.fields["{value}"]: times(t) for t in true(COUNT, history, 6)} == {"war": [2, 3], "opera": [4, 5]}
    assert [times(t) for t in true(PATH, history, 7)] == [[0, 2, 3, 4, 5, 6]]
    assert [times(t) for t in true(COMING, history, 3)] == [[3], [4]]


@pytest.mark.parametrize("letters", [False, True])
def test_questions_carry_their_support(catalogue, letters):
    history = History("u", (film(1, 40), film(2, 3), film(3, 55), film(4, 56)))
    specs = {**SPECS, "next": replace(NEXT, choice_prompt="Which film?")}
    rng = np.random.default_rng(0)
    questions = build_questions(make_cut(history, 2, 50), specs, catalogue, rng, training=False, letters=letters)
    assert len(set(questions)) == len(questions)
    found = [(q.task, q.answer if q.task == "next" and not letters else None, times(q)) for q in questions]
    asked = [("next", None, [3])] if letters else [("next", "yes", [3]), ("next", "no", []), ("next", "no", [])]
    others = [("genre", None, [1, 2]), ("recent", None, [1, 2]), ("stars", None, [3])]
    assert sorted(found, key=str) == sorted(asked + others, key=str)


@pytest.fixture(scope="module")
def answered():
    """A catalogue for questions with choices: three in four users like war best, the others noir, and a few opera."""
    users = []
    for u in range(40):
        genre = "opera" if u % 20 == 0 else "noir" if u % 4 == 0 else "war"
        users.append(History(f"u{u}", tuple(film(n, 5 * u + n, genre) for n in range(4))))
    spec = QuestionSpec("top_attribute", "film", "Genre?", attribute="genre", choices=2)
    return Catalogue(users, {"genre": spec}, cuts=[make_cut(u, 3, 50) for u in users])


def test_wrong_answers_are_offered_as_often_as_they_are_right(answered):
    rng = np.random.default_rng(0)
    offered = [answered.options("genre", "opera", rng) for _ in range(1000)]
    assert all("opera" in o and len(set(o)) == 2 for o in offered)
    assert 0.72 < sum("war" in o for o in offered) / 1000 < 0.86  # 30 of 38
    assert 0.4 < sum(o[0] == "opera" for o in offered) / 1000 < 0.6
    assert answered.options("genre", "comedy", rng) == ()
    assert answered.frequencies("genre", ("opera", "comedy")) == {"opera": 2.0, "comedy": 0.0}


@pytest.mark.parametrize("value, answer", [(29.0, "29"), (29.5, "29.5"), ("29.0", "29.0"), (0, "0"), (None, None)])
def test_whole_numbers_are_answers_without_a_point(value, answer):
    spec = QuestionSpec("top_attribute", "film", "How old?", attribute="age")
    assert event_answer(Event("film", 1.0, attributes={"age": value}), spec) == answer


def test_choices_need_as_many_answers():
    users = [History("u", tuple(film(n, n) for n in range(4)))]
    with pytest.raises(RecipeError, match=r"questions\.path: choices is 2, but .* only 1 different"):
        Catalogue(users, {"path": PATH}, cuts=[make_cut(users[0], 3, 50)])


def test_lettered_choices_stand_in_the_question(catalogue):
    history = History("u", (film(1, 40), film(2, 3), film(3, 55), film(4, 56)))
    specs = {"genre": replace(GENRE, min_value=None), "next": replace(NEXT, choice_prompt="Which film?")}
    places = []
    for seed in range(60):
        cut = make_cut(history, 2, 50)
        questions = build_questions(
            cut, specs, catalogue, np.random.default_rng(seed), training=bool(seed % 2), letters=True
        )
        film_asked = max(questions, key=lambda q: q.task)
        lines = film_asked.prompt.split("\n")
        assert lines[0] == "Which film?" and film_asked.options == ("A", "B", "C")
        options = dict(line.split(". ", 1) for line in lines[1:])
        assert options[film_asked.answer] == "film 55 {x}" and len(set(options.values())) == 3
        places.append(film_asked.answer)
    assert all(places.count(letter) > 8 for letter in "ABC")
    with pytest.raises(RecipeError, match=r"questions\.next: lettered choices need `choice_prompt`"):
        build_questions(cut, {"next": NEXT}, catalogue, np.random.default_rng(0), training=False, letters=True)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"kind": "trajectory", "prompt": "x", "attribute": "genre"}, "needs `choices`"),
        ({"kind": "count_attribute", "prompt": "{value}", "attribute": "genre"}, "needs `choices`"),
        ({"kind": "top_attribute", "prompt": "x", "attribute": "genre", "top": 3}, "needs `choices`"),
        ({"kind": "nth_attribute", "prompt": "x", "attribute": "genre"}, "`{n}`"),
        ({"kind": "count_attribute", "prompt": "x", "attribute": "genre", "choices": 3}, "`{value}`"),
        ({"kind": "next_attribute", "prompt": "x"}, "`attribute`"),
        ({"kind": "next_attribute", "prompt": "x", "attribute": "genre", "choices": 1}, "at least 2"),
        ({"kind": "next_item", "prompt": "{item}", "choices": 4}, "not for next_item"),
    ],
)
def test_a_spec_of_the_newer_kinds_checks_itself(bad, message):
    with pytest.raises(ValueError, match=message):
        QuestionSpec(source="film", **bad)
