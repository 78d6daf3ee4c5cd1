"""The README's five lines are run as they stand, and its tables are those of the committed results."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


NO_ENGINE = """
import sys
from persona import wrap
try: wrap(7)
except ValueError: pass
assert not {"openai", "vllm"} & set(sys.modules), sys.modules.keys()
"""
"""What is asked after the quickstart, in its process: whether an engine was loaded for it."""


def test_the_quickstart_runs_and_personalises_and_loads_no_engine(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"<!-- quickstart -->\n```python\n(.*?)```\n<!-- quickstart -->", text, re.S)[1]
    (tmp_path / "adapters").symlink_to(ROOT / "adapters")
    run = subprocess.run([sys.executable, "-c", code + NO_ENGINE], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    known, unknown = run.stdout.strip().split("\n")
    assert "text='music'" in known and "personalized=True" in known
    assert "personalized=False" in unknown and "no events" in unknown


@pytest.mark.parametrize(
    "command",
    [
        *([f"benchmarks/{name}/report.py"] for name in ("fleet", "instruct", "lamp", "serving", "uqa")),
        ["-m", "persona.cli", "bench", "readme", "benchmarks/results/movies.json", "benchmarks/results/demo.json"],
    ],
    ids=" ".join,
)
def test_the_tables_are_what_their_command_writes(tmp_path, command):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    shutil.copy(ROOT / "README.md", tmp_path)
    run = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name in ("README.md", "benchmarks/README.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.vllm
def test_the_demo_answers_each_user_and_shows_the_table():
    run = subprocess.run([sys.executable, "-m", "persona.cli", "demo"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "nobody" in run.stdout and "What does this user buy most?" in run.stdout
    assert "ours, K = 8" in run.stdout and "another user's tokens" in run.stdout
