"""Which events of a history carried an answer: by attention and by leave-one-out, each a check of the other.

Attention says where the user tokens look; a state there already holds what the backbone mixed into it from older
events, and a look need not matter. Leave-one-out says what changes without an event; of two events that say the same,
neither is missed. Where the two agree, an explanation can be trusted more (Jain and Wallace 2019, Attention is not
Explanation, arXiv 1902.10186, who compare them by rank correlation). `explain_plot` draws what is found here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

from persona.encoders import UserEncoder
from persona.encoders.attention_weights import state_attention
from persona.encoders.embedding import pooled
from persona.encoders.features import newest
from persona.errors import PersonaError
from persona.evaluation.likelihood import Request, option_scores
from persona.history import Event, History
from persona.injection import PersonalizedLM
from persona.injection.soft_prompt import Messages


@dataclass(frozen=True)
class Score:
    """How well user tokens fit an answer."""

    measure: Callable[[torch.Tensor], torch.Tensor]
    """User tokens `[B, K, d]` -> `[B]` numbers, more for a better fit."""
    name: str = "score"
    """What the numbers are, in a word or two."""
    answer: str = ""
    """The answer meant."""

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, K, d]` -> `[B]`; raises `PersonaError` where `measure` gives another shape."""
        numbers = self.measure(tokens)
        if numbers.shape != tokens.shape[:1]:
            raise PersonaError(f"a score of {len(tokens)} users' tokens has the shape {list(numbers.shape)}")
        return numbers


class Agreement(NamedTuple):
    """Spearman's rank correlation of attention and leave-one-out, over the events that the encoder knows.

    Attention does not know the answer, nor for from against: where a history speaks against an answer, what was looked
    at most is what holds the score down, and the correlation is negative.
    """

    correlation: float
    """-1 to 1."""
    p_value: float
    """Of the correlation, if the two had nothing to do with each other; two-sided."""


@dataclass(frozen=True)
class Explanation:
    """What each of n events had to do with an answer."""

    instruction: str
    """What was asked."""
    answer: str
    """The answer explained."""
    measure: str
    """What `score` is: the name of the `Score`."""
    events: tuple[Event, ...]
    """The n events read, oldest first: those without a time and the newest `max_events` of the others."""
    attention: np.ndarray
    """`[n]`: the share of the user tokens' attention that falls on each event; 0 for one of an unknown source."""
    elsewhere: float
    """The rest, to 1: on the start state and, where an LM is the encoder, on the instruction and the tokens."""
    leave_one_out: np.ndarray
    """`[n]`: how far the score falls when the event is left out; positive if the event spoke for the answer."""
    score: float
    """With all events."""
    agreement: Agreement | None
    """None where it is undefined: fewer than three events that the encoder knows, one side alike for all, or NaN."""
    truncated: bool = False
    """True when the history was longer than the encoder's `max_events`."""


@torch.inference_mode()
def explain(
    encoder: UserEncoder,
    history: History,
    instruction: str,
    answer: str | Score,
    *,
    count: int | None = None,
    batch_size: int = 64,
) -> Explanation:
    """Which events of `history` speak for `answer` when `instruction` is asked.

    `answer` is a text, which stands for `answer_cosine(encoder, answer)`, or any `Score`. The first `count` of the K
    user tokens are read, all by default. A history with an event left out is encoded as if the event had never been:
    the time gap of the next event grows, ages shift, and no event older than those read moves up. All of them are
    encoded in batches of `batch_size`. Evaluation mode is the caller's to set; nobody else may use the encoder during
    the call. Raises `EventError` for a bad `count`, `PersonaError` for a score of another shape and for an LM in the
    encoder that does not give its attention weights.
    """
    score = answer_cosine(encoder, answer) if isinstance(answer, str) else answer
    read, truncated = newest(history, encoder.config.max_events)
    rows = [len(encoder.rows([event])) for event in read.events]  # a tabular event makes several
    known = [i for i, size in enumerate(rows) if size]

    state = encoder.read([read])[0]
    share = state_attention(encoder, [state], [instruction], count)[0].double().cpu()
    attention = np.array([part.sum().item() for part in share[1:].split(rows)])

    without = [read.of(read.events[:i] + read.events[i + 1 :]) for i in known]
    whole, *fallen = _scores(encoder, [read, *without], instruction, score, count, batch_size)
    leave_one_out = np.zeros(len(rows))  # an event without a row cannot be missed
    leave_one_out[known] = whole - np.array(fallen)

    return Explanation(
        instruction=instruction,
        answer=score.answer,
        measure=score.name,
        events=read.events,
        attention=attention,
        elsewhere=max(0.0, 1 - attention.sum()),
        leave_one_out=leave_one_out,
        score=whole,
        agreement=_agreement(attention[known], leave_one_out[known]),
        truncated=truncated,
    )


def answer_cosine(encoder: UserEncoder, answer: str) -> Score:
    """The cosine of the user's embedding and the answer's, for an encoder that was trained by contrast.

    The embeddings are those of `encoder.encode` and `encoder.encode_answers`.
    """
    vector = encoder.encode_answers([answer], convert_to_tensor=True)[0]
    return Score(lambda tokens: pooled(tokens.float()).cpu() @ vector, "cosine", answer)


def answer_likelihood(model: PersonalizedLM, messages: Messages, answer: str) -> Score:
    """The log-likelihood (nats) of `answer` under the frozen LLM, which reads the user tokens and `messages`.

    For the tokens of `model.encoder`. Where `answer` is a single token the score is that token's; otherwise it is that
    of the whole answer with its end-of-turn tokens.
    """

    @torch.inference_mode()
    def measure(tokens: torch.Tensor) -> torch.Tensor:
        requests = [Request(messages, (answer,), rows) for rows in model.projector(tokens)]
        return torch.tensor([found[0] for found in option_scores(model, requests)], dtype=torch.float64)

    return Score(measure, "log-likelihood", answer)


def _scores(
    encoder: UserEncoder,
    histories: Sequence[History],
    instruction: str,
    score: Score,
    count: int | None,
    batch_size: int,
) -> list[float]:
    asked, made = encoder.instruct([instruction])[0], []
    for start in range(0, len(histories), batch_size):
        states = encoder.read(histories[start : start + batch_size], batch_size)
        tokens = encoder.tokens(states, [asked] * len(states), count)
        made += score(torch.stack([found.tokens for found in tokens])).tolist()
    return made


def _agreement(attention: np.ndarray, leave_one_out: np.ndarray) -> Agreement | None:
    if len(attention) < 3 or not np.isfinite(leave_one_out).all():
        return None
    if not np.ptp(attention) or not np.ptp(leave_one_out):
        return None
    found = spearmanr(attention, leave_one_out)
    return Agreement(float(found.statistic), float(found.pvalue))
