"""LaMP's questions as a task of lm-evaluation-harness: what any of its models answers, scored as LaMP scores it.

    lm_eval --model hf --model_args pretrained=LLM --apply_chat_template --include_path FOLDER --tasks NAME

So asked, a model with a chat template reads what it reads in `LampBench`, and in the same precision answers the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from persona.errors import DataError, PersonaError
from persona.evaluation.lamp.metrics import per_sample
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import Task
from persona.evaluation.lamp.training import Write

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Names that are one task for lm_eval, where a comma ends a name, `*` and `?` match many, and a dot ends a module's."""

CONFIG = """\
# {task} for lm-evaluation-harness: questions from {name}.jsonl, scored by {name}.py, which imports persona.
task: "{name}"
output_type: generate_until
custom_dataset: !function {name}.questions
test_split: test
num_fewshot: 0
doc_to_text: prompt
doc_to_target: output
process_results: !function {name}.process_results
generation_kwargs:
  do_sample: false
  temperature: 0.0
  max_gen_toks: {new_tokens}
  until: []
metric_list:
{metrics}
metadata:
  version: 1.0
"""
METRIC = """\
  - metric: {metric}
    aggregation: mean
    higher_is_better: {higher}"""
MODULE = '''\
"""Questions and metrics of {task} for lm-evaluation-harness, which finds them through the YAML file beside this one."""

import json
from pathlib import Path

from datasets import Dataset

from persona.evaluation.lamp.metrics import per_sample
from persona.evaluation.lamp.tasks import TASKS


def questions(**metadata):
    """The questions, from the file beside this one, wherever the folder lies."""
    with Path(__file__).with_suffix(".jsonl").open(encoding="utf-8") as lines:
        return {{"test": Dataset.from_list([json.loads(line) for line in lines])}}


def process_results(doc, results):
    """What one answer adds to each metric."""
    return per_sample(TASKS["{task}"], results[0], doc["output"])
'''


def export_lm_eval(samples: Iterable[Sample], task: Task, name: str, out: Path, write: Write, new_tokens: int) -> Path:
    """Writes the questions into the folder `out` as the task `name`, and returns the task's YAML file.

    Three files, which stay together and may move; several tasks may share a folder:

        NAME.jsonl   id, prompt = `write(sample)` and output, the gold answer, of each sample in order
        NAME.yaml    the task: greedy answers of at most `new_tokens` tokens, and the means of `per_sample`'s metrics
        NAME.py      what the YAML file calls; it imports persona

    The RMSE of ratings is the root of `mse`. A line break does not end an answer, since it does not in `LampBench`; for
    a base model, which may not end by itself, add `--gen_kwargs 'until=["\\n"]'`. Few-shot examples are off: a
    sample's examples are its user's, and `write` puts them.

    Raises `PersonaError` for a name with other characters than letters, digits, `_` and `-`, and `DataError` for no
    samples, two samples with one id, or a gold answer that is missing or not one of the task's labels.
    """
    if not NAME.fullmatch(name):
        raise PersonaError(f"a task's name has letters, digits, _ and - and begins with one of the first two: {name!r}")
    metrics: dict[str, float] = {}
    lines: dict[str, str] = {}
    for sample in samples:
        if sample.output is None:
            raise DataError(f"{task.name}: sample {sample.id!r} has no gold answer, so no answer to it can be scored")
        if sample.id in lines:
            raise DataError(f"{task.name}: two samples have the id {sample.id!r}; ids must be unique")
        metrics = per_sample(task, "", sample.output)  # for its names, and its error if the gold answer is no label
        lines[sample.id] = json.dumps({"id": sample.id, "prompt": write(sample), "output": sample.output})
    if not lines:
        raise DataError(f"{task.name}: there are no samples to export")
    higher = json.dumps(task.kind != "rating")
    metric_list = "\n".join(METRIC.format(metric=metric, higher=higher) for metric in metrics)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines.values()), encoding="utf-8")
    (out / f"{name}.py").write_text(MODULE.format(task=task.name), encoding="utf-8")
    config = out / f"{name}.yaml"
    text = CONFIG.format(task=task.name, name=name, new_tokens=new_tokens, metrics=metric_list)
    config.write_text(text, encoding="utf-8")
    return config
