"""Pre-training quality: leave-one-out, full ranking over all items, for every backbone; popularity and item-KNN beside.

    python benchmarks/uqa/ranking.py --data ml-100k --set encoder.dropout=0.3 --steps 1000 \
        --out benchmarks/results/uqa-ranking.json

Of each user the last event is the test, the one before it chooses the step, and the rest is for training. Each model is
ranked twice: among all items, as in most public results, and without the films that a user has seen, which the floors
always leave out. All backbones have SASRec's number of parameters.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

from persona.cli.common import quiet
from persona.encoders import EncoderConfig, TextEncoder, Vocabulary, make_encoder
from persona.encoders.backbones import BACKBONES
from persona.encoders.backbones.matching import matched_inner, parameter_count
from persona.evaluation.collaborative import Ease, ItemCosine
from persona.evaluation.intervals import interval
from persona.evaluation.runner import git_hash
from persona.history import read_histories
from persona.training.pretrain import pretrain
from persona.training.ranking import Held, leave_one_out, metrics_of_ranks, ranking_values, ranks
from persona.training.recipe import load_recipe

UNSEEN = ", unseen items"
VARIANTS = {
    "ids only": {"item_text": False},
    "half the width": {"width": 32},
    "twice the width": {"width": 128},
}
"""Of the first backbone: what is changed, for the paper's findings on side information and size."""


def main(args: argparse.Namespace) -> None:
    """Trains and ranks; the file is written anew after every model, so that a stopped run has shown something."""
    quiet()
    recipe = load_recipe(args.recipe, args.change)
    histories = list(read_histories(recipe.readers, args.data)[0].values())
    test, validation = leave_one_out(histories), leave_one_out(histories, -2)
    vocabulary = Vocabulary.fit(validation.histories, recipe.sources, min_count=1)
    text_encoder = TextEncoder(recipe.encoder.text_encoder)
    known = json.loads(args.out.read_text()) if args.out.exists() and args.resume else {"results": {}, "models": {}}
    results, models = known["results"], known["models"]
    results |= {name: summary(values, args.seed) for name, values in floors(test, validation).items()}
    wanted = [(name, name, {}) for name in args.backbones]
    wanted += [(f"{args.backbones[0]}, {what}", args.backbones[0], change) for what, change in VARIANTS.items()]
    for name, backbone, change in wanted:
        if name in models:
            continue
        config = shaped(recipe.encoder, backbone, change)
        set_seed(args.seed)
        encoder = make_encoder(config, vocabulary, text_encoder)
        training = replace(recipe.pretraining, seed=args.seed)
        with tempfile.TemporaryDirectory() as folder:
            pretrain(encoder, validation.histories, validation, training, folder, steps=args.steps)
            record = json.loads((Path(folder) / "pretraining.json").read_text())
        results[name] = summary(ranking_values(encoder, test), args.seed)
        results[f"{name}{UNSEEN}"] = summary(ranking_values(encoder, test, seen=False), args.seed)
        models[name] = {
            "encoder": asdict(config),
            "backbone_parameters": sum(p.numel() for p in encoder.backbone.parameters()),
            **record,
        }
        print(name, results[name], flush=True)
        write(args, {"results": results, "models": models}, len(test), len(vocabulary.items), training)


def shaped(config: EncoderConfig, backbone: str, change: dict) -> EncoderConfig:
    """The recipe's encoder with this backbone, as many parameters as SASRec has, and what a variant changes."""
    config = replace(config, backbone=backbone, **change)
    shape = config.width, config.heads, config.layers, 1 + config.max_events
    return replace(config, inner=matched_inner(backbone, *shape, parameter_count("sasrec", *shape)))


def floors(test: Held, validation: Held) -> dict[str, dict[str, np.ndarray]]:
    """Popularity, item-KNN and EASE, fitted on what the models are trained on; none offers what a user has seen."""
    source = test.targets[0].source
    knn, ease = ItemCosine(validation.histories, source), Ease(validation.histories, source)
    counts = np.asarray(knn.matrix.sum(axis=0)).ravel()
    targets = np.array([knn.index.get(e.item_id, -1) for e in test.targets])
    met = [knn.met(h.events) for h in test.histories]
    scores = {
        "popularity": np.tile(counts, (len(met), 1)),
        "item_knn": np.stack([knn.scores(m) for m in met]),
        "ease": np.stack([ease.scores(m) for m in met]),
    }
    for each in scores.values():
        for row, seen in zip(each, met):
            row[seen] = -np.inf
    return {f"{name}{UNSEEN}": metrics_of_ranks(ranks(each, targets)) for name, each in scores.items()}


def summary(values: dict[str, np.ndarray], seed: int) -> dict:
    """Mean of each metric over users, with its interval."""
    cells = {}
    for name, each in values.items():
        low, high = interval(each, lambda v: v.mean(), seed=seed)
        cells[name] = {
            "value": round(float(each.mean()), 4),
            "low": round(float(low), 4),
            "high": round(float(high), 4),
        }
    return cells


def write(args: argparse.Namespace, result: dict, users: int, items: int, training) -> None:
    """The result with what is needed to get it again."""
    result |= {
        "name": args.out.stem,
        "kind": "ranking",
        "config": {
            "protocol": "leave-one-out, full ranking",
            "items": items,
            **asdict(training),
        },
        "n": {"users": users},
        "command": " ".join(["python", "benchmarks/uqa/ranking.py", *sys.argv[1:]]),
        "seed": args.seed,
        "git_hash": git_hash(),
        "versions": {name: version(name) for name in ("torch", "transformers", "persona")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the records")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--recipe", default="adapters/movies/uqa.yaml")
    parser.add_argument("--set", dest="change", nargs="+", default=[], help="fields of the recipe to change")
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=DEFAULT)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--resume", action="store_true", help="keep the models that the file has")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


DEFAULT = ["sasrec", "hstu", "trm++", "gru4rec", "mamba4rec", "set"]

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(arguments())
