"""`UserEncoder`: a history and an instruction in, user tokens out.

Event vectors, backbone states and what the head reads of them do not depend on the instruction, so they are
computed once (`read`), continued event by event (`extend`), and shared by all questions. An instruction is encoded
once for all users (`instruct`). That one reads the other is all that a request pays for (`tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from persona.encoders.backbones import build_backbone
from persona.encoders.config import EncoderConfig
from persona.encoders.embedding import EmbeddingMixin, check_whole, pooled
from persona.encoders.events import EventEncoder
from persona.encoders.features import EventBatch, Row, event_rows, make_batch, newest
from persona.encoders.heads import build_head
from persona.encoders.hub import HubMixin
from persona.encoders.mentions import Mentions
from persona.encoders.text import TextEncoder
from persona.encoders.vocabulary import Vocabulary
from persona.errors import EventError
from persona.history import Event, History


@dataclass(frozen=True)
class UserTokens:
    """User embeddings `[K, d]` for one (user, instruction); every prefix of the K tokens is usable (Matryoshka)."""

    tokens: torch.Tensor
    """`[K, d]`."""
    truncated: bool = False
    """True when the history was longer than the encoder's `max_events` and only its newest events were read."""

    @property
    def vector(self) -> torch.Tensor:
        """Mean over tokens, L2-normalised, `[d]`: for retrieval and probes."""
        return pooled(self.tokens)


@dataclass(frozen=True)
class UserState:
    """What is cached for a user: backbone states and what is needed to continue them."""

    states: torch.Tensor
    """`[1 + rows, d]`; the first is the learned start state, all there is of an empty history."""
    cache: list[torch.Tensor]
    """The backbone's cache."""
    memory: torch.Tensor
    """What the head reads of the states, positions in the last dimension but one."""
    events: int = 0
    """Timed events read, those of unknown sources too, though they make no row."""
    last_timestamp: float | None = None
    """Seconds; time of the newest event read."""
    row_timestamp: float | None = None
    """Seconds; time of the newest event that made a row: the time gap of the next row starts here."""
    truncated: bool = False
    """See `UserTokens.truncated`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (self.states, self.memory, *self.cache))


@dataclass(frozen=True)
class InstructionState:
    """What is cached for an instruction: how it begins to ask, whoever the user is."""

    latents: torch.Tensor
    """`[K + T, d]`: the K queries, then the T states of the instruction; of an `LLMUserEncoder` in the other order."""
    topic: torch.Tensor
    """`[d]`: the instruction in the space of the events; empty for an `LLMUserEncoder`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.latents.nbytes + self.topic.nbytes


class UserEncoder(EmbeddingMixin, HubMixin, nn.Module):
    """Event encoders, a sequence backbone, and a head that makes tokens: an instruction-aware resampler by default."""

    _named = True
    """Whether a column's text holds its name; see `event_rows`."""

    def __init__(self, config: EncoderConfig, vocabulary: Vocabulary, text_encoder: TextEncoder | None = None):
        super().__init__()
        self.config, self.vocabulary, self._frozen = config, vocabulary, False
        # Not a submodule: it is frozen, shared between encoders, and never saved with the weights.
        object.__setattr__(self, "text_encoder", text_encoder or TextEncoder(config.text_encoder))
        dim = self.text_encoder.dim
        self.mentions = Mentions(vocabulary.item_texts if config.mentions else ())
        self.events = EventEncoder(vocabulary, dim, config, self.text_encoder.words)
        self.start = nn.Parameter(torch.randn(config.width) * 0.3)
        self._build(dim)

    def _build(self, text_dim: int) -> None:
        """Makes `backbone` and `head`."""
        config = self.config
        self.backbone = build_backbone(
            config.backbone,
            config.width,
            config.heads,
            config.layers,
            config.dropout,
            config.inner,
            1 + config.max_events,
        )
        self.head = build_head(config, text_dim)

    def freeze(self, frozen: bool = True) -> None:
        """Leaves event encoders and backbone as they are in training: no gradient, no dropout; only the head learns."""
        self._frozen = frozen
        for part in (self.events, self.backbone):
            part.requires_grad_(not frozen)
        self.start.requires_grad_(not frozen)

    def answer_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """The answers' tower of contrastive training, `[len(texts), d]`: a text in the space of the events' texts."""
        return self.events.text(self.text_encoder.vectors(list(texts)).to(self.device))

    def train(self, mode: bool = True) -> UserEncoder:
        """Training mode, but for what is frozen."""
        super().train(mode)
        for part in (self.events, self.backbone) if self._frozen else ():
            part.train(False)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.start.device

    def forward(
        self, batch: EventBatch, instructions: Sequence[str], owner: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """User tokens `[Q, K, d]` of Q instructions, and the batch's states `[B, 1 + N, d]`.

        Instruction q asks about history `owner[q]` of the batch.
        """
        states, mask = self.states(batch)
        return self.resample(states[owner], mask[owner], instructions), states

    def states(self, batch: EventBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Backbone states `[B, 1 + N, d]` of a batch and their mask; the first state is the start state."""
        mask = with_start(batch.mask)
        return self.backbone(self._vectors(batch), mask, times=start_times(batch))[0], mask

    def _vectors(self, batch: EventBatch) -> torch.Tensor:
        """The backbone's input `[B, 1 + N, d]`: the start vector, then the event vectors."""
        vectors = self.events(batch)
        return torch.cat([self.start.expand(len(vectors), 1, -1), vectors], dim=1)

    def resample(self, states: torch.Tensor, mask: torch.Tensor, instructions: Sequence[str]) -> torch.Tensor:
        """`states` `[Q, N, d]`, `mask` `[Q, N]` and Q instructions -> `[Q, K, d]`."""
        return self.head(states, mask, *self._words(instructions))

    def _words(self, instructions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The head's inputs about instructions: states `[Q, T, text_dim]`, mask `[Q, T]`, topics `[Q, d]`."""
        words, seen = padded([w.to(self.device) for w in self.text_encoder.states_of(list(instructions))])
        topics = self.events.text(words[:, 0])
        if self.config.mentions:
            topics = torch.stack([self._named(text, topic) for text, topic in zip(instructions, topics)])
        return words, seen, topics

    def _named(self, instruction: str, topic: torch.Tensor) -> torch.Tensor:
        """What an instruction is about, `[d]`: the items that it names, or `topic` if it names none."""
        found = self.mentions.find(instruction)
        if not found:
            return topic
        texts = self.text_encoder.vectors([self.vocabulary.item_texts[i - 1] for i in found]).to(self.device)
        return self.events.catalogue(texts, torch.tensor(found, device=self.device) - 1).mean(0)

    def item_scores(self, states: torch.Tensor, texts: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """How likely each item is next, by states `[P, d]`: logits `[P, items]`, of the items `index` alone if given.

        `texts` `[items, text_dim]` are the vectors of `vocabulary.item_texts`.
        """
        index = torch.arange(len(texts), device=states.device) if index is None else index
        return states @ self.events.catalogue(texts[index], index).T / self.config.width**0.5

    def rows(self, events: Sequence[Event], previous: float | None = None) -> list[Row]:
        """What is read of events, before texts are encoded; see `event_rows`."""
        return event_rows(events, self.vocabulary, previous, named=self._named)

    def batch(self, histories: Sequence[History]) -> EventBatch:
        """Histories as the model's input, each cut to its newest `max_events`."""
        rows = [self.rows(newest(h, self.config.max_events)[0].events) for h in histories]
        return make_batch(rows, self.text_encoder).to(self.device)

    @torch.inference_mode()
    def read(self, histories: Sequence[History], batch_size: int = 64) -> list[UserState]:
        """States of many users, one forward pass for each `batch_size`. Evaluation mode is the caller's to set."""
        result = []
        for start in range(0, len(histories), batch_size):
            part = histories[start : start + batch_size]
            batch = self.batch(part)
            mask = with_start(batch.mask)
            states, cache = self.backbone(self._vectors(batch), mask, times=start_times(batch))
            memory = self._memory(states, mask, cache)
            for i, history in enumerate(part):
                size = int(mask[i].sum())
                read, truncated = newest(history, self.config.max_events)
                timed = read.timed
                result.append(
                    UserState(
                        states[i, :size].clone(),
                        self._keep(cache, i, mask.shape[1] - size),
                        memory[:, :, i, :, :size].clone(),
                        events=len(timed),
                        last_timestamp=timed[-1].timestamp if timed else None,
                        row_timestamp=self._row_timestamp(timed),
                        truncated=truncated,
                    )
                )
        return result

    @torch.inference_mode()
    def extend(self, state: UserState, events: Sequence[Event]) -> UserState:
        """The state after newer `events`; equal to encoding the whole history again, at the price of the new events.

        Raises `EventError` for an event without a time or older than the newest one read, and when the result would
        be longer than `max_events`: encode the history again in these cases.
        """
        events = sorted(events, key=lambda e: -1.0 if e.timestamp is None else e.timestamp)
        rows = self.rows(events, state.row_timestamp)
        for event in events:
            if event.timestamp is None or (state.last_timestamp is not None and event.timestamp < state.last_timestamp):
                raise EventError("an event without a time, or older than the newest one read, cannot extend a state")
        if state.events + len(events) > self.config.max_events:
            raise EventError(f"a state holds at most {self.config.max_events} events; encode the history again")
        if not events:
            return state
        state = replace(
            state,
            events=state.events + len(events),
            last_timestamp=events[-1].timestamp,
            row_timestamp=self._row_timestamp(events, state.row_timestamp),
        )
        if not rows:
            return state
        batch = make_batch([rows], self.text_encoder).to(self.device)
        new, cache = self._continue(state, self.events(batch), batch.timestamp)
        states = torch.cat([state.states, new[0]])
        mask = torch.ones(1, len(states), dtype=torch.bool, device=states.device)
        memory = self._memory(states[None], mask, cache)
        return replace(state, states=states, cache=self._keep(cache, 0, 0), memory=memory[:, :, 0])

    # What a subclass with another backbone and head does in its own way.

    def _memory(self, states: torch.Tensor, mask: torch.Tensor, cache) -> torch.Tensor:
        """What a user's tokens are read from: `[layers, 2, B, heads, N, d / heads]`."""
        return self.head.memory(states, mask)

    def _keep(self, cache, row: int, unused: int) -> list[torch.Tensor]:
        """The part of the backbone's cache that belongs to one row of a batch."""
        return self.backbone.keep(cache, row, unused)

    def _continue(self, state: UserState, vectors: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, object]:
        """States of new event vectors `[1, N, d]` behind those of `state`, and the backbone's cache."""
        return self.backbone(vectors, cache=state.cache, times=times)

    def _row_timestamp(self, timed: Sequence[Event], before: float | None = None) -> float | None:
        return next((e.timestamp for e in reversed(timed) if e.source in self.vocabulary.sources), before)

    @torch.inference_mode()
    def instruct(self, instructions: Sequence[str]) -> list[InstructionState]:
        """States of instructions, which `tokens` takes in place of their texts."""
        if not instructions:
            return []
        words, known, topics = self._words(instructions)
        latents, seen = self.head.ask(words, known, topics)
        return [InstructionState(own[mask].clone(), t.clone()) for own, mask, t in zip(latents, seen, topics)]

    @torch.inference_mode()
    def tokens(
        self, states: Sequence[UserState], instructions: Sequence[str | InstructionState], count: int | None = None
    ) -> list[UserTokens]:
        """User tokens for each (state, instruction) pair; `count` keeps the first so many of the K tokens.

        Raises `EventError` for another number of instructions than of states, and for a `count` that is not 1 to K.
        """
        count = self.check_count(count)
        if isinstance(instructions, str) or len(instructions) != len(states):
            raise EventError(f"instructions is a list with one for each of the {len(states)} states")
        if not states:
            return []
        texts = list(dict.fromkeys(i for i in instructions if isinstance(i, str)))
        made = dict(zip(texts, self.instruct(texts))) if texts else {}
        asked = [made[i] if isinstance(i, str) else i for i in instructions]
        # [N, layers, 2, heads, d / heads] each, padded along N, and back
        memory, mask = padded([s.memory.movedim(3, 0) for s in states])
        tokens = self._answer(states, asked, memory.permute(2, 3, 0, 4, 1, 5), mask)[:, :count]
        return [UserTokens(t.clone(), s.truncated) for t, s in zip(tokens, states)]

    def check_count(self, count: int | None) -> int:
        """How many tokens are asked for, all K by default; raises `EventError` when the encoder makes fewer."""
        count = self.config.tokens if count is None else check_whole("the number of tokens", count)
        if not 1 <= count <= self.config.tokens:
            raise EventError(f"this encoder makes 1 to {self.config.tokens} tokens, not {count}")
        return count

    def _answer(
        self, states: Sequence[UserState], asked: Sequence[InstructionState], memory: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """User tokens `[B, K, d]` of pairs, whose padded memories and their mask are given."""
        latents, seen = padded([a.latents for a in asked])
        match = torch.stack([s.states[-1] for s in states]) * torch.stack([a.topic for a in asked])
        return self.head.read(latents, seen, memory, mask, match)


def padded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors `[n, ...]` of several lengths as `[B, N, ...]`, and their mask `[B, N]`."""
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    sizes = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device)[None] < sizes[:, None]


def start_times(batch: EventBatch) -> torch.Tensor:
    """Seconds of the start state, which has the time of the first row, and of the rows, `[B, 1 + N]`."""
    first = batch.timestamp[:, :1] if batch.timestamp.shape[1] else batch.timestamp.new_zeros(len(batch.timestamp), 1)
    return torch.cat([first, batch.timestamp], dim=1)


def with_start(mask: torch.Tensor) -> torch.Tensor:
    """A mask of rows `[B, N]` with the start state before them, `[B, 1 + N]`."""
    return torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
