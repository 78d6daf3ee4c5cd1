"""The reference LM of a task: what it reads in training is what the bench writes, and of training items alone."""

import copy
import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona.errors import DataError, PersonaError
from persona.evaluation.lamp.domain import LampDomain
from persona.evaluation.lamp.lm import build_lamp_lm, readings, tokenizer_lines
from persona.evaluation.lamp.official import OfficialDomain
from persona.evaluation.lamp.prompts import profile_prompt
from persona.evaluation.lamp.recipe import LampRecipe, LampSplit, load_lamp_recipe
from persona.history import ReaderSpec, SourceSpec
from persona.injection import PromptTemplate
from persona.training.configs import LMConfig, TrainingConfig
from persona.training.recipe import load_recipe
from persona.training.reference_lm import IGNORE, PackedRows, train_tokenizer
from persona.training.trained_on import TRAINED_ON, write_trained_on

LM = LMConfig(vocab_size=500, hidden_size=64, layers=1, context=512, rows_per_step=2, steps=2, plain_share=0.3)
COMMON = {
    "training": TrainingConfig(drop_events=0.5),
    "max_length": 256,
    "lm_items": [0, 1, 4],
    "lm": LM,
}
FILMS = LampRecipe(
    "films",
    "LaMP_3",
    sources={"rating": SourceSpec("item")},
    readers=[ReaderSpec("rating", "*.csv", "user", timestamp="time", value="stars", text="{film}")],
    source="rating",
    fields={"text": "{text}", "score": "{value:g}"},
    split=LampSplit(train=0.6, validation=0.2),
    lm_questions=3,
    **COMMON,
)
PAPERS = LampRecipe(
    "papers",
    "LaMP_5",
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
    lm_questions=1,
    **COMMON,
)


@pytest.fixture(scope="module", params=["films", "papers"])
def lamp(request, tmp_path_factory):
    """Two domains: films by user, whose titles tell whose they are, and papers by time."""
    folder, rng = tmp_path_factory.mktemp(request.param), np.random.default_rng(0)
    if request.param == "films":
        rows = [f"u{user},{'very ' * (n % 4)}film{user}x{n} x,{1 + n % 5},{n}" for user in range(20) for n in range(10)]
        (folder / "ratings.csv").write_text("\n".join(["user,film,stars,time", *rows]))
        return LampDomain(FILMS, folder)
    names = [f"a{n}" for n in range(6)]
    papers = [
        {"id": f"P{n}", "year": str(rng.integers(2010, 2021)), "title": f"On paper{n}x: a {'long ' * (n % 3)}study"}
        | {"abstract": f"  We write paper{n}x, and read it. ", "authors": rng.permutation(names)[:2].tolist()}
        for n in range(80)
    ]
    (folder / "papers.jsonl").write_text("\n".join(map(json.dumps, papers)))
    return LampDomain(PAPERS, folder)


@pytest.fixture(scope="module")
def words(lamp):
    return train_tokenizer(tokenizer_lines(lamp), LM)


def markers(history):
    """What tells its items from all others, such as film3x7 or paper12x."""
    texts = [event.text for event in history.events]
    return {next(w for w in text.replace(":", " ").split() if w[-1] == "x" or w[0] == "f") for text in texts}


@pytest.fixture(scope="module")
def held(lamp):
    """Markers of all that is asked in validation and test."""
    return {marker for s in lamp.validation + lamp.test for marker in markers(s.profile.of([s.target]))}


def test_a_reading_is_the_prompt_that_the_bench_writes(lamp, words):
    draw, rng, counts = readings(lamp, words), np.random.default_rng(0), set()
    known = {e.event_id: e for h in lamp.histories() for e in h.events}
    parts = {lamp.task.part.format_map(event.attributes): event for event in known.values()}
    for _ in range(200):
        reading = draw(rng)
        assert 1 <= len(reading.questions) <= lamp.recipe.lm_questions
        first = reading.questions[0][0]
        assert first.startswith(lamp.task.input.partition("{")[0])
        if not reading.history:
            counts.add(0)
            continue
        (shared,) = reading.history
        items = sorted((shared.index(part), event) for part, event in parts.items() if part in shared)
        items = [event for _, event in items]
        counts.add(len(items))
        assert f"{shared}{reading.glue}{first}" == profile_prompt(lamp.task, first, items, words, 256)
    assert {0, 1, 4} <= counts


def test_where_no_items_are_shown_first_events_are_asked_too(lamp, words):
    firsts = {lamp._input(h.events[0]) for h in lamp.histories()}
    rng = np.random.default_rng(0)
    with_profile = {q for _ in range(300) for q, _ in lamp.draw(rng).questions}
    drawn = [lamp.draw(rng, alone=True) for _ in range(300)]
    assert not any(len(draw.profile) for draw in drawn)
    alone = {question for draw in drawn for question, _ in draw.questions}
    assert alone & firsts and alone & with_profile
    if lamp.recipe.split.by == "user":  # a paper that is one author's first may have another who wrote before
        assert not with_profile & firsts
    bare = copy.copy(lamp)
    bare.recipe = replace(lamp.recipe, lm_items=[0])
    draw = readings(bare, words)
    assert {q for _ in range(300) for q, _ in draw(rng).questions} & firsts


def test_items_are_any_of_the_profile_in_any_order(lamp, words):
    bare = copy.copy(lamp)
    changed = replace(lamp.recipe.training, drop_events=0.0, short_share=0.0)
    bare.recipe = replace(lamp.recipe, training=changed, lm_items=[1, 4])
    places = {
        lamp.task.part.format_map(event.attributes): place
        for history in lamp.histories()
        for place, event in enumerate(history.events)
    }
    draw, rng, first, rising = readings(bare, words), np.random.default_rng(0), set(), set()
    for reading in (draw(rng) for _ in range(200)):
        (shared,) = reading.history
        order = [place for _, place in sorted((shared.index(part), n) for part, n in places.items() if part in shared)]
        first.add(order[0])
        rising |= {order == sorted(order)} if len(set(order)) > 2 else set()
    assert rising == {True, False} and len(first) > 5


def test_nothing_of_validation_or_test_is_read(lamp, words, held):
    trained = {marker for history in lamp.histories() for marker in markers(history)}
    assert held and not held & trained
    draw, rng, seen = readings(lamp, words), np.random.default_rng(0), ""
    for reading in (draw(rng) for _ in range(500)):
        seen += " ".join([*reading.history, *(text for pair in reading.questions for text in pair)]) + "\n"
    for text in (seen, "\n".join(tokenizer_lines(lamp))):
        assert not [marker for marker in held if f"{marker} " in text or f"{marker}:" in text or f"{marker}," in text]
        assert sum(marker in text for marker in trained) > 0.8 * len(trained)


def blocks(row):
    """Of each segment that answers something: positions in the row of its history, and its own."""
    for segment in np.unique(row["segments"][row["segments"] != IGNORE]):
        own = np.flatnonzero(row["segments"] == segment)
        home = row["parents"][own[0]]
        if home != segment or (row["labels"][own] != IGNORE).any():
            yield (np.flatnonzero(row["segments"] == home) if home != segment else own[:0]), own


def test_packed_tokens_are_the_templates_own(lamp, words):
    template, rows = PromptTemplate(words), PackedRows(readings(lamp, words), words, LM, size=30)
    with_items = without = 0
    for row in (rows[n] for n in range(30)):
        for history, own in blocks(row):
            ids = row["input_ids"][np.concatenate([history, own])].tolist()
            text = words.decode(ids)
            assert text.startswith("<|user|>") and text.endswith("<|end|>")
            prompt, answer = text.removeprefix("<|user|>").removesuffix("<|end|>").split("<|end|><|assistant|> ")
            assert ids == template.prompt(prompt).ids + template.answer(prompt, answer)
            start = (row["labels"][own] != IGNORE).argmax()
            assert row["labels"][own][start:].tolist() == template.answer(prompt, answer)
            with_items, without = with_items + (len(history) > 0), without + (len(history) == 0)
            if not len(history):  # nothing stands before the input, which opens the user's turn
                assert prompt.startswith(lamp.task.input.partition("{")[0])
    assert with_items > 10 and without > 10


def test_without_items_and_plain_rows_every_prompt_opens_the_turn(lamp, words):
    """Where a text of no items is drawn, there is no empty history before the question."""
    bare = copy.copy(lamp)
    bare.recipe = replace(lamp.recipe, lm_items=[0])
    config = replace(LM, plain_share=0.0)
    rows = PackedRows(readings(bare, words), words, config, size=5)
    template = PromptTemplate(words)
    for row in (rows[n] for n in range(5)):
        found = list(blocks(row))
        assert len(found) > 3 and all(len(history) == 0 for history, _ in found)
        for _, own in found:
            text = words.decode(row["input_ids"][own])
            prompt, answer = text.removeprefix("<|user|>").removesuffix("<|end|>").split("<|end|><|assistant|> ")
            assert row["input_ids"][own].tolist() == template.prompt(prompt).ids + template.answer(prompt, answer)
            assert row["positions"][own].tolist() == list(range(len(own)))


def test_words_of_the_instruction_and_labels_are_tokens(lamp, words):
    instruction = lamp.task.input.partition("{")[0]
    assert len(words(instruction).input_ids) < 2 * len(instruction.split())
    for label in lamp.task.labels:
        assert len(words(f" {label}").input_ids) == 1


def test_a_tiny_build_is_a_checkpoint_with_a_note_of_what_it_has_seen(lamp, tmp_path):
    folder = build_lamp_lm(lamp, tmp_path / "lm", steps=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) and model.config.hidden_size == 64
    assert set(json.loads((folder / TRAINED_ON).read_text())) == lamp.fingerprints("train")
    ids = tokenizer(lamp.test[0].input, return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_an_lm_is_replaced_only_where_that_is_said(lamp, tmp_path):
    folder = build_lamp_lm(lamp, tmp_path / "lm", steps=1)
    with pytest.raises(PersonaError, match="holds an LLM already; give another --out, or --overwrite"):
        build_lamp_lm(lamp, folder, start=folder, steps=1)
    build_lamp_lm(lamp, folder, start=folder, steps=1, overwrite=True)


def test_an_lm_goes_on_from_another_and_notes_what_both_have_seen(lamp, tmp_path):
    start = build_lamp_lm(lamp, tmp_path / "start", steps=1)
    write_trained_on({*lamp.fingerprints("train"), "somebody"}, start)
    still = copy.copy(lamp)
    still.recipe = replace(lamp.recipe, lm=replace(LM, learning_rate=0.0, vocab_size=400))
    out = build_lamp_lm(still, tmp_path / "out", start=start, steps=1)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (start, out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(start).get_vocab()
    moved = AutoModelForCausalLM.from_pretrained(build_lamp_lm(lamp, tmp_path / "moved", start=start, steps=1))
    assert not torch.equal(moved.state_dict()["lm_head.weight"], before["lm_head.weight"])
    assert set(json.loads((out / TRAINED_ON).read_text())) == {*lamp.fingerprints("train"), "somebody"}


@pytest.mark.parametrize("part", ["validation", "test"])
def test_an_lm_that_has_seen_what_is_asked_is_no_start(lamp, tmp_path, part):
    write_trained_on(lamp.fingerprints(part), tmp_path)
    with pytest.raises(DataError, match="was trained on"):
        build_lamp_lm(lamp, tmp_path / "out", start=tmp_path, steps=1)


def test_the_recipes_of_films_know_people_under_one_name():
    """The LM of lamp.yaml goes on from that of uqa.yaml; only by equal first events is a test user recognised."""
    films = Path(__file__).parents[3] / "adapters" / "movies"
    lamp, uqa = load_lamp_recipe(films / "lamp.yaml"), load_recipe(films / "uqa.yaml")
    timed = [[reader for reader in recipe.readers if reader.timestamp] for recipe in (lamp, uqa)]
    assert timed[0] == timed[1]
    shares = [(r.split.train, r.split.validation, r.split.seed) for r in (lamp, uqa)]
    assert shares[0] == shares[1]


@pytest.mark.parametrize("task", ["LaMP_1", "LaMP_2", "LaMP_4", "LaMP_7"])
def test_readings_of_official_files_are_prompts_too(official, tmp_path, tokenizer, task):
    """LaMP_1 has its items inside the input, so a reading cannot have the input after them."""
    for part in ("train", "dev"):
        official(tmp_path, task, "time", part)
    split = LampSplit(train=0.1, validation=0.34)
    domain = OfficialDomain(
        LampRecipe("x", task, official="time", split=split, max_length=400, lm_items=[0, 2]), tmp_path
    )
    draw, rng = readings(domain, tokenizer), np.random.default_rng(0)
    prompts = set()
    for sample in domain.train:
        events = sample.profile.events
        pairs = [[a, b] for a in events for b in events if a is not b]
        prompts |= {profile_prompt(domain.task, sample.input, items, tokenizer, 400) for items in [[], *pairs]}
        prompts |= {profile_prompt(domain.task, sample.input, [item], tokenizer, 400) for item in events}
    for reading in (draw(rng) for _ in range(40)):
        question = reading.questions[0][0]
        assert "".join(reading.history) + (reading.glue if reading.history else "") + question in prompts
