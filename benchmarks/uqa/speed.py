"""Speed of the backbones at one size beside `torch.nn.TransformerEncoder`: `python benchmarks/uqa/speed.py`.

All contenders take their turn in every round of one run, so that what else the machine does slows all of them. A
ratio is taken within a round; what is written is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
import torch
from torch import nn

from persona.encoders.backbones import BACKBONES, build_backbone
from persona.encoders.backbones.matching import matched_inner, parameter_count
from persona.evaluation.runner import git_hash

WIDTH, HEADS, LAYERS, INNER, BATCH = 64, 2, 2, 256, 16
MATCHED = 51
"""Positions with which the parameters are matched, whatever the length: tables of positions cost memory, not time."""
BASELINE = "nn.TransformerEncoder"
SMALL = "hstu, not matched"
"""HSTU as wide inside as outside, its public code's shape, and so without the parameters of a feed-forward network."""
PLAN = {50: (15, 8), 200: (11, 4), 512: (5, 1), 2048: (2, 1)}
"""Length: rounds, and steps in each."""
QUICK = {50: (3, 4), 200: (3, 1)}


class Plain(nn.Module):
    """PyTorch's own transformer, causal and pre-norm, as a backbone."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, None]:
        """States of `x` `[B, N, d]`, and no cache."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.encoder(x, mask, is_causal=True), None


def contenders(length: int) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The baseline, every backbone with as many parameters as SASRec and a small HSTU; and their `inner`."""
    target = parameter_count("sasrec", WIDTH, HEADS, LAYERS, MATCHED, INNER)
    inner = {name: matched_inner(name, WIDTH, HEADS, LAYERS, MATCHED, target) for name in BACKBONES}
    models = {name: build_backbone(name, WIDTH, HEADS, LAYERS, 0.0, inner[name], length) for name in BACKBONES}
    small = build_backbone("hstu", WIDTH, HEADS, LAYERS, 0.0, WIDTH, length)
    return {BASELINE: Plain(), **models, SMALL: small}, {BASELINE: INNER, **inner, SMALL: WIDTH}


def train_step(model: nn.Module, x: torch.Tensor, times: torch.Tensor) -> None:
    """Forward and backward of the mean of all states."""
    model(x, times=times)[0].mean().backward()


@torch.inference_mode()
def infer(model: nn.Module, x: torch.Tensor, times: torch.Tensor) -> None:
    """Forward."""
    model(x, times=times)


def seconds(run, steps: int, *arguments) -> float:
    """Seconds for one of `steps` steps."""
    start = time.perf_counter()
    for _ in range(steps):
        run(*arguments)
    return (time.perf_counter() - start) / steps


def measure(length: int, rounds: int, steps: int) -> dict:
    """Median times and ratios of all contenders at one length, after a step of one user each to warm up."""
    models, inner = contenders(length)
    x = torch.randn(BATCH, length, WIDTH)
    times = 1.6e9 + (torch.rand(BATCH, length, dtype=torch.float64) * 86_400).cumsum(1)
    spent: dict[str, dict[str, list[float]]] = {name: {"train": [], "inference": []} for name in models}
    for model in models.values():
        for kind, run in (("train", train_step), ("inference", infer)):
            run(model.train(kind == "train"), x[:1], times[:1])
    for _ in range(rounds):
        for name, model in models.items():
            for kind, run in (("train", train_step), ("inference", infer)):
                spent[name][kind].append(seconds(run, steps, model.train(kind == "train"), x, times))
            model.zero_grad()
    result = {}
    for name, kinds in spent.items():
        faster = {k: [b / t for b, t in zip(spent[BASELINE][k], took)] for k, took in kinds.items()}
        result[name] = {
            "parameters": sum(p.numel() for p in models[name].parameters()),
            "inner": inner[name],
            "train_steps_per_s": round(1 / median(kinds["train"]), 3),
            "inference_users_per_s": round(BATCH / median(kinds["inference"]), 1),
            "train_ratio": round(median(faster["train"]), 3),
            "train_ratios": [round(r, 3) for r in faster["train"]],
            "inference_ratio": round(median(faster["inference"]), 3),
            "inference_ratios": [round(r, 3) for r in faster["inference"]],
        }
        print(
            f"{length:>5} {name:>22}  train {result[name]['train_steps_per_s']:>8.2f} steps/s"
            f" x{result[name]['train_ratio']:<6} inference {result[name]['inference_users_per_s']:>9.1f} users/s"
            f" x{result[name]['inference_ratio']}",
            flush=True,
        )
    return result


def growth(results: dict[int, dict]) -> dict:
    """Exponent e of time ~ length^e between each length and the next."""
    lengths = sorted(results)
    exponents: dict[str, dict[str, dict[str, float]]] = {}
    for a, b in pairwise(lengths):
        for name in results[a]:
            for kind in ("train_steps_per_s", "inference_users_per_s"):
                slower = results[a][name][kind] / results[b][name][kind]
                key = kind.split("_")[0]
                exponent = round(math.log(slower) / math.log(b / a), 2)
                exponents.setdefault(name, {}).setdefault(key, {})[f"{a}-{b}"] = exponent
    return exponents


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/uqa-speed.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of PyTorch")
    parser.add_argument("--quick", action="store_true", help="short sequences and few rounds, to see that it runs")
    arguments = parser.parse_args()
    commit = git_hash()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    results = {length: measure(length, *plan) for length, plan in (QUICK if arguments.quick else PLAN).items()}
    output = {
        "results": {str(length): result for length, result in results.items()},
        "growth": growth(results),
        "config": {
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
            "inner_of_sasrec": INNER,
            "batch": BATCH,
            "baseline": BASELINE,
            "ratio": "speed over the baseline's in the same round, median over rounds; above 1 is faster",
        },
        "command": " ".join(["python", "benchmarks/uqa/speed.py", *sys.argv[1:]]),
        "seed": arguments.seed,
        "git_hash": commit,
        "versions": {name: version(name) for name in ("torch", "persona")},
        "machine": {
            "cores": os.cpu_count(),
            "threads": arguments.threads,
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "cpu": cpu(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = Path(arguments.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(output, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def cpu() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
