"""`evaluate_official`: an adapter asked the official questions of UQABench, beside two controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from persona.encoders import UserState
from persona.errors import DataError, PersonaError
from persona.evaluation.uqa.metric import check_golds, official_accuracy
from persona.evaluation.uqa.official import MAX_CLICKS, SOURCE, OfficialFile, to_history
from persona.evaluation.uqa.tasks import route
from persona.injection import PersonalizedLM


def evaluate_official(
    model: PersonalizedLM,
    file: OfficialFile,
    *,
    limit: int | None = None,
    batch: int = 32,
    decode: Callable[[list[int]], str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = print,
) -> dict:
    """Asks the first `limit` questions of an align file (all of them for None), `batch` at a time.

    Each answer is one greedy token, and is scored by `official_accuracy` (UQABench, arXiv 2502.19178), whose result
    is given for `ours`, where the encoder read the user's clicks; for `shuffled_user`, where it read another user's;
    and for `no_history`, where the LLM reads the question alone. An adapter's LoRA, if it has one, stays on in all
    three. `decode` is `to_history`'s; without it an encoder knows an item by its ids.

    All rows are checked before the first question is asked. Raises `DataError` for a file without questions, a bad
    row, an empty gold answer, a question of no sub-task, and users too alike to be shuffled; and `PersonaError` for an
    encoder that does not know the source "click", to which all histories would be empty.
    """
    if SOURCE not in model.encoder.vocabulary.sources:
        known = ", ".join(model.encoder.vocabulary.sources)
        raise PersonaError(f"the encoder knows no source {SOURCE!r}, only {known}; train one on the official histories")
    if not file.has_questions:
        raise DataError(f"{file.path}: has no questions; take an align file, such as align_data_eval.arrow")
    size = len(file) if limit is None else max(0, min(limit, len(file)))
    questions, golds, users = [], [], []
    for number in range(size):
        row = file[number]
        route(row.question)
        questions.append(row.question)
        golds.append(row.answer)
        users.append(hash(tuple(row.item[-MAX_CLICKS:])))  # equal clicks, equal user: the files name no users
    check_golds(golds)
    other = strangers(users, seed)
    answers = {"ours": [], "shuffled_user": [], "no_history": []}
    for start in range(0, size, batch):
        part = range(start, min(start + batch, size))
        asked = [questions[i] for i in part]
        for name, owners in {"ours": part, "shuffled_user": [other[i] for i in part], "no_history": None}.items():
            states = None
            if owners is not None:  # encoded anew each time: the states of all users would not fit in memory
                states = model.encoder.read([to_history(file[i], f"row {i}", decode=decode) for i in owners])
            answers[name] += next_tokens(model, asked, states)
        progress(f"{part.stop} of {size} questions")
    return {name: official_accuracy(questions, those, golds, seed=seed) for name, those in answers.items()}


@torch.inference_mode()
def next_tokens(model: PersonalizedLM, questions: Sequence[str], states: Sequence[UserState] | None) -> list[str]:
    """The likeliest token after each question, as text, white space and all; special tokens are no text."""
    count = model.adapter.tokens if states is not None else 0
    rows = model.soft_rows(states, questions).flatten(0, 1) if states is not None else None
    batch = model.collate([model.template.prompt(question, count) for question in questions])
    best = model.logits(rows, batch)[:, -1].argmax(-1)
    return model.template.tokenizer.batch_decode(best[:, None], skip_special_tokens=True)


def strangers(users: Sequence[int], seed: int) -> list[int]:
    """For each row the number of a row of another user, each row given once: a derangement.

    Raises `DataError` when there is none: fewer than two rows, or more than half of them of one user.
    """
    if len(users) < 2:
        raise DataError(f"{len(users)} questions are too few: the shuffled-user control needs two users")
    _, owner, sizes = np.unique(users, return_inverse=True, return_counts=True)
    most = int(sizes.max())
    if 2 * most > len(users):
        raise DataError(f"{most} of {len(users)} questions are of one user, so the shuffled-user control has no other")
    rng = np.random.default_rng([seed, 3])
    rows, place = rng.permutation(len(users)), rng.permutation(len(sizes))
    order = rows[np.argsort(place[owner[rows]], kind="stable")]  # users in random order, each one's rows side by side
    # Shifted by the most rows that a user has, no row stays with its user.
    given = np.empty(len(users), int)
    given[order] = np.roll(order, most)
    return given.tolist()
