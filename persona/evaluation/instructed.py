"""What an instruction does to an embedding: the same users and questions with the right, an empty and a wrong one.

An embedding is read out in three ways: by the frozen LLM that gets its tokens as a prompt, by similarity to the
answers' own embeddings, and by a linear probe that is fitted on training users.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import normalize

from persona.encoders import TextEncoder, UserEncoder, UserState
from persona.encoders.embedding import pooled
from persona.evaluation.likelihood import Request, option_scores
from persona.evaluation.methods import Sample, draw_sample
from persona.evaluation.probes import linear_probe
from persona.evaluation.runner import user_accuracy
from persona.history import Event, History
from persona.injection import PersonalizedLM
from persona.training.questions import YES
from persona.training.recipe import Domain

Kind = Literal["right", "empty", "wrong"]
KINDS: tuple[Kind, ...] = ("right", "empty", "wrong")

Answers = list[dict[str, float]]
"""For each question asked, a score of each of its options."""


class Instructed:
    """Test users' questions, and the training users' that probes are fitted on."""

    def __init__(self, domain: Domain, *, part: str = "test", probe_users: int = 1000, seed: int = 0):
        self.domain, self.seed = domain, seed
        self.sample = draw_sample(domain, getattr(domain, part), seed)
        self.training = draw_sample(domain, domain.train[:probe_users], seed)
        self.tasks = [name for name, spec in domain.recipe.questions.items() if spec.kind != "next_item"]
        """Yes or no says nothing without its question, so it has no embedding."""
        self.probed = [name for name in self.tasks if domain.recipe.questions[name].choices is None]
        """Tasks whose answers are few enough for a probe's classes."""
        self._wrong = self._others(self.sample), self._others(self.training)

    def only(self, tasks: Sequence[str]) -> Instructed:
        """The same users and cuts, asked some of the tasks alone."""
        some = copy.copy(self)
        some.tasks, some.probed = ([t for t in names if t in tasks] for names in (self.tasks, self.probed))
        return some

    def histories(self, change: Callable[[History], History] | None = None) -> list[History]:
        """What is encoded for each cut of the test users: the history, or what `change` makes of it."""
        return [change(cut.history) if change else cut.history for cut in self.sample.cuts]

    def instruction(self, asked, kind: Kind, *, training: bool = False) -> str:
        """What the encoder is told for a question: its own text, nothing, or the text of the next task's question."""
        if kind != "right":
            return "" if kind == "empty" else self._wrong[training][asked.cut, asked.question.task]
        return asked.question.prompt

    def _others(self, sample: Sample) -> dict[tuple[int, str], str]:
        specs = self.domain.recipe.questions
        found: dict[int, dict[str, str]] = {}
        for asked in sample.asked:
            found.setdefault(asked.cut, {}).setdefault(asked.question.task, asked.question.prompt)
        wrong = {}
        for task in self.tasks:
            others = [*self.tasks[self.tasks.index(task) + 1 :], *self.tasks[: self.tasks.index(task)]]
            key = specs[task].source, specs[task].attribute
            other = next((o for o in others if (specs[o].source, specs[o].attribute) != key), others[0])
            for cut, prompts in found.items():
                wrong[cut, task] = prompts.get(other, specs[other].prompt)
        return wrong

    @torch.inference_mode()
    def tokens(
        self, encoder: UserEncoder, states: Sequence[UserState], kind: Kind, *, training: bool = False
    ) -> torch.Tensor:
        """User tokens `[Q, K, d]` for each question, of `tasks`; of `probed` where training users are asked.

        `states` are one for each cut. Questions of one cut with one instruction share their tokens.
        """
        pairs = [(a.cut, self.instruction(a, kind, training=training)) for a in self._asked(training)]
        place = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        unique, made = list(place), []
        for start in range(0, len(unique), 512):
            cuts, told = zip(*unique[start : start + 512])
            made += [t.tokens.float().cpu() for t in encoder.tokens([states[cut] for cut in cuts], told)]
        if not made:
            return torch.zeros(0, encoder.config.tokens, encoder.config.width)
        return torch.stack(made)[[place[pair] for pair in pairs]]

    # --- three ways to read an embedding ------------------------------------------------------------------------

    @torch.inference_mode()
    def by_llm(self, model: PersonalizedLM, tokens: torch.Tensor) -> np.ndarray:
        """Accuracy `[users, tasks]` of the LLM with these user tokens `[Q, K, d]` in its prompt."""
        asked = self._asked()
        rows = model.projector(tokens.to(model.encoder.device))
        requests = [Request(a.question.prompt, a.question.options, row) for a, row in zip(asked, rows)]
        return self._accuracy(_named(asked, option_scores(model, requests)))

    def by_similarity(self, encoder: UserEncoder, tokens: torch.Tensor, dim: int | None = None) -> np.ndarray:
        """Accuracy `[users, tasks]` of the most similar option, by embeddings of tokens `[Q, K, d]`, `dim` wide."""
        asked = self._asked()
        texts = list(dict.fromkeys(o for a in asked for o in a.question.options))
        at = {text: i for i, text in enumerate(texts)}
        cosines = pooled(tokens, None, dim).numpy() @ encoder.encode_answers(texts, dim=dim).T
        return self._accuracy(
            _named(asked, [row[[at[o] for o in a.question.options]] for a, row in zip(asked, cosines)])
        )

    def probe_inputs(self, tokens: torch.Tensor, *, training: bool = False) -> list[np.ndarray]:
        """Embeddings `[n, d]` for each task of `probed`, of tokens `[Q, K, d]` that `tokens` gave."""
        tasks = np.array([a.question.task for a in self._asked(training)])
        vectors = pooled(tokens, None, None).numpy()
        return [vectors[tasks == task] for task in self.probed]

    def by_probe(
        self, train: Sequence[np.ndarray], *tests: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, dict[str, dict[str, float]]]]:
        """Accuracy `[users, probed]` of one linear probe for each task, and its AUC and KS, on each of `tests`.

        `train` and each test hold the embeddings of each task of `probed`. An answer that too few training users gave
        has no class: its questions are lost.
        """
        answers: list[Answers] = [[] for _ in tests]
        measured: list[dict] = [{} for _ in tests]
        asked = []
        for task, x, *given in zip(self.probed, train, *tests):
            own, known = _of(self.sample, [task]), _of(self.training, [task])
            asked += own
            truth, size = [a.question.answer for a in own], len(own)
            probe = linear_probe(
                x, [a.question.answer for a in known], np.concatenate(given), truth * len(given), seed=self.seed
            )
            number = {name: i for i, name in enumerate(probe.classes)}
            for n in range(len(given)):
                index = np.flatnonzero(probe.rows // size == n)
                auc, ks, _ = probe.scores(index)
                measured[n][task] = {"auc": round(float(auc), 4), "ks": round(float(ks), 4)}
                row = {int(probe.rows[i]) % size: probe.probabilities[i] for i in index}
                for i, a in enumerate(own):
                    odds = {o: float(row[i][number[o]]) if o in number else 0.0 for o in a.question.options if i in row}
                    answers[n].append(odds or {o: float(o != a.question.answer) for o in a.question.options})
        sample = Sample(self.sample.users, self.sample.cuts, asked, self.sample.stranger)
        return [(user_accuracy(sample, own, self.probed), scores) for own, scores in zip(answers, measured)]

    def mean_texts(self, text_encoder: TextEncoder, histories: Sequence[History], sample: Sample) -> list[np.ndarray]:
        """The baseline without training: the mean of the events' text vectors, `[n, dim]` for each task of `probed`."""
        rows = [mean_text(text_encoder, h) for h in histories]
        return [np.stack([rows[a.cut] for a in _of(sample, [task])]) for task in self.probed]

    def text_in_prompt(self, model: PersonalizedLM, texts: Sequence[str]) -> np.ndarray:
        """Accuracy `[users, tasks]` of the LLM that reads a text for each cut before the question."""
        asked = self._asked()
        requests = [
            Request(f"{texts[a.cut]}\n{a.question.prompt}" if texts[a.cut] else a.question.prompt, a.question.options)
            for a in asked
        ]
        return self._accuracy(_named(asked, option_scores(model, requests)))

    def commonest(self, *, chance: bool = False) -> np.ndarray:
        """Accuracy `[users, tasks]` of the answer that training users give most often, or of any answer."""
        counts = Counter((a.question.task, a.question.answer) for a in self.training.asked)
        return self._accuracy(
            [
                {o: 0.0 if chance else float(counts[a.question.task, o]) for o in a.question.options}
                for a in self._asked()
            ]
        )

    def about(self, sources: Set[str]) -> list[str]:
        """The tasks whose questions are about one of `sources`."""
        return [task for task in self.tasks if self.domain.recipe.questions[task].source in sources]

    # ------------------------------------------------------------------------------------------------------------

    def _asked(self, training: bool = False) -> list:
        return _of(self.training, self.probed) if training else _of(self.sample, self.tasks)

    def _accuracy(self, answers: Answers) -> np.ndarray:
        sample = Sample(self.sample.users, self.sample.cuts, self._asked(), self.sample.stranger)
        return user_accuracy(sample, answers, self.tasks)


def _of(sample: Sample, tasks: Sequence[str]) -> list:
    return [a for a in sample.asked if a.question.task in tasks and a.question.options[0] != YES]


def _named(asked, scores) -> Answers:
    return [dict(zip(a.question.options, s)) for a, s in zip(asked, scores)]


def mean_text(text_encoder: TextEncoder, history: History) -> np.ndarray:
    """Mean of the text vectors of a history's events, tabular ones as "column: value", L2-normalised, `[dim]`."""
    texts = list(event_texts(history.events))
    vectors = text_encoder.vectors(texts) if texts else torch.zeros(1, text_encoder.dim)
    return normalize(vectors.mean(0), dim=0).numpy()


def event_texts(events: Sequence[Event]) -> Iterator[str]:
    """What events say as text."""
    for event in events:
        if event.text:
            yield event.text
        elif event.item_id is None:
            yield from (f"{name}: {value}" for name, value in event.attributes.items() if value is not None)
