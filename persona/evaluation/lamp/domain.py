"""`LampDomain`: a `LampRecipe` with its records read; the questions of validation and test, and training draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, time
from pathlib import Path

import numpy as np

from persona.errors import DataError
from persona.evaluation.lamp.recipe import LampRecipe
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS, Task
from persona.history import Event, History
from persona.history.readers import ReadReport, read_histories
from persona.history.render import render_event
from persona.training.configs import SplitConfig, TrainingConfig
from persona.training.recipe import split_users
from persona.training.trained_on import fingerprint, user_fingerprint

PROFILE = 512
"""Newest items of a profile; PPlug (arXiv 2409.11901) reads so many."""


@dataclass(frozen=True)
class Draw:
    """One training draw: a profile, and questions about what came after it."""

    profile: History
    """What a method may see."""
    questions: tuple[tuple[str, str], ...]
    """(input, output), at least one."""


def shortened(events: Sequence[Event], rng: np.random.Generator, config: TrainingConfig) -> list[Event]:
    """A training profile, cut to its newest 1-15 items or thinned as `config` says; it keeps at least one item."""
    if rng.random() < config.short_share:
        events = events[-int(rng.integers(1, 16)) :]
    share = rng.random() * config.drop_events
    return [event for event in events if rng.random() >= share] or list(events[-1:])


class LampDomain:
    """Records in LaMP's form. `validation` and `test` are lists of `Sample`; `draw` gives what training sees.

    An event's profile is what its user did strictly before it. Events without one of the task's fields are neither
    asked nor shown, and counted in `incomplete`. Raises `DataError` when a part has no question, and for an answer
    that the task does not know.
    """

    def __init__(self, recipe: LampRecipe, data: str | Path, *, strict: bool = False):
        self.recipe, self.sources = recipe, recipe.sources
        self.report: ReadReport
        self.incomplete = 0
        histories, self.report = read_histories(recipe.readers, data, strict=strict)
        profiles = {user: self._profile(history) for user, history in sorted(histories.items())}
        self._people = {user: user_fingerprint(history) for user, history in histories.items()}
        by_time = recipe.split.by == "time"
        self.train, validation, test = (self._by_time if by_time else self._by_user)(profiles)
        self.validation = self._some(validation, 1)
        self.test = self._some(test, 2)
        self._all_places = [(user, i) for user, h in self.train.items() for i in range(len(h))]
        self._places = [(user, i) for user, i in self._all_places if self._before(self.train[user], i)]
        for name, part in (("train", self._places), ("validation", self.validation), ("test", self.test)):
            if not part:
                raise DataError(f"{recipe.name}: no question for {name}. What was read: {self.report}")

    def __str__(self) -> str:
        missing = f" {self.incomplete} events lack a field of {self.task.name}: left out." if self.incomplete else ""
        return f"{self.report}{missing}"

    @property
    def task(self) -> Task:
        """The LaMP task."""
        return TASKS[self.recipe.task]

    def samples(self, part: str) -> list[Sample]:
        """The questions of "validation" or "test"."""
        return {"validation": self.validation, "test": self.test}[part]

    def fingerprints(self, part: str) -> set[str]:
        """What is never to be in both training and test: users, or events where the split is by time."""
        if part == "train":
            items = ((u, e) for u, h in self.train.items() for e in h.events)
        else:
            items = ((s.profile.user, s.target) for s in self.samples(part))
        by_time = self.recipe.split.by == "time"
        return {fingerprint(event.event_id) if by_time else self._people[user] for user, event in items}

    def draw(self, rng: np.random.Generator, most: int | None = None, *, alone: bool = False) -> Draw:
        """A random training event with its profile, of which the recipe drops some, and the events after it.

        `most` questions at the most, `training.questions_per_history` unless given. `alone` leaves the profile away,
        so that events without an earlier one are drawn, too.
        """
        config = self.recipe.training
        places = self._all_places if alone else self._places
        user, at = places[rng.integers(len(places))]
        history = self.train[user]
        kept = [] if alone else shortened(self._before(history, at), rng, config)
        asked = history.events[at : at + (most or config.questions_per_history)]
        return Draw(history.of(kept), tuple((self._input(e), self._output(e)) for e in asked))

    def histories(self) -> Iterator[History]:
        """What training users did, for vocabularies and tokenizers."""
        yield from self.train.values()

    def training_answers(self) -> Iterator[str]:
        """The answer of every training event."""
        for history in self.histories():
            yield from map(self._output, history.events)

    # --- splitting ----------------------------------------------------------------------------------------------

    def _by_user(self, profiles: dict[str, History]) -> tuple[dict[str, History], list[Sample], list[Sample]]:
        split = self.recipe.split
        shares = SplitConfig(train=split.train, validation=split.validation, seed=split.seed)
        train, *others = split_users(list(profiles), shares)
        validation, test = (
            [self._sample(profiles[user], i) for user in users for i in self._asked(profiles[user])[-split.per_user :]]
            for users in others
        )
        return {user: profiles[user] for user in train}, validation, test

    def _by_time(self, profiles: dict[str, History]) -> tuple[dict[str, History], list[Sample], list[Sample]]:
        """An event of several users, such as a paper, is asked once: of the one with the longest profile."""
        split = self.recipe.split
        start = datetime.combine(split.test_from, time(), UTC).timestamp()
        asked: dict[str, tuple[int, str, int]] = {}
        early = set()
        for user, history in profiles.items():
            for i in self._asked(history):
                key = history.events[i].event_id
                asked[key] = max(asked.get(key, (0, "", 0)), (len(self._before(history, i)), user, i))
            early |= {event.event_id for event in history.events if event.timestamp < start}
        drawn = np.random.default_rng([split.seed, 0]).permutation(sorted(early))
        held = set(drawn[: round(split.validation * len(drawn))].tolist())
        train = {
            user: history.of(e for e in history.events if e.timestamp < start and e.event_id not in held)
            for user, history in profiles.items()
        }
        made = {key: self._sample(profiles[user], i) for key, (_, user, i) in sorted(asked.items())}
        late = [sample for key, sample in made.items() if key not in early]
        return train, [sample for key, sample in made.items() if key in held], late

    def _asked(self, history: History) -> list[int]:
        """Places of the events with a long enough profile."""
        least = self.recipe.split.min_profile
        return [i for i in range(len(history)) if len(self._before(history, i)) >= least]

    def _some(self, samples: list[Sample], part: int) -> list[Sample]:
        most = self.recipe.split.most
        if most is None or len(samples) <= most:
            return samples
        chosen = np.random.default_rng([self.recipe.split.seed, part]).permutation(len(samples))[:most]
        return [samples[i] for i in sorted(chosen)]

    # --- one event ----------------------------------------------------------------------------------------------

    def _profile(self, history: History) -> History:
        """The timed events of the task's source with the task's fields as attributes and an id."""
        recipe, task, kept = self.recipe, self.task, []
        for number, event in enumerate(history.timed):
            if event.source != recipe.source:
                continue
            spec = recipe.sources[event.source]
            fields = {name: render_event(event, replace(spec, line=line)) for name, line in recipe.fields.items()}
            if not all(fields[name] for name in task.fields):
                self.incomplete += 1
                continue
            if task.labels and fields[task.label] not in task.labels:
                raise DataError(
                    f"{recipe.name}: an event of {history.user!r} has the {task.label} {fields[task.label]!r}, which "
                    f"is no answer of {task.name}; they are {', '.join(task.labels)}. Change fields.{task.label}"
                )
            key = event.event_id or f"{history.user}/{number}"
            kept.append(replace(event, attributes={**event.attributes, **fields}, event_id=key))
        return history.of(kept)

    @staticmethod
    def _before(history: History, at: int) -> Sequence[Event]:
        """The newest `PROFILE` events strictly before event `at`."""
        now = history.events[at].timestamp
        while at and history.events[at - 1].timestamp >= now:
            at -= 1
        return history.events[max(0, at - PROFILE) : at]

    def _sample(self, history: History, at: int) -> Sample:
        event = history.events[at]
        key = event.event_id if self.recipe.split.by == "time" else f"{history.user}/{at}"
        profile = history.of(self._before(history, at))
        return Sample(key, self._input(event), profile, self._output(event), event)

    def _input(self, event: Event) -> str:
        return self.task.input.format_map(event.attributes)

    def _output(self, event: Event) -> str:
        return event.attributes[self.task.label]
