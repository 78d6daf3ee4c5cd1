"""Records in LaMP's form: what a recipe refuses, who is asked and about what, and that training never sees the test."""

import json
from collections import Counter
from dataclasses import replace
from datetime import date

import numpy as np
import pytest

from persona.errors import DataError, RecipeError
from persona.evaluation.lamp.domain import PROFILE, LampDomain
from persona.evaluation.lamp.recipe import LampRecipe, LampSplit, load_lamp_recipe
from persona.history import ReaderSpec, SourceSpec, read_histories
from persona.training.configs import TrainingConfig
from persona.training.trained_on import fingerprint, user_fingerprint

RATINGS = LampRecipe(
    name="films",
    task="LaMP_3",
    sources={"rating": SourceSpec("item")},
    readers=[
        ReaderSpec("rating", "*.csv", "user", timestamp="time", item_id="item", value="stars", text="{title}"),
    ],
    source="rating",
    fields={"text": "{text}", "score": "{value:g}"},
    split=LampSplit(train=0.6, validation=0.2, per_user=4, min_profile=3),
    training=TrainingConfig(questions_per_history=3, drop_events=0.5),
)
PAPERS = LampRecipe(
    name="papers",
    task="LaMP_5",
    sources={"paper": SourceSpec("text")},
    readers=[
        ReaderSpec(
            "paper",
            "*.jsonl",
            "authors",
            timestamp="year",
            time_format="%Y",
            event_id="id",
            text="{title}. {abstract}",
            attributes={"title": "title", "abstract": "abstract"},
        )
    ],
    source="paper",
    fields={"title": "{title}", "abstract": "{abstract}"},
    split=LampSplit(by="time", test_from=date(2019, 1, 1), validation=0.2, min_profile=2),
    training=TrainingConfig(questions_per_history=1, drop_events=0.5),
)
RECIPE = """
name: films
task: LaMP_3
sources: {rating: {kind: item}}
readers: [{source: rating, path: "*.csv", user: user}]
source: rating
fields: {text: "{text}", score: "{value:g}"}
"""


def write_ratings(folder, rows):
    """Rows are (user, item, stars, time); a film's title tells its number."""
    lines = [f"{user},{item},film {item},{stars},{time}" for user, item, stars, time in rows]
    (folder / "ratings.csv").write_text("\n".join(["user,item,title,stars,time", *lines]) + "\n")
    return folder


def write_papers(folder, papers):
    """Papers are (id, year, authors); title and abstract tell the id."""
    records = [
        {"id": id, "year": str(year), "title": f"title of {id}", "abstract": f"about {id}", "authors": authors}
        for id, year, authors in papers
    ]
    (folder / "papers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def changed(recipe, part, **fields):
    return replace(recipe, **{part: replace(getattr(recipe, part), **fields)})


def ids(events):
    return [event.event_id for event in events]


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    """20 users with 8 to 27 films each, two films at each moment."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user:02}", int(item), int(rng.integers(1, 6)), 1000 * user + 10 * (place // 2))
        for user in range(20)
        for place, item in enumerate(rng.permutation(40)[: 8 + user])
    ]
    return write_ratings(tmp_path_factory.mktemp("ratings"), rows)


@pytest.fixture(scope="module")
def films(ratings):
    return LampDomain(RATINGS, ratings)


@pytest.fixture(scope="module")
def written():
    """200 papers of 2010 to 2020, of one to three of twelve authors."""
    rng = np.random.default_rng(1)
    authors = [f"a{n:02}" for n in range(12)]
    return [
        (f"P{n:03}", int(rng.integers(2010, 2021)), rng.permutation(authors)[: rng.integers(1, 4)].tolist())
        for n in range(200)
    ]


@pytest.fixture(scope="module")
def papers(written, tmp_path_factory):
    return LampDomain(PAPERS, write_papers(tmp_path_factory.mktemp("papers"), written))


# --- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ("task=LaMP_9", "task 'LaMP_9' is none of LaMP_1, LaMP_2, "),
        ("task=LaMP_1", "LaMP_1 cannot be made from records"),
        ("task=LaMP_7", "LaMP_7 cannot be made from records"),
        ("fields={}", "fields: LaMP_3 needs text, score"),
        ("fields={text: x}", "fields: LaMP_3 needs score"),
        (
            "fields.text='{txt}'",
            "fields.text names 'txt', which no reader of the source 'rating' makes; did you mean 't",
        ),
        ("sources.rating.line='{valeu}'", "sources.rating.line names 'valeu', .* did you mean 'value'"),
        ("source=watched", r"source 'watched' is not in `sources`, which has \['rating'\]"),
        ("split.test_from=2019-01-01", "split test_from belongs to a split by time"),
        ("split.by=time", "split test_from belongs to a split by time, and such a split needs it"),
        ("split.by=row", "split.by must be 'user' or 'time', not 'row'"),
        ("split.train=0.9", "split: train and validation are shares that leave something"),
        ("split.validation=0", "split train and validation are shares"),
        ("split.per_user=0", "split.per_user must be greater than 0"),
        ("pplug.temperature=0", "pplug temperature must be positive, not 0"),
        ("official=time", "official files need no sources, readers, source and fields"),
        ("official=dev", "official must be 'user' or 'time'"),
        ("max_lenght=5", "max_lenght is not a known key; did you mean 'max_length'"),
    ],
)
def test_a_recipe_says_which_field_is_wrong(tmp_path, change, message):
    path = tmp_path / "lamp.yaml"
    path.write_text(RECIPE)
    assert load_lamp_recipe(path).split == LampSplit()
    with pytest.raises(RecipeError, match=rf"^{path}: {message}"):
        load_lamp_recipe(path, [change])


def test_a_split_by_time_needs_no_share_of_users():
    assert LampSplit(by="time", test_from=date(2019, 1, 1), validation=0.5, train=0.8).validation == 0.5


# --- by user --------------------------------------------------------------------------------------------------------


def test_users_are_in_one_part_only_and_all_are_in_one(films):
    parts = [set(films.train), *({s.profile.user for s in films.samples(part)} for part in ("validation", "test"))]
    assert [len(part) for part in parts] == [12, 4, 4]
    assert set.union(*parts) == {f"u{n:02}" for n in range(20)}


def test_the_newest_events_of_each_user_are_asked_about(films, ratings):
    everything = LampDomain(changed(RATINGS, "split", per_user=1000), ratings)
    for part in ("validation", "test"):
        counts = Counter(sample.profile.user for sample in films.samples(part))
        assert set(counts.values()) == {4}
        for user in counts:
            own, every = ([s for s in d.samples(part) if s.profile.user == user] for d in (films, everything))
            assert own == every[-4:]


def test_a_profile_is_all_that_came_strictly_before_and_long_enough(films, ratings):
    everything = LampDomain(changed(RATINGS, "split", per_user=1000), ratings)
    for domain in (films, everything):
        for sample in [*domain.validation, *domain.test]:
            place = int(sample.id.rpartition("/")[2])
            # Two films at each moment: those before are an even number, and the twin is in neither's profile.
            assert len(sample.profile) == place - place % 2 >= 3
            assert all(event.timestamp < sample.target.timestamp for event in sample.profile.events)
    sizes = Counter(len(sample.profile) for sample in everything.test)
    assert min(sizes) == 4 and sizes[4] == 8  # of four users, both films of the first moment that has 3 before it


def test_questions_and_answers_are_the_tasks(films):
    for sample in films.test:
        assert sample.input.endswith(f"without further explanation. review: {sample.target.text}")
        assert sample.output == f"{sample.target.value:g}" and sample.output in "12345"
        for item in sample.profile.events:
            assert item.attributes == {"text": item.text, "score": f"{item.value:g}"}
    assert len({sample.id for sample in films.validation + films.test}) == len(films.validation) + len(films.test)


def test_fingerprints_are_of_users(films, ratings, tmp_path):
    train, validation, test = (films.fingerprints(part) for part in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (12, 4, 4)
    assert not train & validation and not train & test and not validation & test
    histories, _ = read_histories(RATINGS.readers, ratings)
    assert train == {user_fingerprint(histories[user]) for user in films.train}
    others = [(f"u{user:02}", n, 3, n) for user in range(20) for n in range(9)]
    assert not train & LampDomain(RATINGS, write_ratings(tmp_path, others)).fingerprints("train")  # namesakes


def test_a_profile_holds_the_newest_512_items(tmp_path):
    recipe = changed(changed(RATINGS, "split", per_user=1), "training", drop_events=0.0, short_share=0.0)
    short = [(f"u{user}", n, 3, n) for user in range(10) for n in range(8)]
    domain = LampDomain(recipe, write_ratings(tmp_path, short))
    asked, trained = domain.test[0].profile.user, next(iter(domain.train))
    more = [(user, n, 3, n) for user in (asked, trained) for n in range(8, PROFILE + 5)]
    domain = LampDomain(recipe, write_ratings(tmp_path, short + more))
    (sample,) = (sample for sample in domain.test if sample.profile.user == asked)
    assert [event.item_id for event in sample.profile.events] == [str(n) for n in range(4, PROFILE + 4)]
    assert max(len(domain.draw(np.random.default_rng(n)).profile) for n in range(300)) == PROFILE


def test_only_timed_events_of_the_tasks_source_count(tmp_path):
    write_ratings(tmp_path, [(f"u{user}", n, 3, n) for user in range(10) for n in range(8)])
    (tmp_path / "seen.tsv").write_text("user\ttitle\ttime\n" + "".join(f"u{n}\tnever\t4\n" for n in range(10)))
    (tmp_path / "facts.tsv").write_text("user\ttitle\n" + "".join(f"u{n}\tnever\n" for n in range(10)))
    more = [
        ReaderSpec("seen", "seen.tsv", "user", timestamp="time", text="{title}"),
        ReaderSpec("rating", "facts.tsv", "user", text="{title}"),
    ]
    sources = {**RATINGS.sources, "seen": SourceSpec("text")}
    domain = LampDomain(replace(RATINGS, readers=[*RATINGS.readers, *more], sources=sources), tmp_path)
    histories = [*domain.histories(), *(sample.profile for sample in domain.validation + domain.test)]
    assert {event.text == "never" for history in histories for event in history.events} == {False}
    assert [len(sample.profile) for sample in domain.test] == 2 * [4, 5, 6, 7]


def test_an_event_without_one_of_the_tasks_fields_is_neither_asked_nor_shown(tmp_path):
    rows = [(f"u{user}", n, "" if n % 4 == 3 else 4, n) for user in range(10) for n in range(12)]
    domain = LampDomain(RATINGS, write_ratings(tmp_path, rows))
    assert {sample.output for sample in domain.validation + domain.test} == {"4"}
    shown = [event for sample in domain.test for event in sample.profile.events]
    assert {event.attributes["score"] for event in shown} == {"4"}
    rng = np.random.default_rng(0)
    assert {answer for _ in range(100) for _, answer in domain.draw(rng).questions} == {"4"}


def test_answers_that_are_no_labels_of_the_task_are_refused_before_anything_is_trained(tmp_path):
    rows = [(f"u{user}", n, 4.5, n) for user in range(10) for n in range(12)]
    with pytest.raises(DataError, match=r"4\.5"):
        LampDomain(RATINGS, write_ratings(tmp_path, rows))


@pytest.mark.parametrize("part, count", [("train", 1), ("test", 3)])
def test_a_part_without_a_question_is_an_error_with_what_was_read(tmp_path, part, count):
    write_ratings(tmp_path, [(f"u{user}", n, 3, n) for user in range(10) for n in range(count)])
    recipe = changed(RATINGS, "split", min_profile=1 if part == "train" else 3)
    with pytest.raises(DataError, match=rf"films: no question for (train|validation).*{10 * count} rows gave"):
        LampDomain(recipe, tmp_path)


def test_too_few_users_to_split_are_an_error(tmp_path):
    with pytest.raises(DataError, match="2 users cannot be split"):
        LampDomain(RATINGS, write_ratings(tmp_path, [(f"u{user}", n, 3, n) for user in range(2) for n in range(9)]))


# --- by time --------------------------------------------------------------------------------------------------------


def test_a_paper_is_asked_once_of_the_author_with_the_longest_profile(papers, written):
    years = {id: year for id, year, _ in written}
    by_author = {}
    for id, year, authors in written:
        for author in authors:
            by_author.setdefault(author, []).append((year, id))
    earlier = {
        id: {author: {i for y, i in by_author[author] if y < year} for author in authors}
        for id, year, authors in written
    }
    asked = {sample.id: sample for sample in papers.validation + papers.test}
    assert len(asked) == len(papers.validation) + len(papers.test)
    for id, sample in asked.items():
        assert sample.target.event_id == id and sample.output == f"title of {id}"
        assert sample.input == f"Generate a title for the following abstract of a paper: about {id}"
        assert set(ids(sample.profile.events)) == earlier[id][sample.profile.user]
        assert len(sample.profile) == max(map(len, earlier[id].values())) >= 2
    eligible = {id for id, those in earlier.items() if max(map(len, those.values())) >= 2}
    assert {sample.id for sample in papers.test} == {id for id in eligible if years[id] >= 2019}
    assert {sample.id for sample in papers.validation} < {id for id in eligible if years[id] < 2019}
    assert sum(len(those) > 1 for id, those in earlier.items() if id in asked) > 20


def test_papers_of_the_test_and_of_validation_are_in_no_training_profile_and_no_draw(papers, written):
    held = {sample.id for sample in papers.validation + papers.test}
    late = {id for id, year, _ in written if year >= 2019}
    early = len(written) - len(late)
    trained = {event.event_id for history in papers.histories() for event in history.events}
    assert not trained & (held | late)
    assert len(trained) == early - round(0.2 * early)  # all the others, those with a short profile too
    rng, shown = np.random.default_rng(0), set()
    for _ in range(2000):
        drawn = papers.draw(rng, 3)
        shown |= set(ids(drawn.profile.events)) | {answer.removeprefix("title of ") for _, answer in drawn.questions}
        assert len({event.event_id for event in drawn.profile.events}) == len(drawn.profile)
    assert shown <= trained and len(shown) > 0.9 * len(trained)


def test_fingerprints_are_of_papers_and_of_no_two_parts(papers):
    train, validation, test = (papers.fingerprints(part) for part in ("train", "validation", "test"))
    assert test == {fingerprint(sample.id) for sample in papers.test}
    assert train and validation and not train & validation and not train & test and not validation & test


def test_by_hand(tmp_path):
    """c has most before P6, b before P7; nobody has enough before P8; P9 is b's and newer than both."""
    early = [("P1", 2011, ["a", "b"]), ("P2", 2012, ["b"]), ("P3", 2013, ["c"]), ("P4", 2014, ["c"])]
    late = [("P6", 2019, ["a", "b", "c"]), ("P7", 2019, ["b", "d"]), ("P8", 2019, ["d", "e"]), ("P9", 2020, ["b"])]
    write_papers(tmp_path, [*early, ("P5", 2015, ["a", "c"]), *late])
    domains = [LampDomain(changed(PAPERS, "split", validation=0.4, seed=seed), tmp_path) for seed in (0, 1, 9)]
    for domain in domains:
        found = {sample.id: (sample.profile.user, ids(sample.profile.events)) for sample in domain.test}
        assert found == {
            "P6": ("c", ["P3", "P4", "P5"]),
            "P7": ("b", ["P1", "P2"]),
            "P9": ("b", ["P1", "P2", "P6", "P7"]),
        }
        assert [(sample.id, sample.profile.user) for sample in domain.validation] == [("P5", "c")]
        left = {event.event_id for history in domain.histories() for event in history.events}
        assert len(left) == 3 and left < {"P1", "P2", "P3", "P4"}


def test_records_without_ids_can_be_split_by_time_too(tmp_path):
    recipe = replace(RATINGS, split=LampSplit(by="time", test_from=date(1970, 1, 2), validation=0.2))
    rows = [(f"u{user}", n, 3, 86400 * n / 10) for user in range(4) for n in range(20)]
    domain = LampDomain(recipe, write_ratings(tmp_path, rows))
    assert len(domain.test) == 40 and all(sample.target.timestamp >= 86400 for sample in domain.test)
    assert all(len(sample.profile) == int(sample.id.partition("/")[2]) for sample in domain.validation + domain.test)
    assert len(domain.fingerprints("test")) == 40 and not domain.fingerprints("test") & domain.fingerprints("train")


# --- drawing --------------------------------------------------------------------------------------------------------


def test_draws_follow_the_seed(films):
    first, again, other = ([films.draw(rng) for _ in range(20)] for rng in map(np.random.default_rng, (0, 0, 1)))
    assert first == again and first != other
    assert len({drawn.profile.user for drawn in first}) > 5


def test_a_draw_asks_about_what_came_after_its_profile(films):
    rng = np.random.default_rng(0)
    for _ in range(300):
        drawn = films.draw(rng)
        history = films.train[drawn.profile.user]
        asked = [text.partition("review: ")[2] for text, _ in drawn.questions]
        at = [event.text for event in history.events].index(asked[0])
        assert asked == [event.text for event in history.events[at : at + 3]]
        assert [answer for _, answer in drawn.questions] == [f"{e.value:g}" for e in history.events[at : at + 3]]
        assert drawn.profile.events and set(ids(drawn.profile.events)) <= set(ids(history.events))
        assert all(event.timestamp < history.events[at].timestamp for event in drawn.profile.events)
    assert {len(films.draw(rng, 1).questions) for _ in range(20)} == {1}
    assert max(len(films.draw(rng, 50).questions) for _ in range(50)) > 10


@pytest.mark.parametrize("drop, least, most", [(0.0, 1.0, 1.0), (0.5, 0.65, 0.85), (1.0, 0.4, 0.65)])
def test_events_are_dropped_up_to_the_recipes_share(ratings, drop, least, most):
    domain = LampDomain(changed(RATINGS, "training", drop_events=drop, short_share=0.0), ratings)
    rng, kept, there = np.random.default_rng(0), 0, 0
    for _ in range(500):
        drawn = domain.draw(rng)
        events = domain.train[drawn.profile.user].events
        first = drawn.questions[0][0].partition("review: ")[2]
        at = [event.text for event in events].index(first)
        kept, there = kept + len(drawn.profile), there + at - at % 2
    assert least <= kept / there <= most


def test_short_histories_are_drawn_too(ratings):
    domain = LampDomain(changed(RATINGS, "training", drop_events=0.0, short_share=1.0), ratings)
    rng = np.random.default_rng(0)
    sizes = [len(domain.draw(rng).profile) for _ in range(300)]
    assert max(sizes) == 15 and min(sizes) == 1


def test_most_keeps_some_of_the_questions_by_seed(papers, written, tmp_path):
    write_papers(tmp_path, written)
    some, again = (LampDomain(changed(PAPERS, "split", most=5), tmp_path) for _ in range(2))
    for part in ("validation", "test"):
        every = papers.samples(part)
        chosen = some.samples(part)
        assert len(chosen) == 5 < len(every) and chosen == again.samples(part)
        assert [sample for sample in every if sample.id in {s.id for s in chosen}] == chosen
        assert chosen != every[:5]
    assert some.train == papers.train
    assert LampDomain(changed(PAPERS, "split", most=10_000), tmp_path).test == papers.test


def test_another_seed_is_another_split(films, papers, ratings, written, tmp_path):
    assert LampDomain(RATINGS, ratings).test == films.test
    assert set(LampDomain(changed(RATINGS, "split", seed=1), ratings).train) != set(films.train)
    other = LampDomain(changed(PAPERS, "split", seed=1), write_papers(tmp_path, written))
    assert other.test == papers.test and other.validation != papers.validation
