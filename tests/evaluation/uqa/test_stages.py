"""UQA from records to table: every stage on a small shop, what a second call does, and what is refused."""

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from persona.demo.shop import generate_shop
from persona.encoders import EncoderConfig
from persona.errors import DataError, PersonaError, RecipeError
from persona.evaluation.intervals import interval
from persona.evaluation.uqa.run import run_uqa
from persona.evaluation.uqa.stages import UQA, Run
from persona.evaluation.uqa.table import Table
from persona.evaluation.uqa.tasks import DIMENSIONS
from persona.injection import PersonalizedLM
from persona.training.configs import PretrainingConfig
from persona.training.questions import QuestionSpec
from persona.training.recipe import Domain, load_recipe
from persona.training.trained_on import write_trained_on

DEMO = Path(__file__).parents[3] / "adapters" / "demo" / "recipe.yaml"
BUY = {"source": "purchase", "attribute": "category", "choices": 3}
QUESTIONS = {
    "direct_feature": QuestionSpec("nth_attribute", prompt="Category of {n}?", per_cut=1, **BUY),
    "match_feature": QuestionSpec("count_attribute", prompt="How many {value} of the last 5?", last=5, **BUY),
    "next_item": QuestionSpec("next_item", "purchase", "Will this user buy {item} next?"),
    "next_attribute": QuestionSpec("next_attribute", prompt="Category next?", **BUY),
    "long_term_interest": QuestionSpec("top_attribute", prompt="Category most?", **BUY),
    "short_term_interest": QuestionSpec("top_attribute", prompt="Category lately?", last=4, **BUY),
    "interest_trajectory": QuestionSpec("trajectory", prompt="From where to where?", parts=2, **BUY),
}


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Intervals of 200 resamples, not 2,000, in which most of these tests' time would go."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("persona.evaluation.uqa.table.interval", partial(interval, n=200))
        yield


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return generate_shop(tmp_path_factory.mktemp("shop"), users=60)


@pytest.fixture(scope="module")
def uqa_domain(shop):
    recipe = load_recipe(DEMO)
    return Domain(
        replace(
            recipe,
            window=20,
            questions=QUESTIONS,
            split=replace(recipe.split, cuts=1),
            encoder=EncoderConfig(width=32, heads=2, tokens=2, max_events=20, item_targets="id", mentions=True),
            pretraining=PretrainingConfig(steps=4, batch_size=4, evaluations=2),
            training=replace(recipe.training, steps=2, histories_per_step=2, questions_per_history=2),
        ),
        shop,
    )


@pytest.fixture(scope="module")
def done(uqa_domain, llm_path, tmp_path_factory):
    """A folder with everything in it, the results, and what was said."""
    out, said = tmp_path_factory.mktemp("uqa"), []
    runs = {"backbones": ["sasrec", "gru4rec"], "heads": ["resampler", "linear"], "seeds": [0]}
    return out, run_uqa(uqa_domain, llm_path, out, **runs, say=said.append), said


def test_every_run_has_its_files_and_rows(done):
    out, results, said = done
    names = [f"{backbone}-{head}-s0" for backbone in ("sasrec", "gru4rec") for head in ("resampler", "linear")]
    assert [r["name"] for r in results] == ["baselines", *names]
    assert sorted(p.stem for p in (out / "results").iterdir()) == sorted(["baselines", *names])
    assert sorted(p.name for p in (out / "pretrain").iterdir()) == ["gru4rec-s0", "sasrec-s0"]
    rows = {"chance", "majority", "item_cosine", "ease", "no_history", "learned_prompt", "text_128", "text_256"}
    assert set(results[0]["results"]) == rows | {"retrieved_128", "text_full"}
    for result in results[1:]:
        assert set(result["results"]) == {"soft_k1", "soft_k2", "shuffled_user"}
        assert set(result["lengths"]) == {"5", "20"}
        others = ("shuffled_user", "learned_prompt", "no_history", "text_full")
        assert set(result["paired"]) == {f"soft_k2 - {name}" for name in others}
        assert result["results"]["soft_k2"]["tokens"]["user"] == 3  # two rows and the line break behind them
    assert any("sasrec-linear-s0: **ours, K = 2**" in line for line in said)


def test_results_have_the_keys_of_the_harness_and_of_the_evidence(done, uqa_domain):
    result = done[1][1]
    assert {"results", "configs", "versions", "n-samples", "higher_is_better", "git_hash", "date"} <= result.keys()
    assert {"seed", "data_sha256", "command", "config", "n"} <= result.keys()
    row = result["results"]["soft_k1"]
    assert set(row) == {*QUESTIONS, *DIMENSIONS, "mean", "tokens"}
    for name, members in DIMENSIONS.items():
        assert row[name]["acc"] == pytest.approx(np.mean([row[m]["acc"] for m in members]), abs=2e-4)
    assert all(cell["low"] <= cell["acc"] <= cell["high"] for name, cell in row.items() if name != "tokens")
    answers = result["n"]["answers"]
    assert set(answers) == set(QUESTIONS) and answers["next_item"] <= len(uqa_domain.test) < 60


def test_one_seed_of_questions_for_all(done):
    baselines, *others = done[1]
    assert {json.dumps(r["n"]) for r in others} == {json.dumps(baselines["n"])}


def test_a_second_call_runs_nothing_and_a_lost_stage_alone_is_made_again(done, uqa_domain, llm_path):
    out, results, _ = done
    said = []
    runs = {"backbones": ["sasrec"], "heads": ["resampler"], "seeds": [0], "say": said.append}
    again = run_uqa(uqa_domain, llm_path, out, **runs)
    assert again == results[:2] and len(said) == 1
    lost = out / "results" / "sasrec-resampler-s0.json"
    kept = lost.read_text()
    lost.unlink()
    run_uqa(uqa_domain, llm_path, out, **runs)
    made = json.loads(lost.read_text())
    assert made["results"] == json.loads(kept)["results"]
    assert [line for line in said if line.startswith(("pre-", "align", "eval"))] == ["evaluating sasrec-resampler-s0"]


def test_a_mean_head_leaves_the_pretrained_encoder_as_it_is_and_the_resampler_tunes_it(done, text_encoder):
    from safetensors.torch import load_file

    out = done[0]
    before = load_file(out / "pretrain" / "sasrec-s0" / "model.safetensors")
    for head, frozen in (("linear", True), ("resampler", False)):
        after = load_file(out / "align" / f"sasrec-{head}-s0" / "encoder" / "model.safetensors")
        same = all((before[name] == after[name]).all() for name in before if name.startswith(("backbone", "events")))
        assert same == frozen, head


def test_stages_stop_where_they_are_told(uqa_domain, llm_path, tmp_path):
    runs = {"backbones": ["set"], "heads": ["mlp"], "seeds": [3], "name": "small"}
    assert run_uqa(uqa_domain, llm_path, tmp_path, **runs, until="pretrain") == []
    assert {p.name for p in tmp_path.iterdir()} == {"made_from", "pretrain"}
    assert [p.name for p in (tmp_path / "pretrain").iterdir()] == ["set-small-s3"]
    bench = UQA(uqa_domain, llm_path, tmp_path)
    with pytest.raises(PersonaError, match="holds no finished adapter; run the stage align first"):
        bench.evaluate(Run("set", "mlp", 3, "small"))


def test_what_is_refused(uqa_domain, shop, llm_path, tmp_path):
    for bad in ({"backbones": ["lstm"]}, {"heads": ["crown"]}):
        with pytest.raises(RecipeError, match=r"backbones are .* heads are"):
            run_uqa(uqa_domain, llm_path, tmp_path, **{"backbones": ["set"], "heads": ["mlp"], "seeds": [0], **bad})
    with pytest.raises(RecipeError, match=r"questions\.favourite_category is not a sub-task of UQA"):
        UQA(Domain(load_recipe(DEMO), shop), llm_path, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_llm_that_has_seen_the_test_users_is_refused(uqa_domain, shop, tmp_path):
    other = Domain(replace(uqa_domain.recipe, split=replace(uqa_domain.recipe.split, seed=5)), shop)
    write_trained_on(other.fingerprints(other.train), tmp_path)
    with pytest.raises(DataError, match="was trained on"):
        UQA(uqa_domain, tmp_path, tmp_path / "out")


def test_a_user_who_was_not_asked_changes_no_mean(done, uqa_domain, llm_path, text_encoder):
    model = PersonalizedLM.from_pretrained(done[0] / "align" / "sasrec-linear-s0", llm_path, text_encoder=text_encoder)
    table = Table(uqa_domain, model, print)
    values = np.ones((4, 7))
    values[1:, 0], values[0, 1:] = np.nan, 0.0
    summary = table.summary(values)
    assert summary["direct_feature"] == {"acc": 1.0, "low": 1.0, "high": 1.0}
    assert summary["match_feature"]["acc"] == 0.75 and summary["sequence understanding"]["acc"] == 0.875
    values[:, 2] = np.nan
    summary = table.summary(values)
    assert "next_item" not in summary and "action prediction" not in summary and "mean" not in summary


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 3}, "holds sasrec-linear-s0 with another steps"),
        ({"pretrain_steps": 5}, "holds pretrain-sasrec-s0 with another steps"),
        ({"encoder": {"width": 48}}, "holds pretrain-sasrec-s0 with another encoder"),
        ({"training": {"learning_rate": 0.5}}, "holds sasrec-linear-s0 with another training"),
        ({"split": {"seed": 1}}, "holds pretrain-sasrec-s0 with another records"),
        ({"llm": "other"}, "holds sasrec-linear-s0 with another llm"),
    ],
    ids=str,
)
def test_a_folder_of_other_settings_is_refused(done, uqa_domain, shop, llm_path, tmp_path, change, said):
    recipe, options = uqa_domain.recipe, {name: change[name] for name in change if "steps" in name}
    for name in {"encoder", "training", "split"} & change.keys():
        recipe = replace(recipe, **{name: replace(getattr(recipe, name), **change[name])})
    llm = llm_path if "llm" not in change else shutil.copytree(llm_path, tmp_path / "llm")
    before = {file: file.read_bytes() for file in done[0].rglob("*") if file.is_file()}
    with pytest.raises(PersonaError, match=f"{said}; give this one its own --out"):
        run_uqa(Domain(recipe, shop), llm, done[0], backbones=["sasrec"], heads=["linear"], seeds=[0], **options)
    assert {file: file.read_bytes() for file in done[0].rglob("*") if file.is_file()} == before


def test_baselines_of_other_questions_are_not_compared_with(done, uqa_domain, llm_path, tmp_path):
    shutil.copytree(done[0], tmp_path / "out")
    (tmp_path / "out" / "results" / "sasrec-linear-s0.json").unlink()
    other = copy.copy(uqa_domain)
    changed = {**QUESTIONS, "direct_feature": replace(QUESTIONS["direct_feature"], prompt="The {n}th category?")}
    other.recipe = replace(uqa_domain.recipe, questions=changed)
    with pytest.raises(DataError, match="are of other questions or users; give the changed run its own --out"):
        UQA(other, llm_path, tmp_path / "out").evaluate(Run("sasrec", "linear", 0))
