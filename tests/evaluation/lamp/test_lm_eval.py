import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from persona.errors import DataError, PersonaError
from persona.evaluation.lamp.files import read_samples
from persona.evaluation.lamp.lm_eval import export_lm_eval
from persona.evaluation.lamp.metrics import score
from persona.evaluation.lamp.models import PlainLM
from persona.evaluation.lamp.prompts import profile_prompt
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS
from persona.history import History
from persona.injection import load_llm

DEMO_LM = Path(__file__).parents[3] / "adapters" / "demo" / "lm"
GOLDS = {"LaMP_1": ["[1]", "[2]", "[1]"], "LaMP_3": ["5", "1", "3"], "LaMP_5": ["A hat", "Bees {{ buzz }}", "[1] : 2"]}
ANSWERS = {"LaMP_1": ["[1]", " [2]\n", "[2]"], "LaMP_3": ["4", "many", "2.5"], "LaMP_5": ["A red hat", "", "[1] 2 3"]}
METRICS = {"LaMP_1": ["accuracy"], "LaMP_3": ["mae", "mse"], "LaMP_5": ["rouge1", "rougeL"]}


def make_samples(golds):
    return [Sample(f"0{n}", f"What of {{{{ {n} }}}}?", History("ana"), gold) for n, gold in enumerate(golds)]


def written(sample):
    return f"Read: {sample.input} \u2028 größe"


def expected(task, predictions, golds):
    """The metrics of `score`, of which lm-eval shows those that are means."""
    found = score(task, predictions, golds)
    found.pop("macro_f1", None)
    if "rmse" in found:
        found["mse"] = found.pop("rmse") ** 2
    return found


@pytest.mark.parametrize("name", GOLDS)
def test_lm_eval_reads_the_exported_task_from_any_folder(name, tmp_path):
    tasks = pytest.importorskip("lm_eval.tasks")
    samples = make_samples(GOLDS[name])
    config = export_lm_eval(iter(samples), TASKS[name], "2024-01-01", tmp_path / "first", written, 7)
    assert config == tmp_path / "first" / "2024-01-01.yaml"
    (tmp_path / "first").rename(tmp_path / "second")

    manager = tasks.TaskManager(include_path=str(tmp_path / "second"), include_defaults=False)
    task = manager.load(["2024-01-01"])["tasks"]["2024-01-01"]
    docs = list(task.test_docs())
    assert docs == [{"id": s.id, "prompt": written(s), "output": s.output} for s in samples]
    assert [task.fewshot_context(doc, 0) for doc in docs] == [written(s) for s in samples]
    assert [task.doc_to_target(doc) for doc in docs] == GOLDS[name]
    asked = task.construct_requests(docs[0], "text").args[1]
    assert asked == {"do_sample": False, "temperature": 0.0, "max_gen_toks": 7, "until": []}

    scored = [task.process_results(doc, [answer]) for doc, answer in zip(docs, ANSWERS[name])]
    found = {metric: mean([s[metric] for s in scored]) for metric, mean in task.aggregation().items()}
    ids = [doc["id"] for doc in docs]
    wanted = expected(TASKS[name], dict(zip(ids, ANSWERS[name])), dict(zip(ids, GOLDS[name])))
    assert list(found) == METRICS[name]
    assert found == pytest.approx(wanted)
    assert min(found.values()) > 0
    assert set(task.higher_is_better().values()) == {name != "LaMP_3"}


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a*", "a.b", "../a", "-a", "a\n", "a/b"])
def test_a_name_that_lm_eval_would_not_find_is_refused(name, tmp_path):
    with pytest.raises(PersonaError, match="name"):
        export_lm_eval(make_samples(["1"]), TASKS["LaMP_3"], name, tmp_path / "out", written, 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "samples, message",
    [
        ([], "no samples"),
        (make_samples([None]), "'00' has no gold answer"),
        (make_samples(["1"]) * 2, "two samples have the id '00'"),
        (make_samples(["1", "six"]), "'six' is none of 1, 2, 3, 4, 5"),
    ],
)
def test_samples_that_cannot_be_scored_are_refused(samples, message, tmp_path):
    with pytest.raises(DataError, match=message):
        export_lm_eval(samples, TASKS["LaMP_3"], "stars", tmp_path / "out", written, 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_line_gives_our_prompts_answers_and_metrics(official, tmp_path):
    pytest.importorskip("lm_eval")
    llm, tokenizer = load_llm(DEMO_LM)
    model = PlainLM(llm, tokenizer).eval()
    prompts, answers = {}, {}
    for name, task in ((name, TASKS[name]) for name in GOLDS):

        def write(sample, task=task):
            return profile_prompt(task, sample.input, sample.profile.events[:2], tokenizer)

        samples = list(read_samples(*official(tmp_path / "data", name, "user"), task))
        asked = {s.id: model.template.prompt(write(s)) for s in samples}
        prompts[name] = {id: model.template.tokenizer.decode(prompt.ids) for id, prompt in asked.items()}
        answers[name] = {id: model.complete([prompt], None, max_new_tokens=8)[0] for id, prompt in asked.items()}
        if name == "LaMP_5":  # or no word would be right
            samples = [replace(s, output=f"{answers[name][s.id]} {s.output}") for s in samples]
        export_lm_eval(samples, task, name.lower(), tmp_path / "tasks", write, 8)

    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={DEMO_LM},dtype=float32"]
    command += ["--apply_chat_template", "--include_path", "tasks", "--tasks", ",".join(GOLDS).lower()]
    command += ["--limit", "2", "--log_samples", "--output_path", "out", "--device", "cpu"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True)

    (results,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(results.read_text(encoding="utf-8"))["results"]
    for name, task in ((name, TASKS[name]) for name in GOLDS):
        (logged,) = (tmp_path / "out").rglob(f"samples_{name.lower()}_*.jsonl")
        logged = {(one := json.loads(line))["doc"]["id"]: one for line in logged.open(encoding="utf-8")}
        assert list(logged) == list(answers[name])[:2]
        given = {id: one["filtered_resps"][0] for id, one in logged.items()}
        assert {id: answer.strip() for id, answer in given.items()} == {id: answers[name][id] for id in logged}
        assert [one["arguments"]["gen_args_0"]["arg_0"] for one in logged.values()] == list(prompts[name].values())[:2]
        found = {metric: results[name.lower()][f"{metric},none"] for metric in METRICS[name]}
        golds = {id: one["doc"]["output"] for id, one in logged.items()}
        assert found == pytest.approx(expected(task, given, golds))
        assert name == "LaMP_1" or all(found.values())
