"""The console script as a user meets it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "adapters" / "demo" / "recipe.yaml"


def test_help_is_fast_to_import_and_names_the_verbs():
    code = "import sys, persona.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = subprocess.run([sys.executable, "-m", "persona.cli", "--help"], capture_output=True, text=True, cwd=ROOT)
    for verb in ("data", "lm", "train", "bench", "demo", "serve", "export", "embed"):
        assert verb in done.stdout


def test_shop_and_check_say_what_they_did(run, tmp_path):
    assert "20 users" in run("data", "shop", "--out", tmp_path, "--users", "20").stderr
    out = run("data", "check", DEMO, "--data", tmp_path)
    assert out.returncode == 0 and "16 train, 2 validation, 2 test" in out.stderr


def test_bad_rows_are_reported_and_strict_stops(run, tmp_path):
    run("data", "shop", "--out", tmp_path, "--users", "20")
    file = tmp_path / "searches.csv"
    file.write_text(file.read_text() + "u00001,yesterday,roses\n")
    loose, strict = (run("data", "check", DEMO, "--data", tmp_path, *more) for more in ([], ["--strict"]))
    assert loose.returncode == 0 and "searches.csv" in loose.stderr and "yesterday" in loose.stderr
    assert strict.returncode == 1 and "yesterday" in strict.stderr and "Traceback" not in strict.stderr


def test_errors_are_one_line_for_people(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DEMO.read_text().replace("window:", "windw:"))
    wrong_key = run("data", "check", recipe, "--data", tmp_path)
    assert wrong_key.returncode == 1 and "windw" in wrong_key.stderr and "window" in wrong_key.stderr
    nowhere = run("data", "check", DEMO, "--data", tmp_path / "nowhere")
    assert nowhere.returncode == 1 and "nowhere" in nowhere.stderr
    no_adapter = run("demo", "--adapter", tmp_path / "nothing")
    assert no_adapter.returncode == 1 and "nothing" in no_adapter.stderr
    for done in (wrong_key, nowhere, no_adapter):
        assert done.stderr.startswith("persona: ") and "Traceback" not in done.stderr


def test_a_table_takes_no_adapter_for_a_control_and_no_training_user_for_a_test_user(run, tmp_path):
    run("data", "shop", "--out", tmp_path, "--users", "30", "--seed", "0")  # the seed of the committed adapter
    common = ("bench", "table", DEMO, "--data", tmp_path, "--adapter", DEMO.parent / "weights")
    no_control = run(*common, "--control", DEMO.parent / "weights")
    assert no_control.returncode == 1 and "--no-history" in no_control.stderr
    nothing = run(*common, "--control", tmp_path)
    assert nothing.returncode == 1 and "training.json is missing" in nothing.stderr
    known = run(*common, "--part", "validation")
    assert known.returncode == 1 and "was trained on" in known.stderr


def test_training_does_not_replace_an_adapter_unless_told(run, tmp_path):
    run("data", "shop", "--out", tmp_path / "shop", "--users", "20")
    (tmp_path / "adapter_config.json").write_text("{}")
    done = run("train", DEMO, "--data", tmp_path / "shop", "--llm", DEMO.parent / "lm", "--out", tmp_path)
    assert done.returncode == 1 and "holds an adapter already; give another --out, or --overwrite" in done.stderr


def test_uqa_says_what_it_cannot_run(run, tmp_path):
    options = ("--data", "nowhere", "--llm", "adapters/demo/lm", "--out", str(tmp_path / "out"))
    recipe = ROOT / "adapters" / "movies" / "uqa.yaml"
    done = run("bench", "uqa", recipe, *options, "--stage", "dream")
    assert done.returncode == 1 and "--stage is all, pretrain, align or evaluate, not dream" in done.stderr
    done = run("bench", "uqa", recipe, *options, "--set", "encoder.width=32")
    assert done.returncode == 1 and "need a --name of their own" in done.stderr
    assert not (tmp_path / "out").exists()
