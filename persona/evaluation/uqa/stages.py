"""The three stages of UQA: pre-train, align, evaluate; for every backbone, head and seed that is asked for.

Each stage writes into the run's folder and is skipped when its result lies there, so a run that was stopped goes on:

    pretrain/BACKBONE-sSEED/        an encoder that foretells the next item
    align/BACKBONE-HEAD-sSEED/      an adapter for the frozen LLM; a resampler tunes the encoder with it
    align/learned-prompt-sSEED/     the control, trained on empty histories
    results/NAME.json               tables; results/baselines.json holds the rows without user tokens
    made_from/NAME.json             settings, so that what is there is never taken for the work of others
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

from transformers import set_seed

from persona.encoders import TextEncoder, Vocabulary, make_encoder
from persona.encoders.backbones import BACKBONES
from persona.encoders.backbones.matching import matched_inner, parameter_count
from persona.encoders.heads import HEADS
from persona.errors import PersonaError, RecipeError
from persona.evaluation.claims import claim
from persona.evaluation.uqa.table import baselines_table, soft_table
from persona.evaluation.uqa.tasks import SUB_TASKS
from persona.history.config import stated
from persona.injection import PersonalizedLM
from persona.injection.llm import llm_revision
from persona.injection.soft_prompt import Injection
from persona.training.pretrain import pretrain
from persona.training.ranking import leave_one_out
from persona.training.recipe import Domain, Recipe
from persona.training.trained_on import check_unseen, fingerprint, write_trained_on
from persona.training.trainer import train_adapter

CONTROL = "learned-prompt"
BASELINES = "baselines"


@dataclass(frozen=True)
class Run:
    """One encoder, one head, one seed."""

    backbone: str
    """A key of `BACKBONES`."""
    head: str
    """One of `HEADS`."""
    seed: int
    """Of pre-training and alignment; questions and intervals always have seed 0, so that runs can be compared."""

    label: str = ""
    """What else is different, for the names of folders and results."""
    injection: Injection = "soft_prompt"
    """How user tokens enter the LLM."""

    @property
    def encoder(self) -> str:
        """Name of the pre-trained encoder's folder, which runs with other heads share."""
        return "-".join(filter(None, (self.backbone, self.label, f"s{self.seed}")))

    @property
    def name(self) -> str:
        """Name of the adapter's folder and of the result."""
        return "-".join(filter(None, (self.backbone, self.head, self._injected, self.label, f"s{self.seed}")))

    @property
    def control(self) -> str:
        """Name of the learned prompt's folder."""
        changed = self.label if self._injected else ""  # soft prompts share one, whatever else is changed
        return "-".join(filter(None, (CONTROL, self._injected, changed, f"s{self.seed}")))

    @property
    def _injected(self) -> str:
        return "" if self.injection == "soft_prompt" else self.injection.replace("_", "-")


class UQA:
    """The stages on one domain and one LLM, in one folder.

    Raises `RecipeError` for a recipe without UQA's sub-tasks, and `DataError` for an LLM that has seen test users.
    """

    def __init__(self, domain: Domain, llm: str | Path, out: str | Path, say: Callable[[str], None] = print):
        known = [task.name for task in SUB_TASKS]
        strange = [name for name in domain.recipe.questions if name not in known]
        if strange:
            raise RecipeError(f"questions.{strange[0]} is not a sub-task of UQA; they are {', '.join(known)}")
        check_unseen(domain.fingerprints(domain.test), llm)
        self.llm_revision = llm_revision(llm)
        self.domain, self.llm, self.out, self.say = domain, str(Path(llm)), Path(out), say
        self._text_encoder: TextEncoder | None = None

    @property
    def text_encoder(self) -> TextEncoder:
        """One for all runs, so that each text is encoded once."""
        if self._text_encoder is None:
            self._text_encoder = TextEncoder(self.domain.recipe.encoder.text_encoder)
        return self._text_encoder

    def recipe(self, run: Run) -> Recipe:
        """The recipe with a run's backbone, head and seed; all backbones have SASRec's number of parameters."""
        recipe = self.domain.recipe
        if run.backbone not in BACKBONES or run.head not in HEADS:
            raise RecipeError(f"{run.name}: backbones are {', '.join(BACKBONES)}, heads are {', '.join(HEADS)}")
        if run.injection not in get_args(Injection):
            raise RecipeError(f"{run.name}: injections are {', '.join(get_args(Injection))}")
        encoder = recipe.encoder
        shape = encoder.width, encoder.heads, encoder.layers, 1 + encoder.max_events
        target = parameter_count("sasrec", *shape, encoder.inner)
        return replace(
            recipe,
            encoder=replace(
                encoder, backbone=run.backbone, head=run.head, inner=matched_inner(run.backbone, *shape, target)
            ),
            pretraining=replace(recipe.pretraining, seed=run.seed),
            training=replace(recipe.training, seed=run.seed, frozen_encoder=run.head != "resampler"),
            injection=replace(recipe.injection, kind=run.injection),
        )

    def pretrain(self, run: Run, steps: int | None = None) -> Path:
        """The pre-trained encoder's folder. Learns from training users, chooses its step by validation users."""
        folder, recipe = self.out / "pretrain" / run.encoder, self.recipe(run)
        parts = {"encoder": replace(recipe.encoder, head=HEADS[0]), "pretraining": recipe.pretraining}  # heads share it
        self._claim(f"pretrain-{run.encoder}", parts, steps or recipe.pretraining.steps)
        if not (folder / "pretraining.json").exists():
            self.say(f"pre-training {folder.name}")
            domain = self.domain
            histories = [domain.histories[user] for user in domain.train]
            held = leave_one_out([domain.histories[user] for user in domain.validation])
            set_seed(run.seed)
            vocabulary = Vocabulary.fit(histories, recipe.sources)
            encoder = make_encoder(recipe.encoder, vocabulary, self.text_encoder, self.llm)
            pretrain(encoder, histories, held, recipe.pretraining, folder, steps=steps)
            write_trained_on(domain.fingerprints(domain.train), folder)
        return folder

    def align(self, run: Run, steps: int | None = None) -> Path:
        """The adapter's folder."""
        recipe = self.recipe(run)
        parts = {"encoder": recipe.encoder, "training": recipe.training, "injection": recipe.injection}
        self._claim(run.name, parts, steps or recipe.training.steps)
        return self._align(run.name, run, steps, pretrained=self._pretrained(run))

    def align_control(self, run: Run, steps: int | None = None) -> Path:
        """The folder of the learned prompt: the same head and the same questions, but no user."""
        self._claim(run.control, {})  # runs of other shapes share it
        return self._align(run.control, run, steps, pretrained=self._pretrained(run), without_history=True)

    def _pretrained(self, run: Run) -> Path:
        folder = self.out / "pretrain" / run.encoder
        return folder if (folder / "pretraining.json").exists() else self.pretrain(run)

    def _claim(self, name: str, parts: Mapping[str, object], steps: int | None = None) -> None:
        """Refuses a folder whose `name` was made from other records, questions or `parts` of the recipe."""
        recipe = self.domain.recipe
        settings = {name: {k: v for k, v in stated(part).items() if k != "steps"} for name, part in parts.items()}
        settings |= {"records": self._records, "window": recipe.window, "steps": steps}
        if not name.startswith("pretrain-"):
            settings |= {"llm": self.llm, "llm_revision": self.llm_revision}
            settings |= {"questions": {n: stated(q) for n, q in recipe.questions.items()}}
        claim(self.out / "made_from" / f"{name}.json", settings, f"{self.out} holds {name}")

    @cached_property
    def _records(self) -> str:
        domain = self.domain
        users = [domain.fingerprints(part) for part in (domain.train, domain.validation, domain.test)]
        return fingerprint(users, [len(history.events) for history in domain.histories.values()])

    def _align(self, name: str, run: Run, steps: int | None, **options) -> Path:
        folder = self.out / "align" / name
        if not (folder / "training.json").exists():
            self.say(f"aligning {name}")
            domain = copy.copy(self.domain)
            domain.recipe = self.recipe(run)
            options |= {"resume": True, "overwrite": True, "text_encoder": self.text_encoder}
            train_adapter(domain, self.llm, folder, steps=steps, **options)
        return folder

    def evaluate(self, run: Run) -> dict:
        """The table of a run's adapter, which must be there; with differences to the baselines if they are there.

        A run with cross-attention has a learned prompt of its own kind, if that is there.
        """
        file = self.out / "results" / f"{BASELINES}.json"
        baselines = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

        def make() -> dict:
            own = run.injection != "soft_prompt" and (self.out / "align" / run.control / "training.json").exists()
            control = self._model(run.control) if own else None
            table = soft_table(self.domain, self._model(run.name), run, baselines, self.say, control)
            training = self.out / "align" / run.name / "training.json"
            return {**table, "training": json.loads(training.read_text(encoding="utf-8"))}

        return self._result(run.name, make)

    def evaluate_baselines(self, control: Run) -> dict:
        """The rows without user tokens: the LLM alone, text, the learned prompt, and floors without an LLM."""
        return self._result(BASELINES, lambda: baselines_table(self.domain, self._model(control.control), self.say))

    def _model(self, name: str) -> PersonalizedLM:
        folder = self.out / "align" / name
        if not (folder / "training.json").exists():
            raise PersonaError(f"{folder} holds no finished adapter; run the stage align first")
        check_unseen(self.domain.fingerprints(self.domain.test), folder)
        return PersonalizedLM.from_pretrained(folder, str(self.llm), text_encoder=self.text_encoder)

    def _result(self, name: str, make: Callable[[], dict]) -> dict:
        file = self.out / "results" / f"{name}.json"
        if not file.exists():
            self.say(f"evaluating {name}")
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".part")
            unfinished.write_text(json.dumps({"name": name, **make()}, indent=1) + "\n", encoding="utf-8")
            shutil.move(unfinished, file)
        return json.loads(file.read_text(encoding="utf-8"))
