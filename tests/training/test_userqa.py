"""UserQA: triples whose answers can be traced, hard ones kept, a dataset with a card."""

import hashlib
import json
from collections import Counter, defaultdict
from copy import copy
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml

from persona.demo.shop import generate_shop
from persona.errors import DataError, PersonaError
from persona.evaluation.methods import draw_sample
from persona.history import Event, History
from persona.training.questions import Question, QuestionSpec
from persona.training.recipe import Domain
from persona.training.userqa import Rewriting, UserQAConfig, triples, write_userqa
from persona.training.userqa.triples import answer_rank, history_vector

DEMO = Path(__file__).parents[2] / "adapters" / "demo" / "recipe.yaml"
BOUGHT = {"source": "purchase", "attribute": "category"}
QUESTIONS = {
    "nth": QuestionSpec("nth_attribute", prompt="Which category did they buy {n} back?", last=3, **BOUGHT),
    "count": QuestionSpec("count_attribute", prompt="How often {value} of 8?", last=8, choices=3, **BOUGHT),
    "way": QuestionSpec("trajectory", prompt="From what to what?", parts=2, choices=3, **BOUGHT),
    "coming": QuestionSpec("next_attribute", prompt="Which category comes next?", horizon=3, per_cut=2, **BOUGHT),
}


@pytest.fixture(scope="module")
def shop(domain, tmp_path_factory):
    """A shop of 40 users that is asked questions of most kinds."""
    recipe = replace(domain.recipe, questions={**domain.recipe.questions, **QUESTIONS})
    return Domain(recipe, generate_shop(tmp_path_factory.mktemp("shop"), users=40))


@pytest.fixture(scope="module")
def dataset(shop, text_encoder, tmp_path_factory):
    """The dataset as `datasets` reads it, the folder and the counts."""
    folder = tmp_path_factory.mktemp("userqa") / "out"
    counts = write_userqa(shop, folder, encoder=text_encoder)
    return load(folder), folder, counts


def load(folder):
    return datasets.load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def test_the_dataset_loads_and_its_users_are_apart(shop, dataset):
    loaded, _, counts = dataset
    assert set(loaded) == {"train", "validation", "test"}
    users = {split: set(rows["user"]) for split, rows in loaded.items()}
    assert users["train"] <= set(shop.train) and users["test"] <= set(shop.test)
    assert not users["train"] & users["test"] and not users["train"] & users["validation"]
    for split, rows in loaded.items():
        written = Counter((split, task) for task in rows["task"])
        assert written == {k: n for k, n in counts.written.items() if k[0] == split} and set(rows["task"])
        assert counts.users[split] == len(users[split]) and counts.total(split) == len(rows)
        assert sum(counts.hard[split, task] for task in counts.tasks) == sum((r or 0) > 1 for r in rows["rank"])
    assert set(loaded["train"]["task"]) == set(shop.recipe.questions)


def test_a_history_is_what_came_before_the_cut(shop, dataset):
    for row in dataset[0]["test"]:
        before = shop.histories[row["user"]].until(row["cut"]).last(shop.recipe.window).events
        assert [(e.source, e.timestamp, e.text, e.item_id, e.value) for e in before] == [
            (e["source"], e["timestamp"], e["text"], e["item_id"], e["value"]) for e in row["history"]
        ]
        assert [json.loads(e["attributes"]) for e in row["history"]] == [e.attributes for e in before]
        assert any(e.timestamp == row["cut"] for e in shop.histories[row["user"]].timed)


def test_every_answer_can_be_traced_to_the_events_that_support_it(dataset):
    """Recomputed from the row alone; each support is all of the events that count, and no other."""

    def category(event):
        return json.loads(event["attributes"])["category"]

    seen = Counter()
    for row in (row for rows in dataset[0].values() for row in rows):
        history, task, answer = row["history"], row["task"], row["answer"]
        seen[task] += 1
        bought = [i for i, e in enumerate(history) if e["source"] == "purchase"]
        named = defaultdict(list)
        for i in bought:
            named[category(history[i])].append(i)
        assert answer in row["options"]
        if row["about"] == "future":
            assert row["support"] == [] and all(e["timestamp"] >= row["cut"] for e in row["support_future"])
            if task == "coming":
                assert [category(e) for e in row["support_future"]] == [answer]
            else:
                names = [e["text"] in row["instruction"] for e in row["support_future"]]
                assert names == ([True] if answer == "yes" else []) and row["options"] == ["yes", "no"]
            continue
        assert row["support_future"] == []
        if task == "favourite_category":
            assert row["support"] == named[answer] and len(named[answer]) == max(map(len, named.values()))
        elif task == "recent_category":
            assert row["support"] == [i for i in bought[-5:] if category(history[i]) == answer]
        elif task == "nth":
            back = int(row["instruction"].split()[-2])
            assert row["support"] == [bought[-back]] and category(history[bought[-back]]) == answer
        elif task == "count":
            value = row["instruction"].split()[2]
            assert row["support"] == [i for i in bought[-8:] if category(history[i]) == value]
            assert len(row["support"]) == int(answer)
        else:
            first, second = np.array_split(bought, 2)
            one, other = answer.split(" -> ")
            expected = [i for part, v in ((first, one), (second, other)) for i in part if category(history[i]) == v]
            assert row["support"] == expected
    assert all(seen[task] > 10 for task in (*QUESTIONS, "favourite_category", "recent_category", "next_purchase"))


def test_validation_and_test_users_are_asked_what_the_tables_ask(shop, dataset):
    for split in ("validation", "test"):
        sample = draw_sample(shop, getattr(shop, split), 0)
        asked = [(sample.users[a.user], a.question.prompt, a.question.answer) for a in sample.asked]
        rows = dataset[0][split]
        assert asked == list(zip(rows["user"], rows["instruction"], rows["answer"]))


def test_training_users_are_asked_at_so_many_different_times(shop, text_encoder):
    tied = copy(shop)
    events = tuple(Event("purchase", t, text="x", attributes={"category": "music"}) for t in (1.0, 2.0, 2.0, 2.0, 3.0))
    tied.histories = {**shop.histories, shop.train[0]: History(shop.train[0], events)}
    times = defaultdict(set)
    for triple in triples(tied, "train", UserQAConfig(per_user=3), text_encoder):
        times[triple.user].add(triple.cut.future[0].timestamp)
        assert triple.cut.history.timed
    assert times.pop(shop.train[0]) == {2.0, 3.0}
    assert len(times) > 20 and max(map(len, times.values())) == 3


def test_answers_are_texts_even_where_the_recipe_asks_by_letter(shop, text_encoder):
    lettered = copy(shop)
    lettered.recipe = replace(shop.recipe, letters=True)
    config = UserQAConfig(per_user=1)
    for ours, plain in zip(
        triples(lettered, "train", config, text_encoder), triples(shop, "train", config, text_encoder)
    ):
        assert ours.question == plain.question


def test_rank_is_by_cosine_to_the_mean_of_the_history_and_a_tie_is_not_easy(text_encoder):
    history = History("u", (Event("a", 1.0, text="a violin"), Event("a", 2.0, text="piano notes"), Event("b", 3.0)))
    options = ("garden", "music", "sport")
    model = text_encoder.model
    mean = np.mean([model.encode(t, normalize_embeddings=True) for t in ("a violin", "piano notes")], axis=0)
    order = sorted(options, key=lambda o: -float(model.encode(o) @ mean / np.linalg.norm(model.encode(o))))
    centre = history_vector(text_encoder, history)
    ranks = {o: answer_rank(text_encoder, centre, Question("t", "?", o, options)) for o in options}
    assert ranks == {option: place for place, option in enumerate(order, 1)} and order[0] == "music"
    nothing = history_vector(text_encoder, History("u", (Event("b", 3.0),)))
    assert answer_rank(text_encoder, nothing, Question("t", "?", "music", options)) == 3


def test_hard_triples_are_kept_and_easy_ones_of_train_by_share(shop, dataset, text_encoder, tmp_path):
    counts = {0.3: dataset[2]}
    for share in (0, 1):
        counts[share] = write_userqa(shop, tmp_path / str(share), UserQAConfig(easy_share=share), encoder=text_encoder)
    none, some, every = (counts[share] for share in (0, 0.3, 1))
    assert none.hard == some.hard == every.hard and none.hard.total() > 20
    assert not every.left_out and none.left_out.total() == every.total("train") - none.total("train")
    assert 0.6 < some.left_out.total() / none.left_out.total() < 0.8
    for part in (none, some):
        assert part.written["train", "next_purchase"] == every.written["train", "next_purchase"]
    for split in ("validation", "test"):
        name = f"data/{split}-00000-of-00001.parquet"
        assert digests(tmp_path / "0")[name] == digests(dataset[1])[name]
    kept = load(tmp_path / "0")["train"]
    assert all((rank is None) == (task == "next_purchase") for rank, task in zip(kept["rank"], kept["task"]))
    assert 1 not in kept["rank"] and 1 in dataset[0]["train"]["rank"]


def test_the_same_seed_makes_the_same_bytes(shop, dataset, text_encoder, tmp_path):
    write_userqa(shop, tmp_path / "again", encoder=text_encoder)
    assert digests(tmp_path / "again") == digests(dataset[1]) and len(digests(dataset[1])) == 4
    write_userqa(shop, tmp_path / "other", UserQAConfig(seed=1), encoder=text_encoder)
    assert not set(digests(tmp_path / "other").values()) & set(digests(dataset[1]).values())


def test_a_split_without_triples_is_left_out(shop, text_encoder, tmp_path):
    short = copy(shop)
    short.recipe = replace(shop.recipe, split=replace(shop.recipe.split, min_events=10_000))
    write_userqa(short, tmp_path / "out", UserQAConfig(per_user=1), encoder=text_encoder)
    loaded = load(tmp_path / "out")
    assert set(loaded) == {"train"} and len(loaded["train"]) > 30


def test_the_card_says_what_it_is(dataset):
    _, folder, counts = dataset
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert "persona-userqa" in front["tags"] and len(front["configs"][0]["data_files"]) == 3
    assert "holds users' records" in body and "--per-user 4 --easy-share 0.3 --seed 0" in body
    assert str(folder) not in body
    for task in counts.tasks:
        numbers = " | ".join(str(counts.written[split, task]) for split in ("train", "validation", "test"))
        assert f"| {task} | {numbers} |" in body


def test_a_folder_with_other_files_is_left_alone(shop, dataset, text_encoder, tmp_path):
    def refused(out, message, **options):
        before = digests(tmp_path)
        with pytest.raises(PersonaError, match=message):
            write_userqa(shop, out, UserQAConfig(per_user=1), encoder=text_encoder, **options)
        assert digests(tmp_path) == before

    (tmp_path / "file.txt").write_text("mine")
    refused(tmp_path / "file.txt", "is a file")
    refused(tmp_path / "file.txt" / "out", "cannot be written")
    refused(tmp_path, "not a UserQA dataset", overwrite=True)
    out = tmp_path / "out"
    out.mkdir()
    write_userqa(shop, out, UserQAConfig(per_user=1), encoder=text_encoder)
    refused(out, "--overwrite")
    (out / "notes.md").write_text("mine")
    refused(out, r"notes\.md", overwrite=True)
    (out / "notes.md").unlink()
    silent = copy(shop)
    silent.recipe = replace(shop.recipe, questions={})
    with pytest.raises(DataError, match="train would be empty, with 0 easy"):
        write_userqa(silent, out, encoder=text_encoder, overwrite=True)
    write_userqa(shop, out, encoder=text_encoder, overwrite=True)
    assert digests(out) == digests(dataset[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "out"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: UserQAConfig(per_user=0), "--per-user must be at least 1, not 0"),
        (lambda: UserQAConfig(easy_share=1.1), "--easy-share must be a share between 0 and 1, not 1.1"),
        (lambda: UserQAConfig(easy_share=float("nan")), "--easy-share"),
        (lambda: UserQAConfig(seed=-1), "--seed must not be negative"),
        (lambda: Rewriting("http://x/v1", ""), "both --rewrite-url and --rewrite-model"),
        (lambda: Rewriting("localhost:8000", "m"), "must begin with http"),
        (lambda: Rewriting("http://x/v1", "m", 0), "--rewrite-count must be at least 1"),
    ],
)
def test_settings_check_themselves(make, message):
    with pytest.raises(PersonaError, match=message):
        make()


def test_the_verb_refuses_before_it_reads_anything(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DEMO.read_text().replace("per_cut:", "per_cute:"))
    common = ("--data", tmp_path, "--out", tmp_path / "out")
    for arguments, message in (
        ((recipe,), "questions.next_purchase.per_cute"),
        ((DEMO, "--easy-share", "2"), "--easy-share"),
        ((DEMO, "--per-user", "0"), "--per-user"),
        ((DEMO, "--rewrite-url", "http://127.0.0.1:9/v1"), "--rewrite-model"),
        ((DEMO, "--out", recipe), "is a file"),
    ):
        done = run("data", "userqa", *common, *arguments)
        assert done.returncode == 1 and message in done.stderr and done.stderr.startswith("persona: ")
    assert not (tmp_path / "out").exists()
