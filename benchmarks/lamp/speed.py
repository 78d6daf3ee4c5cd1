"""What LaMP's parts cost: encoding of histories with and without known texts, and retrieval over 10,000 items.

    python benchmarks/lamp/speed.py --out benchmarks/results/lamp-speed.json

Texts are invented from a vocabulary with the frequencies of natural words (Zipf); nothing is learned here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from persona.cli.common import quiet
from persona.encoders import TextEncoder
from persona.evaluation.lamp.retrieval import Bm25, Recency
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS
from persona.history import Event, History

ITEMS, WORDS, ENCODED = 10_000, 120, 512


def main(out: Path, seed: int) -> None:
    """Measures, prints and writes."""
    quiet()
    rng = np.random.default_rng(seed)
    texts = [text(rng) for _ in range(ITEMS)]
    encoder = TextEncoder()
    results = {}
    first = seconds(lambda: encoder.vectors(texts[:ENCODED]))
    again = statistics.median(seconds(lambda: encoder.vectors(texts[:ENCODED])) for _ in range(9))
    results[f"texts of {WORDS} invented words (256 tokens) encoded a second, new"] = round(ENCODED / first, 1)
    results["the same, known (in the text cache)"] = round(ENCODED / again)
    results["ratio"] = round(first / again)
    task = TASKS["LaMP_7"]
    events = [Event("profile", float(i), t, attributes={"text": t}, event_id=str(i)) for i, t in enumerate(texts)]
    profile = History("somebody", tuple(events))
    for name, retriever in (("bm25", Bm25()), ("recency", Recency())):
        indexed = seconds(lambda r=retriever: r(query(rng, profile, 20), task, 4))
        for words in (20, 100):
            asked = [query(rng, profile, words) for _ in range(50)]
            each = [seconds(lambda r=retriever, s=sample: r(s, task, 4)) * 1e3 for sample in asked]
            label = f"{name}, ms for a query of {words} words over {ITEMS:,} items, median (p90)"
            results[label] = f"{statistics.median(each):.2f} ({np.quantile(each, 0.9):.2f})"
        if name == "bm25":
            results["bm25, s to index them once"] = round(indexed, 2)
    made = {
        "name": out.stem,
        "results": results,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seed": seed,
        "command": " ".join(["python", "benchmarks/lamp/speed.py", *sys.argv[1:]]),
    }
    for name, value in results.items():
        print(f"{value!s:>16}  {name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def text(rng: np.random.Generator, words: int = WORDS) -> str:
    """Words by rank."""
    return " ".join(f"w{n}" for n in np.minimum(rng.zipf(1.2, words), 50_000))


def query(rng: np.random.Generator, profile: History, words: int) -> Sample:
    """A question about a new text."""
    return Sample("q", f"Paraphrase the following tweet: {text(rng, words)}", profile)


def seconds(call: Callable) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.out, arguments.seed)
