"""PPlug: one row for the person and one for the instruction, what moves them, and what training moves."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from persona.evaluation.lamp.pplug import PPlug, PPlugTrainer
from persona.evaluation.lamp.recipe import PPlugConfig
from persona.history import History
from persona.injection import load_llm
from persona.injection.projector import mean_row_norm
from persona.training.arguments import training_arguments
from persona.training.configs import TrainingConfig

from .films import ANN, SAMPLES, ask, make_profile, make_recipe, train_a_step


@pytest.fixture
def pplug(llm_path, small_encoder):
    """`pplug(**fields of PPlugConfig)` is an untrained PPlug, the same each time, in evaluation mode."""

    def make(labels=True, **fields):
        torch.manual_seed(3)
        recipe = make_recipe(pplug=PPlugConfig(**fields), labels=labels)
        return PPlug(*load_llm(llm_path), small_encoder, recipe).eval()

    return make


def unit(*shape, seed=0):
    """Random unit vectors."""
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def everything(vectors):
    return torch.ones(vectors.shape[:2], dtype=torch.bool)


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
