"""Instruction-aware embeddings: what each objective, the instruction, noise, sources and lengths do to their quality.

    python benchmarks/instruct/run.py adapters/demo/instruct.yaml --data build/shop --llm build/instruct/lm \
        --out build/instruct/demo --result benchmarks/results/instruct-demo.json

Trains one adapter for each variant, all for the same steps, then asks test users. What lies in --out is not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from differences import claims, difference, robustness, summary

from persona.cli.common import quiet
from persona.encoders import TextEncoder
from persona.errors import PersonaError
from persona.evaluation.claims import claim
from persona.evaluation.instructed import KINDS, Instructed
from persona.evaluation.runner import provenance, sizes
from persona.history import History
from persona.history.config import stated
from persona.history.render import render_history
from persona.injection import PersonalizedLM
from persona.training.noise import fitting, with_noise
from persona.training.recipe import Domain, Recipe, load_recipe
from persona.training.trained_on import check_unseen, fingerprint
from persona.training.trainer import train_adapter

SHARES = (0.0, 0.25, 0.5, 1.0, 2.0)
"""Irrelevant events for each event of a history."""
TOKENS, DIMS = (1, 2, 4, 8), (16, 32, 64, 128, 192)


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """The encoder trained by both objectives, by one of them, by neither, without instructions; a resampler by both."""
    training, encoder = recipe.training, recipe.encoder
    resampler = replace(encoder, backbone="transformer", head="resampler", layers=2)
    weights = {
        "contrastive": {"answer_weight": 0.0},
        "autoregressive": {"contrastive_weight": 0.0},
        # without an instruction nothing says which events are foreign
        "next_item": {
            "answer_weight": 0.0,
            "contrastive_weight": 0.0,
            "next_item_weight": 1.0,
            "foreign_share": 0.0,
        },
        "no_instruction": {"empty_share": 1.0, "foreign_share": 0.0},
    }
    changed = {name: replace(recipe, training=replace(training, **own)) for name, own in weights.items()}
    return {"both": recipe, **changed, "resampler": replace(recipe, encoder=resampler)}


class Bench:
    """Variants trained on one domain, and their tables."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.out
        recipe = load_recipe(args.recipe, args.change)
        self.domain = Domain(recipe, args.data)
        check_unseen(self.domain.fingerprints(self.domain.test), args.llm)
        self.recipes = variants(recipe)
        self.text_encoder = TextEncoder(recipe.encoder.text_encoder)
        self.asked = Instructed(self.domain, probe_users=args.probe_users)
        self._check_noise()
        self._claim_folder()

    def _claim_folder(self) -> None:
        """Refuses a folder of a run with other settings, whose adapters and tables would be taken for this one's."""
        recipe, asked = stated(self.domain.recipe), self.args
        settings = {"recipe": recipe, "llm": str(asked.llm), "steps": asked.steps, "probe_users": asked.probe_users}
        settings |= {"noise": asked.noise, "users": fingerprint(self.domain.fingerprints(self.domain.train))}
        claim(self.out / "run.json", settings, f"{self.out} holds a run")

    def _check_noise(self) -> None:
        """Raises `PersonaError` for sources that cannot be mixed in, before hours of training."""
        users = (*self.domain.train, *self.domain.validation)
        timed = sorted({e.source for user in users for e in self.domain.histories[user].timed})
        asked = {self.domain.recipe.questions[task].source for task in self.asked.tasks}
        if wrong := sorted(set(self.args.noise) - set(timed)):
            raise PersonaError(
                f"--noise {wrong[0]}: no such source, or its events have no time; there are {', '.join(timed)}"
            )
        if self.args.noise and (alone := [s for s in asked if set(self.args.noise) == {s}]):
            raise PersonaError(f"--noise {alone[0]} alone: what is asked about it needs events of another source")

    def train(self, name: str) -> None:
        """The adapter of a variant, or of `learned_prompt`: both objectives without any history."""
        folder = self.out / name
        if (folder / "training.json").exists():
            return
        print(f"training {name}", flush=True)
        domain = copy.copy(self.domain)
        control = name == "learned_prompt"
        domain.recipe = self.recipes["both" if control else name]
        train_adapter(
            domain,
            self.args.llm,
            folder,
            steps=self.args.steps,
            without_history=control,
            resume=True,
            overwrite=True,
            text_encoder=self.text_encoder,
        )

    def model(self, name: str) -> PersonalizedLM:
        """A variant that was trained, on none of the users to be asked."""
        check_unseen(self.domain.fingerprints(self.domain.test), self.out / name)
        return PersonalizedLM.from_pretrained(self.out / name, self.args.llm, text_encoder=self.text_encoder)

    def states(self, model: PersonalizedLM, change: Callable[[History], History] | None = None):
        """What the encoder reads of the test users' histories."""
        return model.encoder.read(self.asked.histories(change))

    def made(self, name: str, make: Callable[[], dict]) -> dict:
        """What `make` gives, from its file if that is there."""
        file = self.out / "tables" / f"{name}.json"
        if not file.exists():
            start = time.perf_counter()
            file.parent.mkdir(parents=True, exist_ok=True)
            result = make()
            file.write_text(json.dumps(result) + "\n")
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        return json.loads(file.read_text())

    # --- tables: each maps rows to accuracies by user -------------------------------------------------------------

    def objectives(self, name: str) -> dict:
        """A variant with the right, an empty and a wrong instruction, read out in each way that its training allows."""
        model, asked, weights = self.model(name), self.asked, self.recipes[name].training
        encoder, rows, probes = model.encoder, {}, {}
        states, known = self.states(model), encoder.read([cut.history for cut in asked.training.cuts])
        strangers = [states[i] for i in asked.sample.stranger]
        readable = weights.answer_weight or weights.contrastive_weight
        for told in (*KINDS, "another user's") if readable else KINDS:
            kind = told if told in KINDS else "right"
            tokens = asked.tokens(encoder, states if told in KINDS else strangers, kind)
            if weights.answer_weight:
                rows[f"llm, {told}"] = asked.by_llm(model, tokens)
            if weights.contrastive_weight:
                rows[f"similarity, {told}"] = asked.by_similarity(encoder, tokens)
            if told in KINDS:
                train = asked.probe_inputs(asked.tokens(encoder, known, kind, training=True), training=True)
                ((rows[f"probe, {told}"], probes[told]),) = asked.by_probe(train, asked.probe_inputs(tokens))
        return {"rows": _listed(rows), "probes": probes}

    def controls(self) -> dict:
        """The LLM alone, a learned prompt, the history as text, mean text embeddings, chance, the commonest answer."""
        asked, model = self.asked, self.model("both")
        cuts = asked.sample.cuts
        text = [render_history(cut.history, self.domain.recipe.sources) for cut in cuts]
        rows = {"llm alone": asked.text_in_prompt(model, [""] * len(cuts))}
        rows["text in the prompt"] = asked.text_in_prompt(model, text)
        train = asked.mean_texts(self.text_encoder, [c.history for c in asked.training.cuts], asked.training)
        test = asked.mean_texts(self.text_encoder, [c.history for c in cuts], asked.sample)
        ((rows["probe of mean text embeddings"], probes),) = asked.by_probe(train, test)
        rows["commonest answer"], rows["chance"] = asked.commonest(), asked.commonest(chance=True)
        if (self.out / "learned_prompt" / "training.json").exists():
            control = self.model("learned_prompt")
            nobody = control.encoder.read([History("nobody")]) * len(cuts)
            rows["learned prompt"] = asked.by_llm(control, asked.tokens(control.encoder, nobody, "right"))
        return {"rows": _listed(rows), "probes": {"mean text embeddings": probes}}

    def noise(self) -> dict:
        """Other users' events of the sources `--noise` mixed into each history, but for the one that is asked about.

        Probes are fitted on training users without noise, and on as many events of each; of mean text embeddings, which
        no training has prepared for noise, also on training users with it.
        """
        asked, domain, rows = self.asked, self.domain, {}
        model, last = self.model("both"), fitting(domain.recipe.window, max(SHARES))
        clean = [cut.history.last(last) for cut in asked.training.cuts]
        known = model.encoder.read(clean)
        for source in dict.fromkeys(domain.recipe.questions[task].source for task in asked.tasks):
            some, foreign = asked.only(asked.about({source})), set(self.args.noise) - {source}
            ours, theirs = (
                [e for user in users for e in domain.histories[user].timed if e.source in foreign]
                for users in (domain.train, domain.validation)
            )
            rng = np.random.default_rng(1)
            trained = {"": clean, ", fitted on noise": [with_noise(h, ours, rng.choice(SHARES), rng) for h in clean]}
            noisy = {}
            for share in SHARES:
                rng = np.random.default_rng([0, round(100 * share)])
                noisy[share] = [with_noise(cut.history.last(last), theirs, share, rng) for cut in asked.sample.cuts]
            for name, values in self._noise(some, model, known, trained, noisy).items():
                every, own = (a.probed if ": probe" in name else a.tasks for a in (asked, some))
                row = rows.setdefault(name, np.full((len(values), len(every)), np.nan))
                row[:, [every.index(task) for task in own]] = values
        return {"rows": _listed(rows)}

    def _noise(self, asked: Instructed, model: PersonalizedLM, known, trained, noisy) -> dict[str, np.ndarray]:
        """Accuracies of what is asked. `known` are states of training users; `trained` and `noisy` are histories."""
        rows, states = {}, {share: model.encoder.read(own) for share, own in noisy.items()}
        for kind in ("right", "empty"):
            train = asked.probe_inputs(asked.tokens(model.encoder, known, kind, training=True), training=True)
            made = {share: asked.tokens(model.encoder, own, kind) for share, own in states.items()}
            found = asked.by_probe(train, *map(asked.probe_inputs, made.values()))
            for (share, tokens), (probe, _) in zip(made.items(), found):
                rows[f"{share:.0%}: probe, {kind}"] = probe
                rows[f"{share:.0%}: llm, {kind}"] = asked.by_llm(model, tokens)
                rows[f"{share:.0%}: similarity, {kind}"] = asked.by_similarity(model.encoder, tokens)
        tests = [asked.mean_texts(self.text_encoder, own, asked.sample) for own in noisy.values()]
        for how, histories in trained.items():
            train = asked.mean_texts(self.text_encoder, histories, asked.training)
            for share, (probe, _) in zip(noisy, asked.by_probe(train, *tests)):
                rows[f"{share:.0%}: probe of mean text embeddings{how}"] = probe
        for share, own in noisy.items():
            text = [render_history(h, self.domain.recipe.sources) for h in own]
            rows[f"{share:.0%}: text in the prompt"] = asked.text_in_prompt(model, text)
        return rows

    def sources(self) -> dict:
        """Sources added one by one in the recipe's order, then each one left out, at test time."""
        names, rows, model = list(self.domain.recipe.sources), {}, self.model("both")
        kept = {f"+ {name}": names[: n + 1] for n, name in enumerate(names)}
        kept |= {f"without {name}": [other for other in names if other != name] for name in names}
        for title, some in kept.items():
            states = self.states(model, lambda h, some=some: h.of(e for e in h.events if e.source in some))
            tokens = self.asked.tokens(model.encoder, states, "right")
            rows[f"similarity, {title}"] = self.asked.by_similarity(model.encoder, tokens)
            rows[f"llm, {title}"] = self.asked.by_llm(model, tokens)
        return {"rows": _listed(rows)}

    def matryoshka(self) -> dict:
        """Similarity by tokens and dimensions of the embedding."""
        model, rows = self.model("both"), {}
        made, config = self.asked.tokens(model.encoder, self.states(model), "right"), model.encoder.config
        for tokens in (k for k in TOKENS if k <= config.tokens):
            for dim in (d for d in DIMS if d <= config.width):
                rows[f"{tokens} x {dim}"] = self.asked.by_similarity(model.encoder, made[:, :tokens], dim)
        return {"rows": _listed(rows)}

    def tables(self) -> Iterator[tuple[str, dict]]:
        """(name, table) of all that is asked for."""
        names = self.args.variants
        for name in names:
            self.train(name)
            if name in self.recipes:
                yield name, self.made(f"objectives-{name}", lambda name=name: self.objectives(name))
        make = {
            "controls": self.controls,
            "matryoshka": self.matryoshka,
            "sources": self.sources,
            "noise": self.noise,
        }
        for name in self.args.tables if "both" in names else ():
            if name != "noise" or self.args.noise:
                yield name, self.made(name, make[name])


def main(args: argparse.Namespace) -> None:
    """Trains, asks, and writes the result anew after each table."""
    quiet()
    bench = Bench(args)
    asked, tables, probes = bench.asked, {}, {}
    for name, table in bench.tables():
        tables[name] = {row: np.array(values, float) for row, values in table["rows"].items()}
        probes |= {name: table["probes"]} if "probes" in table else {}
        write(args, bench, tables, probes)
    print(f"{len(asked.sample.users)} users, {len(asked.sample.cuts)} cuts")


def write(args: argparse.Namespace, bench: Bench, tables: Mapping[str, dict], probes: dict) -> None:
    """Means over users with intervals, and the differences that are claimed, user by user."""
    asked = bench.asked
    result = {
        "name": args.result.stem,
        "kind": "instruct",
        "results": {name: {row: summary(v, asked) for row, v in rows.items()} for name, rows in tables.items()},
        "probes": probes,
        "paired": {f"{a} - {b}": difference(tables, a, b, asked) for a, b in claims(tables)},
        "robustness": robustness(tables.get("noise", {}), asked),
        "training": {
            name: json.loads((bench.out / name / "training.json").read_text())
            for name in args.variants
            if (bench.out / name / "training.json").exists()
        },
        "n": sizes(asked.sample, asked.tasks),
        "config": {
            "domain": bench.domain.recipe.name,
            "tasks": asked.tasks,
            "probed": asked.probed,
            "noise": args.noise,
            "probe_users": len(asked.training.users),
            "interval": "percentile bootstrap over users, 95%, 2000 resamples",
        },
        **provenance(bench.domain, 0),
        "command": " ".join(["python", "benchmarks/instruct/run.py", *sys.argv[1:]]),
    }
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _listed(rows: Mapping[str, np.ndarray]) -> dict:
    return {name: [[None if np.isnan(v) else float(v) for v in row] for row in values] for name, values in rows.items()}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data", required=True, help="folder of the records")
    parser.add_argument("--llm", required=True, help="the frozen LLM")
    parser.add_argument("--out", type=Path, required=True, help="folder for adapters and tables")
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--set", dest="change", nargs="+", default=[], help="fields of the recipe to change")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--probe-users", type=int, default=300, help="training users that probes are fitted on")
    parser.add_argument("--noise", nargs="*", default=[], help="sources that other users' events are mixed in from")
    parser.add_argument("--variants", nargs="+", choices=DEFAULT, default=[*DEFAULT], metavar="VARIANT")
    parser.add_argument(
        "--tables",
        nargs="*",
        choices=TABLES,
        default=[*TABLES],
        metavar="TABLE",
        help="of the variant both, beside its objectives",
    )
    return parser.parse_args()


TABLES = ("controls", "matryoshka", "sources", "noise")
DEFAULT = ("both", "contrastive", "autoregressive", "next_item", "no_instruction", "resampler", "learned_prompt")

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(arguments())
