"""What an LLM as user encoder costs, by length: `python benchmarks/instruct/cost.py --llm LLM --out FILE`.

From scratch, with the history's states kept and a new instruction, and one event appended; the states' bytes; and pairs
a second in training, with and without gradient caching. Contenders take turns in every round; the median is written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch

from persona.cli.common import quiet
from persona.demo.shop import generate_shop
from persona.encoders import EncoderConfig, TextEncoder, UserEncoder, Vocabulary, make_encoder
from persona.encoders.chunks import answers_in_chunks
from persona.evaluation.runner import git_hash
from persona.history import History
from persona.training.configs import TrainingConfig
from persona.training.data import Collator, Example
from persona.training.objectives import matryoshka_contrastive_loss
from persona.training.recipe import Domain, load_recipe
from persona.training.trainer import new_model

LENGTHS = (32, 128, 512, 2048, 8192)
INSTRUCTIONS = ("What does this user buy most?", "Which app does this user open most?")
CHUNKS = (0, 16, 4)
PAIRS = 128
"""Histories in a training batch, each with one question."""


def contenders(domain: Domain, llm: str, text_encoder: TextEncoder, length: int) -> dict[str, UserEncoder]:
    """The recipe's encoder and a resampler of the same width, for histories of `length` events."""
    vocabulary = Vocabulary.fit((domain.histories[u] for u in domain.train), domain.recipe.sources)
    own = replace(domain.recipe.encoder, llm=llm, max_events=length)
    other = EncoderConfig(width=own.width, heads=own.heads, tokens=own.tokens, max_events=length)
    made = {"llm": own, "resampler": other}
    return {name: make_encoder(config, vocabulary, text_encoder).eval() for name, config in made.items()}


def long_history(domain: Domain, length: int) -> History:
    """`length` timed events of many users, as one user's, one minute apart."""
    events = [e for user in domain.train for e in domain.histories[user].timed]
    chosen = [events[i % len(events)] for i in range(length)]
    return History("long", tuple(replace(e, timestamp=60.0 * i) for i, e in enumerate(chosen)))


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def inference(domain: Domain, llm: str, text_encoder: TextEncoder, length: int, rounds: int) -> dict:
    """Milliseconds of each way to an embedding, for each contender, and bytes of what is kept."""
    history, result = long_history(domain, length), {}
    newest = history.events[-1]
    encoders = contenders(domain, llm, text_encoder, length)
    jobs: dict[tuple[str, str], Callable] = {}
    for name, encoder in encoders.items():
        encoder.encode([history], INSTRUCTIONS[0])  # texts and instruction are known from here on
        encoder.instruct(INSTRUCTIONS)
        state = encoder.read([history])[0]
        before = encoder.read([history.of(history.events[:-1])])[0]
        jobs[name, "from scratch"] = lambda e=encoder: e.encode([history], INSTRUCTIONS[0])
        jobs[name, "new instruction"] = lambda e=encoder, s=state: e.tokens([s], [INSTRUCTIONS[1]])
        jobs[name, "event appended"] = lambda e=encoder, s=before: e.extend(s, [newest])
        result[name] = {"state_bytes": state.nbytes}
    times: dict[tuple, list[float]] = {key: [] for key in jobs}
    for _ in range(rounds):
        for key, job in jobs.items():
            times[key].append(seconds(job))
    for name in encoders:
        own = {what: [1000 * t for t in times[name, what]] for _, what in jobs if (name, what) in times}
        result[name] |= {what: round(median(t), 3) for what, t in own.items()}
        for what in ("new instruction", "event appended"):
            ratio = median(a / b for a, b in zip(own["from scratch"], own[what]))
            result[name][f"from scratch / {what}"] = round(ratio, 2)
    return result


def training(domain: Domain, llm: str, chunk: int, pairs: int) -> dict:
    """Pairs a second of the contrastive objective, and the process's peak memory."""
    torch.manual_seed(0)
    model = new_model(domain, llm).train()
    config = TrainingConfig(answer_weight=0.0, contrastive_weight=1.0, next_item_weight=0.0)
    rng, examples = np.random.default_rng(0), []
    while len(examples) < pairs:
        cut = domain.training_cut(rng)
        if questions := domain.questions(cut, rng, training=True):
            examples.append(Example(cut.history, (questions[0],)))
    batch = Collator(model, config)(examples)
    asked = batch.pop("pairs")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    before, times = kib("VmRSS"), []
    for _ in range(3):
        start = time.perf_counter()
        tokens = model(**batch, chunk=chunk)["tokens"]
        encoder = model.encoder
        answers = answers_in_chunks(encoder, asked.answers, chunk) if chunk else encoder.answer_vectors(asked.answers)
        matryoshka_contrastive_loss(tokens[asked.index], answers, asked.labels, (encoder.config.width,)).backward()
        model.zero_grad()
        times.append(time.perf_counter() - start)
    return {"pairs_per_s": round(pairs / median(times), 1), "step_mib": (kib("VmHWM") - before) // 1024}


def kib(name: str) -> int:
    """A size of this process, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main(args: argparse.Namespace) -> None:
    """Measures and writes the file; training in processes of their own, whose peak memory is the step's."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        domain = Domain(load_recipe(args.recipe), generate_shop(folder, users=200))
    if args.worker is not None:
        print(json.dumps(training(domain, args.llm, args.worker, args.pairs)))
        return
    text_encoder, lengths = TextEncoder(), {}
    for length in args.lengths:
        lengths[str(length)] = inference(domain, args.llm, text_encoder, length, args.rounds)
        print(length, lengths[str(length)], flush=True)
    trained = {}
    for chunk in CHUNKS:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(chunk)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        trained[f"chunk {chunk}"] = json.loads(done.stdout.strip().splitlines()[-1])
        print(chunk, trained[f"chunk {chunk}"], flush=True)
    result = {
        "name": args.out.stem,
        "kind": "instruct-cost",
        "results": {"lengths": lengths, "training": trained},
        "config": {
            "recipe": args.recipe,
            "rounds": args.rounds,
            "pairs": args.pairs,
            "threads": torch.get_num_threads(),
            "llm_parameters": sum(
                p.numel() for p in contenders(domain, args.llm, text_encoder, 32)["llm"].backbone.parameters()
            ),
        },
        "command": " ".join(["python", "benchmarks/instruct/cost.py", *sys.argv[1:]]),
        "seed": 0,
        "git_hash": git_hash(),
        "versions": {name: version(name) for name in ("torch", "transformers", "persona")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="the encoder's LLM")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--recipe", default="adapters/demo/instruct.yaml")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(arguments())
