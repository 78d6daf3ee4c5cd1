"""Probes of attributes of users that no event states outright, from their embeddings.

    python benchmarks/instruct/hidden.py adapters/demo/instruct.yaml --data build/shop --adapters build/instruct/demo \
        --truth build/shop/truth.jsonl --result benchmarks/results/instruct-hidden.json

For the generated shop these are its hidden tastes, from truth.jsonl; for MovieLens age, gender and occupation, from its
.user file. The shop's category and app are close to what training asks, its price band is not. Probes are fitted on
training users and asked of test users, whole histories each.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch

from persona.cli.common import quiet
from persona.encoders import TextEncoder, UserEncoder
from persona.evaluation.instructed import mean_text
from persona.evaluation.probes import Probe, linear_probe, look_alike_scores, with_interval
from persona.evaluation.runner import provenance
from persona.training.recipe import Domain, load_recipe
from persona.training.trained_on import check_unseen

INSTRUCTIONS = {
    "category": "What does this user buy most lately?",
    "band": "Does this user buy cheap or expensive products?",
    "app": "Which app does this user open most?",
    "gender": "What is this user's gender?",
    "age": "How old is this user?",
    "occupation": "What is this user's occupation?",
}
"""What an embedding for each attribute is asked for; that of another attribute is the wrong instruction."""


def shop_truth(file: Path) -> dict[str, dict[str, str]]:
    """User to the category liked last, the price band and the favourite app."""
    users = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        users[row["user"]] = {"category": max(row["late"], key=row["late"].get), "band": row["band"], "app": row["app"]}
    return users


def movielens_truth(file: Path) -> dict[str, dict[str, str]]:
    """User to gender, age (below 30, or not) and occupation, from RecBole's atomic file."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = [{k.split(":")[0]: v for k, v in row.items()} for row in csv.DictReader(opened, delimiter="\t")]
    return {
        row["user_id"]: {
            "gender": row["gender"],
            "age": "below 30" if float(row["age"]) < 30 else "30 or more",
            "occupation": row["occupation"],
        }
        for row in rows
    }


def cells(probe: Probe) -> dict:
    """AUC, KS and accuracy with intervals over users."""
    value, low, high = with_interval(np.arange(probe.n), probe.scores, n=500)
    found = {"majority": round(probe.majority, 4)}
    for i, name in enumerate(("auc", "ks", "acc")):
        found[name] = {end: round(float(x[i]), 4) for end, x in (("value", value), ("low", low), ("high", high))}
    return found


def main(args: argparse.Namespace) -> None:
    """Probes every adapter in the folder and mean text embeddings."""
    quiet()
    domain = Domain(load_recipe(args.recipe), args.data)
    truth = shop_truth(args.truth) if args.truth.suffix == ".jsonl" else movielens_truth(args.truth)
    targets = list(next(iter(truth.values())))
    text_encoder = TextEncoder(domain.recipe.encoder.text_encoder)
    labels = {
        part: {t: [truth[u][t] for u in users] for t in targets}
        for part, users in (("train", domain.train), ("test", domain.test))
    }
    results: dict[str, dict] = {}

    def probe(name: str, target: str, train: np.ndarray, test: np.ndarray) -> None:
        found = linear_probe(train, labels["train"][target], test, labels["test"][target])
        alike = look_alike_scores(test, labels["test"][target])
        results.setdefault(name, {})[target] = cells(found) | {"look_alike_auc": round(float(alike.auc), 4)}
        print(f"{name:>28} {target:>10} {found}", flush=True)

    rows = [
        np.stack([mean_text(text_encoder, domain.histories[u]) for u in users]) for users in (domain.train, domain.test)
    ]
    for target in targets:
        probe("mean text embeddings", target, *rows)
    for folder in sorted(f.parent for f in args.adapters.glob("*/training.json")):
        if folder.name == "learned_prompt":
            continue
        check_unseen(domain.fingerprints(domain.test), folder)
        encoder = UserEncoder.from_pretrained(folder / "encoder", text_encoder)
        told = {target: embeddings(encoder, domain, INSTRUCTIONS[target]) for target in targets}
        empty = embeddings(encoder, domain, "")
        for n, target in enumerate(targets):
            kinds = {"right": told[target], "empty": empty, "wrong": told[targets[(n + 1) % len(targets)]]}
            for kind, (train, test) in kinds.items():
                probe(f"{folder.name}, {kind}", target, train, test)
    result = {
        "name": args.result.stem,
        "kind": "instruct-hidden",
        "results": results,
        "config": {"targets": targets, "instructions": {t: INSTRUCTIONS[t] for t in targets}},
        "n": {"train": len(domain.train), "test": len(domain.test)},
        **provenance(domain, 0),
        "command": " ".join(["python", "benchmarks/instruct/hidden.py", *sys.argv[1:]]),
    }
    args.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def embeddings(encoder: UserEncoder, domain: Domain, instruction: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the training and of the test users."""
    parts = (domain.train, domain.test)
    return tuple(encoder.encode([domain.histories[u] for u in users], instruction) for users in parts)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data", required=True, help="folder of the records")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of a run of benchmarks/instruct/run.py")
    parser.add_argument("--truth", type=Path, required=True, help="truth.jsonl of the shop, or MovieLens's .user file")
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(arguments())
