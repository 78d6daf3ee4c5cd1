"""Training in two processes of one CPU: the same losses and weights as in one, from the command line."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from persona.demo.shop import generate_shop
from persona.errors import PersonaError
from persona.training import processes
from persona.training.recipe import Domain, load_recipe
from persona.training.trainer import WithObjectives, new_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPE = ROOT / "adapters" / "demo" / "recipe.yaml"
CONFIGS = ROOT / "persona" / "training" / "accelerate"
PROCESS = HERE / "distributed_process.py"

_spec = importlib.util.spec_from_file_location("distributed_process", PROCESS)
process = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(process)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_shop(tmp_path_factory.mktemp("shop"), users=20)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """How bfloat16 rounds a batch depends on its shape, and so on the number of processes."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def arguments(data, llm, out, *changes):
    """Of `persona train` with all three objectives, and with more answer tokens in one half of a batch."""
    sets = [part for change in (*process.CHANGES, *changes) for part in ("--set", change)]
    return ["train", str(RECIPE), "--data", str(data), "--llm", str(llm), "--out", str(out), *sets]


def launch(launcher, *args):
    """Two processes: what they print together."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", *launcher, f"--{'main_process' if 'accelerate' in launcher[0] else 'master'}_port"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(port), *map(str, args)], env=environment, text=True, capture_output=True, timeout=280
    )
    return done.returncode, done.stdout + done.stderr


ACCELERATE = ("accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp_cpu.yaml"))
TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2")


def losses(printed):
    return [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", printed)]


def weights(folder):
    return {**load_file(folder / "encoder" / "model.safetensors"), **load_file(folder / "projector.safetensors")}


def assert_equal(one, two, atol=3e-4):
    """Weights that a run of a few steps with a rate of 1e-3 moved by some 1e-3 each."""
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < atol


def test_two_processes_train_what_one_does(run, data, llm_path, tmp_path):
    """Answer, contrastive and next-item losses; batches of unequal answer tokens, pairs and items in each process."""
    one = run(*arguments(data, llm_path, tmp_path / "one"), "--steps", 5)
    assert one.returncode == 0, one.stderr
    status, printed = launch(
        ACCELERATE, "-m", "persona.cli", *arguments(data, llm_path, tmp_path / "two"), "--steps", 5
    )
    assert status == 0, printed
    assert losses(printed) == pytest.approx(losses(one.stdout), rel=1e-3) and len(losses(printed)) == 5
    assert_equal(tmp_path / "one", tmp_path / "two")
    assert printed.count("saved the adapter") == 1 and printed.count("events of 20 users") == 1
    written = json.loads((tmp_path / "two" / "training.json").read_text())
    assert written["processes"] == 2 and written["steps"] == 5
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in (tmp_path / "two").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 1])
def test_an_llm_as_encoder_trains_the_same_in_two_processes(chunk, run, data, llm_path, tmp_path):
    """Also without a next-item loss and with gradient caching, so that parameters go without gradients."""
    changes = (
        "encoder.backbone=llm",
        "encoder.width=64",
        "encoder.lora_rank=4",
        "encoder.source_adapters=true",
        "training.next_item_weight=0",
        f"training.contrastive_chunk={chunk}",
    )
    one = run(*arguments(data, llm_path, tmp_path / "one", *changes), "--steps", 4)
    assert one.returncode == 0, one.stderr
    launched = ("-m", "persona.cli", *arguments(data, llm_path, tmp_path / "two", *changes), "--steps", 4)
    status, printed = launch(TORCHRUN, *launched)
    assert status == 0, printed
    assert losses(printed) == pytest.approx(losses(one.stdout), rel=1e-3)
    assert_equal(tmp_path / "one", tmp_path / "two", 1e-3)


@pytest.mark.slow
def test_a_run_of_two_processes_is_resumed(run, data, llm_path, tmp_path):
    common = ("-m", "persona.cli", *arguments(data, llm_path, tmp_path / "halves"), "--steps", 8)
    status, printed = launch(TORCHRUN, PROCESS, "stop", RECIPE, data, llm_path, tmp_path / "halves")
    assert status != 0 and "InterruptedError" in printed
    assert [p.name for p in (tmp_path / "halves").glob("checkpoint-*")] == ["checkpoint-4"]
    status, printed = launch(TORCHRUN, *common)
    assert status != 0 and "--resume" in printed
    status, printed = launch(TORCHRUN, *common, "--resume")
    assert status == 0, printed
    one = run(*arguments(data, llm_path, tmp_path / "one"), "--steps", 8)
    assert one.returncode == 0, one.stderr
    assert_equal(tmp_path / "one", tmp_path / "halves")


@pytest.mark.slow
def test_the_frozen_llm_can_be_sharded(data, llm_path, tmp_path):
    """FSDP2 over gloo, with what fsdp.yaml says; see `shard` for what is not accelerate's own."""
    domain = Domain(load_recipe(RECIPE, process.CHANGES), data)
    torch.manual_seed(domain.recipe.training.seed)
    model = WithObjectives(new_model(domain, llm_path), domain.recipe.training).train()
    expected = process.steps_of(model, domain)
    model.save_pretrained(tmp_path / "one")
    launcher = (ACCELERATE[0], "--config_file", str(CONFIGS / "fsdp.yaml"), "--num_processes", "2")
    status, printed = launch(launcher, PROCESS, "shard", RECIPE, data, llm_path, tmp_path / "two")
    assert status == 0, printed
    assert torch.allclose(torch.load(tmp_path / "two" / "losses.pt"), expected, rtol=1e-3)
    assert_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["ddp_cpu", "ddp_gpu", "fsdp"])
def test_configs_are_accelerates(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_machines == 1 and config.num_processes > 1
    assert bool(config.fsdp_config) == (name == "fsdp")


def test_what_fsdp_leaves_whole_is_what_is_trained(model, domain):
    from accelerate.utils.fsdp_utils import get_parameters_from_modules

    pattern = load_config_from_file(str(CONFIGS / "fsdp.yaml")).fsdp_config["fsdp_ignored_modules"]
    wrapped = WithObjectives(model, domain.recipe.training)
    whole = get_parameters_from_modules(pattern, wrapped, torch.device("cpu"))
    assert whole == {p for p in wrapped.parameters() if p.requires_grad}
    assert whole.isdisjoint(model.llm.parameters())


def test_one_process_needs_no_agreement(monkeypatch):
    rows = torch.ones(2, 3, requires_grad=True)
    assert processes.gathered(rows) is rows and processes.mean_weight(torch.tensor(5)) == 1.0
    assert processes.of_first(7, torch.device("cpu")) == 7 and processes.own_share(6) == 6
    monkeypatch.setattr(processes, "process_count", lambda: 4)
    assert processes.own_share(8) == 2
    with pytest.raises(PersonaError, match="histories_per_step is 6, which 4 processes cannot share evenly"):
        processes.own_share(6)


def test_what_is_not_for_several_processes_says_so(run, data, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("lm", "build", RECIPE, "--data", data, "--out", tmp_path / "lm")
    assert done.returncode == 1 and "is done by one process" in done.stderr
    assert "events of 20 users" not in done.stderr  # not the first process, so it says nothing else
    shutil.rmtree(tmp_path / "lm", ignore_errors=True)
