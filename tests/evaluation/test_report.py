"""Tables are generated from result files, and only where the README asks for them."""

import json

import pytest

from persona.errors import DataError
from persona.evaluation.report import cell, label, load_result, markdown_table, paired_table, update_readme

CELL = {"acc": 0.5, "low": 0.25, "high": 0.75}
RESULT = {
    "results": {
        "chance": {"genre": CELL, "mean": CELL},
        "item_cosine": {},
        "ours_k8": {"genre": CELL, "mean": CELL, "tokens": {"user": 9.0, "prompt": 21.4}},
    },
    "paired": {"ours_k8 - shuffled_user": {"genre": {**CELL, "low": -0.25}, "mean": CELL}},
    "n": {"users": 7, "cuts": 9, "answers": {"genre": 11}},
    "config": {"part": "test"},
    "seed": 3,
    "command": "persona bench table x",
}


def test_a_table_states_method_tokens_interval_n_seed_and_command():
    table = markdown_table(RESULT)
    assert "| **ours, K = 8** | 9 | 21 | 0.500 [0.250, 0.750] | 0.500 [0.250, 0.750] |" in table
    assert "| item cosine (no LM) |  |  |  |  |" in table
    for part in ("7 test users", "9 cuts", "11 genre", "Seed 3", "`persona bench table x`"):
        assert part in table


def test_differences_are_signed():
    assert "+0.500 [-0.250, +0.750]" in paired_table(RESULT)
    assert label("ours_k16") == "**ours, K = 16**" and label("new_method") == "new_method"


def test_a_difference_that_is_printed_as_zero_has_no_sign():
    assert cell({"acc": 0.0, "low": -0.0004, "high": 0.0004}, signed=True) == "0.000 [0.000, 0.000]"
    assert cell({"acc": 0.0, "low": -0.0006, "high": 0.0006}, signed=True) == "0.000 [-0.001, +0.001]"


def test_the_readme_gets_the_table_between_its_markers_again_and_again(tmp_path):
    file, readme = tmp_path / "movies.json", tmp_path / "README.md"
    file.write_text(json.dumps(RESULT))
    readme.write_text("before\n<!-- persona:movies -->\nold\n<!-- persona:movies -->\nafter\n")
    assert update_readme(readme, [file]) == ["movies"]
    once = readme.read_text()
    update_readme(readme, [file])
    assert readme.read_text() == once
    assert once.startswith("before\n") and once.endswith("after\n") and "old" not in once and "ours, K = 8" in once


def test_a_readme_without_markers_and_damaged_results_are_errors(tmp_path):
    file, readme = tmp_path / "movies.json", tmp_path / "README.md"
    file.write_text(json.dumps(RESULT))
    readme.write_text("no markers")
    with pytest.raises(DataError, match="persona:movies"):
        update_readme(readme, [file])
    with pytest.raises(DataError, match="does not exist"):
        load_result(tmp_path / "none.json")
    file.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        load_result(file)
    file.write_text("{}")
    with pytest.raises(DataError, match="not a result"):
        load_result(file)
