"""`LampBench`: trains each method that learns something, lets all of them answer, and scores the answers.

Each step writes into the run's folder and is skipped when its result lies there, so a run that was stopped goes on:

    trained/NAME/                weights of a method
    predictions/PART/NAME.json   answers in the official format
    run.json                     recipe, records, LLM and steps, so that two runs are never mixed
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from transformers import AutoTokenizer, set_seed

from persona.encoders import TextEncoder, Vocabulary, make_encoder
from persona.errors import DataError, PersonaError
from persona.evaluation.claims import claim
from persona.evaluation.cutting import decoded
from persona.evaluation.lamp.files import write_predictions
from persona.evaluation.lamp.lm_eval import export_lm_eval
from persona.evaluation.lamp.methods import METHODS, Method
from persona.evaluation.lamp.models import OurLM, PlainLM, other_people
from persona.evaluation.lamp.official import open_domain
from persona.evaluation.lamp.pplug import PPlug, PPlugTrainer
from persona.evaluation.lamp.prompts import profile_prompt
from persona.evaluation.lamp.recipe import LampRecipe, load_lamp_recipe
from persona.evaluation.lamp.retrieval import Bm25, Dense, Random, Recency
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.training import Collate, Draws, Write
from persona.evaluation.lamp.user_lora import UserLora
from persona.history.config import stated
from persona.injection import SoftPromptLM, load_llm
from persona.injection.llm import default_device, llm_revision
from persona.training.trained_on import check_unseen, write_trained_on
from persona.training.trainer import AdapterTrainer, PersonaTrainer, fit

BATCH = 32
"""Questions answered at once."""
_MAKES_LM = {"description", "lm", "lm_items", "lm_questions"}
"""Fields of a recipe that change nothing here: the LM is there."""


class LampBench:
    """The methods on one domain, one LLM, one seed, in one folder.

    Raises `DataError` for an LLM that has seen what is asked in the test.
    """

    def __init__(
        self,
        recipe: str | Path,
        data: str | Path,
        llm: str | Path,
        out: str | Path,
        *,
        changes: Sequence[str] = (),
        part: str = "test",
        seed: int = 0,
        steps: int | None = None,
        say: Callable[[str], None] = print,
    ):
        if part not in ("validation", "test"):
            raise PersonaError(f"--part is validation or test, not {part!r}")
        self._claimed = False
        self.changes, self.llm, self.out = tuple(changes), str(Path(llm)), Path(out)
        self.part, self.seed, self.steps, self.say = part, seed, steps, say
        self.recipes = {  # read once: a file that is edited meanwhile changes no run
            method.changes: load_lamp_recipe(recipe, [*changes, *method.changes]) for method in METHODS.values()
        }
        self.domain = open_domain(load_lamp_recipe(recipe, changes), data)
        say(str(self.domain))
        self.samples = self.domain.samples(part)
        check_unseen(self.domain.fingerprints(part), llm, "questions")
        self.llm_revision = llm_revision(llm)
        if len({sample.profile.user for sample in self.samples}) < 2:
            raise DataError(f"{self.domain.recipe.name}: one user alone is asked; intervals and controls need others")

    def _claim_folder(self) -> None:
        """Raises `PersonaError` if the folder holds another run; looks once."""
        if self._claimed:
            return
        recipe = {name: value for name, value in stated(self.domain.recipe).items() if name not in _MAKES_LM}
        mine = {
            "recipe": recipe,
            "records": self._records(),
            "llm": self.llm,
            "llm_revision": self.llm_revision,
            "steps": self.steps,
        }
        claim(self.out / "run.json", mine, f"{self.out} holds a run")
        self._claimed = True

    def _records(self) -> str:
        """A digest of all that is learned from and asked, profiles included."""
        domain, digest = self.domain, hashlib.sha256()
        asked = (sample for part in ("validation", "test") for sample in domain.samples(part))
        for record in chain(asked, domain.histories(), domain.training_answers()):
            digest.update(repr(record).encode(errors="surrogatepass"))
        return digest.hexdigest()[:16]

    @property
    def name(self) -> str:
        """Of results: the recipe's, the part unless it is the test, and the seed."""
        return "-".join([self.domain.recipe.name, *([] if self.part == "test" else [self.part]), f"s{self.seed}"])

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """One for all methods, so that each text is encoded once."""
        return TextEncoder(self.domain.recipe.encoder.text_encoder)

    @cached_property
    def retrievers(self) -> dict[str, Callable]:
        """By the names that `Method.retriever` knows."""
        return {"bm25": Bm25(), "dense": Dense(self.text_encoder), "recency": Recency(), "random": Random(self.seed)}

    def recipe(self, method: Method) -> LampRecipe:
        """The recipe with what a method changes."""
        recipe = self.recipes[method.changes]
        return replace(recipe, training=replace(recipe.training, seed=self.seed))

    def write(self, method: Method, tokenizer) -> Write:
        """What the LLM reads of a sample as text, cut at `max_length` tokens as the benchmark's tokenizer does."""
        task, most = self.domain.task, self.domain.recipe.max_length

        def write(sample: Sample) -> str:
            items = self.retrievers[method.retriever](sample, task, method.items) if method.retriever else []
            text = profile_prompt(task, sample.input, items, tokenizer, most)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            return text if len(ids) <= most else decoded(ids[:most], tokenizer)

        return write

    def export(self, name: str, out: str | Path) -> Path:
        """A method that is text alone as a task of lm-evaluation-harness; see `export_lm_eval`."""
        tokenizer = AutoTokenizer.from_pretrained(self.llm)
        recipe, write = self.domain.recipe, self.write(METHODS[name], tokenizer)
        task = "-".join([self.name, name])
        return export_lm_eval(self.samples, self.domain.task, task, Path(out), write, recipe.new_tokens)

    # --- training -----------------------------------------------------------------------------------------------

    def untrained(self, method: Method) -> SoftPromptLM:
        """The model that a method trains, or the LLM alone."""
        llm, tokenizer = load_llm(self.llm)
        recipe = self.recipe(method)
        set_seed(self.seed)
        if method.model == "ours":
            vocabulary = Vocabulary.fit(self.domain.histories(), self.domain.sources)
            encoder = make_encoder(recipe.encoder, vocabulary, self.text_encoder, self.llm)
            model = OurLM(llm, tokenizer, encoder, recipe, without_history=method.profile == "none")
        elif method.model == "pplug":
            model = PPlug(llm, tokenizer, self.text_encoder, recipe)
        else:
            model = PlainLM(llm, tokenizer)
            if method.model != "llm":
                model.add_lora(recipe.lora.rank)
        return model.to(default_device())

    def trained(self, name: str) -> SoftPromptLM:
        """The model of a method with its weights, trained now unless they lie in the run's folder."""
        method = METHODS[name]
        if method.trained:
            return self.trained(method.trained)
        self._claim_folder()
        model = self.untrained(method)
        if method.model == "llm":
            return model.eval()
        folder = self.out / "trained" / f"{name}-s{self.seed}"
        if (folder / "training.json").exists():
            check_unseen(self.domain.fingerprints(self.part), folder, "questions")
            model.load_trained(folder)
            return model.eval()
        self.say(f"training {folder.name}")
        recipe = self.recipe(method)
        config = recipe.training
        if method.model == "lora":
            config = replace(config, learning_rate=recipe.lora.learning_rate)
        steps = self.steps or config.steps
        folder.mkdir(parents=True, exist_ok=True)
        write_trained_on(self.domain.fingerprints("train"), folder)  # first, so that no finished weights are without
        options = {}
        if method.model == "ours":
            options["objectives"] = replace(config, next_item_weight=0.0) if method.profile == "none" else config
        fit(
            {"ours": PersonaTrainer, "pplug": PPlugTrainer}.get(method.model, AdapterTrainer),
            model,
            Draws(self.domain, steps * config.histories_per_step, self.seed),
            Collate(model, self.write(method, model.template.tokenizer), self.seed, prefixes=method.model == "ours"),
            config,
            folder,
            steps=steps,
            resume=True,
            **options,
        )
        return model.eval()

    # --- answering ----------------------------------------------------------------------------------------------

    def answered(self, name: str) -> bool:
        """Whether the answers of a method lie in the run's folder."""
        return self._predicted(name).with_suffix(".cost.json").exists()

    def _predicted(self, name: str) -> Path:
        return self.out / "predictions" / self.part / f"{name}-s{self.seed}.json"

    def predictions(self, name: str) -> dict:
        """The answers of a method by sample id, with tokens and seconds: `{"answers", "tokens", "seconds"}`."""
        self._claim_folder()
        file = self._predicted(name)
        cost = file.with_suffix(".cost.json")
        if not self.answered(name):
            method = METHODS[name]
            model = self.trained(name)
            self.say(f"answering with {name}")
            made = self._answers(method, model)
            write_predictions(file, self.domain.task, made.pop("answers"))
            cost.write_text(json.dumps(made, indent=1) + "\n")
        found = json.loads(file.read_text(encoding="utf-8"))["golds"]
        return {"answers": {a["id"]: a["output"] for a in found}, **json.loads(cost.read_text())}

    def _answers(self, method: Method, model: SoftPromptLM) -> dict:
        asked = other_people(self.samples) if method.profile == "other" else self.samples
        write = self.write(method, model.template.tokenizer)
        if method.model == "user_lora":
            answerer = UserLora(model, self.recipe(method), write)
            return answerer.answers(self.samples)
        answers: dict[str, str] = {}
        tokens, start = 0, time.perf_counter()
        texts = [write(sample) for sample in self.samples]
        count = method.tokens or model.soft
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for first in range(0, len(order), BATCH):
            part = order[first : first + BATCH]
            rows = model.rows([asked[i] for i in part])
            prompts = [model.template.prompt(texts[i], count if rows is not None else 0) for i in part]
            tokens += sum(len(prompt.ids) + prompt.memory for prompt in prompts)
            flat = None if rows is None else rows[:, :count].flatten(0, 1)
            made = model.complete(prompts, flat, max_new_tokens=self.domain.recipe.new_tokens)
            answers |= {self.samples[i].id: text for i, text in zip(part, made)}
        seconds = (time.perf_counter() - start) / len(texts)
        ordered = {sample.id: answers[sample.id] for sample in self.samples}
        return {"answers": ordered, "tokens": round(tokens / len(texts), 1), "seconds": round(seconds, 4)}
