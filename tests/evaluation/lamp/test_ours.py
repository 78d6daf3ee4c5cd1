"""Our user tokens before a frozen LLM: what they are made of, what hidden labels leave, and what a batch holds."""

from dataclasses import replace

import pytest
import torch

from persona.encoders import EncoderConfig, UserEncoder, Vocabulary
from persona.evaluation.lamp.domain import LampDomain
from persona.evaluation.lamp.models import OurLM
from persona.evaluation.lamp.recipe import LampRecipe
from persona.evaluation.lamp.tasks import TASKS
from persona.evaluation.lamp.training import Collate, Draws
from persona.history import Event, ReaderSpec, SourceSpec
from persona.injection import PersonalizedLM, load_llm
from persona.training.configs import TrainingConfig

from .films import ANN, BOB, FILMS, SAMPLES, make_profile, make_recipe, train_a_step, write


@pytest.fixture(scope="module")
def ratings():
    every = make_profile("every", [1, 2, 3, 4, 5])
    stars = every.of(replace(e, attributes={**e.attributes, "stars": f"{e.value:g}"}) for e in every.events)
    return Vocabulary.fit([ANN, BOB, stars], {"rating": SourceSpec("item")}, min_count=1)


@pytest.fixture
def ours(llm_path, small_encoder, ratings):
    """`ours(...)` is an untrained `OurLM`, the same each time, in evaluation mode."""

    def make(without_history=False, encoder=None, **fields):
        torch.manual_seed(3)
        shape = {"width": 32, "heads": 2, "layers": 1, "tokens": 4, "max_events": 16, "dropout": 0.0}
        config = EncoderConfig(**shape, **(encoder or {}))
        recipe = make_recipe(**fields)
        user_encoder = UserEncoder(config, ratings, small_encoder)
        return OurLM(*load_llm(llm_path), user_encoder, recipe, without_history=without_history).eval()

    return make


def test_a_shared_profile_is_encoded_once_and_rows_are_those_of_inference(ours):
    model = ours()
    given = model.condition(SAMPLES)
    assert len(given["events"].mask) == 3 and given["owner"].tolist() == [0, 1, 0, 2]
    with torch.no_grad():
        states, mask = model.encoder.states(given["events"])
        trained = model.projector(
            model.encoder.resample(states[given["owner"]], mask[given["owner"]], given["instructions"])
        )
    assert trained.shape == (4, model.soft, model.llm.config.hidden_size) and model.soft == 4
    assert torch.allclose(model.rows(SAMPLES), trained, atol=1e-4)


def test_rows_are_those_of_a_personalized_lm(ours, llm_path):
    model = ours()
    same = PersonalizedLM(*load_llm(llm_path), model.encoder).eval()
    same.projector.load_state_dict(model.projector.state_dict())
    rows = same.soft_rows(same.encoder.read([s.profile for s in SAMPLES]), [s.input for s in SAMPLES])
    assert torch.allclose(model.rows(SAMPLES), rows, atol=1e-5)
    assert model.adapter.domain == "films"


def test_without_history_only_the_input_counts(ours):
    told, untold = ours().rows(SAMPLES), ours(without_history=True).rows(SAMPLES)
    assert not torch.allclose(told[0], told[1], atol=1e-3)
    assert torch.allclose(untold[0], untold[1], atol=1e-5) and torch.allclose(untold[2], untold[3], atol=1e-5)
    assert not torch.allclose(untold[0], untold[2], atol=1e-3)
    assert torch.allclose(untold[3], told[3], atol=1e-5)
    assert ours(without_history=True).condition(SAMPLES)["events"].mask.sum() == 0


@pytest.mark.parametrize("kind", ["item", "text"])
def test_labels_vanish_where_the_recipe_hides_them(ours, kind):
    other = replace(SAMPLES[0], profile=make_profile("ann", [1, 5, 1, 1, 3]))
    for labels in (True, False):
        model = ours(labels=labels)
        model.encoder.vocabulary.sources["rating"] = kind
        assert torch.allclose(model.rows([SAMPLES[0]]), model.rows([other]), atol=1e-6) == (not labels)
        trained = [model.condition([sample])["events"] for sample in (SAMPLES[0], other)]
        states = [model.encoder.states(events)[0] for events in trained]
        assert torch.allclose(*states, atol=1e-6) == (not labels)
        model.encoder.vocabulary.sources["rating"] = "item"


def test_hidden_labels_are_not_in_an_items_attributes_either(ours):
    other = replace(SAMPLES[0], profile=make_profile("ann", [1, 5, 1, 1, 3]))
    model = ours(labels=False, encoder={"item_attributes": True})
    assert torch.allclose(model.rows([SAMPLES[0]]), model.rows([other]), atol=1e-6)


def test_hidden_labels_are_not_in_the_column_that_they_were_made_of_either(ours):
    """Where a recipe says `score: "{stars}"`, the event has both attributes."""

    def rows(stars):
        events = (replace(e, attributes={**e.attributes, "stars": f"{e.value:g}"}) for e in stars.events)
        assert {f"rating/stars/{n}" for n in range(1, 6)} <= set(model.encoder.vocabulary.categories)
        return model.rows([replace(SAMPLES[0], profile=stars.of(events))])

    model = ours(labels=False, encoder={"item_attributes": True})
    assert torch.allclose(rows(ANN), rows(make_profile("ann", [1, 5, 1, 1, 3])), atol=1e-6)


def test_a_hidden_title_leaves_the_abstract():
    paper = Event("paper", 1.0, "Bees. We count bees.", attributes={"title": "Bees", "abstract": "We count bees."})
    hidden = TASKS["LaMP_5"].unlabelled(paper)
    assert (hidden.text, hidden.value, hidden.timestamp) == ("We count bees.", None, 1.0)


def test_without_the_instruction_all_inputs_get_the_same_tokens(ours):
    for instruction in (True, False):
        rows = ours(instruction=instruction).rows(SAMPLES)
        assert torch.allclose(rows[0], rows[2], atol=1e-6) == (not instruction)
        assert not torch.allclose(rows[0], rows[1], atol=1e-3)


def test_training_moves_ours_and_not_the_llm(ours):
    moved = train_a_step(ours())
    assert {name.partition(".")[0] for name in moved} == {"encoder", "projector"}


def test_ours_is_saved_and_read_back(ours, tmp_path):
    model = ours()
    train_a_step(model)
    model.save_pretrained(tmp_path)
    other = ours()
    assert not torch.allclose(other.rows(SAMPLES), model.rows(SAMPLES), atol=1e-3)
    other.load_trained(tmp_path)
    assert torch.equal(other.rows(SAMPLES), model.rows(SAMPLES))


# --- training draws -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def film_domain(tmp_path_factory):
    """Ten users with six films each."""
    folder = tmp_path_factory.mktemp("films")
    rows = [f"u{user},{film},{1 + (user + n) % 5},{n}" for user in range(10) for n, film in enumerate(FILMS)]
    (folder / "ratings.csv").write_text("\n".join(["user,film,stars,time", *rows]))
    reader = ReaderSpec("rating", "*.csv", "user", timestamp="time", value="stars", text="{film}")
    recipe = LampRecipe(
        "films",
        "LaMP_3",
        sources={"rating": SourceSpec("item")},
        readers=[reader],
        source="rating",
        fields={"text": "{text}", "score": "{value:g}"},
        training=TrainingConfig(questions_per_history=3, drop_events=0.5),
    )
    return LampDomain(recipe, folder)


def test_draws_are_repeatable_and_share_their_profile(film_domain):
    draws, again = Draws(film_domain, 10, seed=1), Draws(film_domain, 10, seed=1)
    assert len(draws) == 10 and [draws[n] for n in range(10)] == [again[n] for n in range(10)]
    many = [draw for draw in map(draws.__getitem__, range(10)) if len(draw) == 3]
    assert many and [sample.id.partition("/")[2] for sample in many[0]] == ["0", "1", "2"]
    assert all(len({id(sample.profile) for sample in draw}) == 1 for draw in many)
    assert all(draws[n][0].id == f"{n}/0" for n in range(10))
    assert draws[4] != draws[5] and draws[4] != Draws(film_domain, 10, seed=2)[4]


def test_half_the_batches_use_all_rows_and_half_a_prefix_that_the_draw_decides(ours, film_domain):
    model, draws = ours(), Draws(film_domain, 40, seed=1)
    counts, again = (
        [int(Collate(model, write, prefixes=True)([draws[n]])["batch"].soft.sum(1).unique()) for n in range(40)]
        for _ in range(2)
    )
    assert counts == again and set(counts) == {1, 2, 3, 4} and 16 < counts.count(4) < 36
    assert all((Collate(model, write)([draws[n]])["batch"].soft.sum(1) == 4).all() for n in range(10))


def test_a_batch_holds_what_is_written_and_the_answers(ours):
    model = ours()
    batch = Collate(model, lambda sample: f"written {sample.input}")([SAMPLES[:1], SAMPLES[1:2]])["batch"]
    for row, sample in zip(range(2), SAMPLES):
        prompt = model.template.prompt(f"written {sample.input}", 4)
        answer = model.template.answer("?", sample.output)
        ids = [0 if not known else token for token, known in zip(prompt.ids, prompt.is_token)]
        assert batch.input_ids[row][batch.attention_mask[row] > 0].tolist() == ids + answer
        assert batch.labels[row][batch.labels[row] >= 0].tolist() == answer
