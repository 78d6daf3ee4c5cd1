"""Event encoders: text, item and tabular parts whose sum, with source and time, is one event vector."""

from __future__ import annotations

import torch
from torch import nn

from persona.encoders.config import EncoderConfig
from persona.encoders.features import TIME_FEATURES, EventBatch
from persona.encoders.vocabulary import Vocabulary


class TextPart(nn.Module):
    """LayerNorm and a two-layer GELU MLP from the frozen text vector to width d (InstructUE, section 3)."""

    def __init__(self, text_dim: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(text_dim)
        self.mlp = nn.Sequential(nn.Linear(text_dim, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """`[..., text_dim]` -> `[..., d]`; the zero vector, no text, stays zero."""
        present = vectors.abs().sum(-1, keepdim=True) > 0
        return self.mlp(self.norm(vectors)) * present


class SourceTexts(nn.Module):
    """A `TextPart` for each source (InstructUE, section 3), and one, number 0, for texts that are of no source.

    Where text vectors end in `words` numbers, an LM's own words (see `WordedTexts`), these are added as they are.
    """

    def __init__(self, sources: int, text_dim: int, width: int, words: int = 0):
        super().__init__()
        self.width, self.words = width, words
        self.parts = nn.ModuleList(TextPart(text_dim - words, width) for _ in range(1 + sources))

    def forward(self, vectors: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., text_dim]`, and source indices `[...]` or none -> `[..., d]`."""
        vectors, words = vectors.split([vectors.shape[-1] - self.words, self.words], dim=-1)
        made = vectors.new_zeros(*vectors.shape[:-1], self.width)
        for number in [0] if source is None else source.unique().tolist():
            at = slice(None) if source is None else source == number
            made[at] = self.parts[number](vectors[at]).to(made)  # autocast gives bf16
        return made + words if self.words else made


class TabularPart(nn.Module):
    """One vector for each column: its name, plus its category or its number (FT-Transformer, Gorishniy et al. 2021)."""

    def __init__(self, columns: int, categories: int, width: int):
        super().__init__()
        self.column = nn.Embedding(columns + 1, width, padding_idx=0)
        self.category = nn.Embedding(categories + 1, width, padding_idx=0)
        self.slope = nn.Embedding(columns + 1, width, padding_idx=0)

    def forward(self, column: torch.Tensor, category: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """`[B, N]`, `[B, N]`, `[B, N, 2]` -> `[B, N, d]`."""
        return self.column(column) + self.category(category) + self.slope(column) * number[..., :1]


class EventEncoder(nn.Module):
    """Sum of the parts; a part that an event does not have adds nothing."""

    def __init__(self, vocabulary: Vocabulary, text_dim: int, config: EncoderConfig, words: int = 0):
        """`words`: how many of the last numbers of a text vector are an LM's own words; see `SourceTexts`."""
        super().__init__()
        width, shape = config.width, (text_dim, config.width)
        self.config = config
        apart = config.source_adapters or words
        self.text = SourceTexts(len(vocabulary.sources), *shape, words) if apart else TextPart(*shape)
        self.item = nn.Embedding(len(vocabulary.items) + 1, width, padding_idx=0)
        self.tabular = TabularPart(len(vocabulary.columns), len(vocabulary.categories), width)
        self.source = nn.Embedding(len(vocabulary.sources) + 1, width, padding_idx=0)
        self.number = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
        self.time = nn.Linear(TIME_FEATURES, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        of_item = torch.tensor([vocabulary.source_of(key) for key in vocabulary.items], dtype=torch.long)
        self.register_buffer("_source_of_item", of_item, persistent=False)
        for embedding in (self.item, self.tabular.column, self.tabular.category, self.tabular.slope, self.source):
            nn.init.normal_(embedding.weight, std=0.3)
            with torch.no_grad():
                embedding.weight[0].zero_()

    @torch.no_grad()
    def quieten(self, share: float) -> None:
        """Scales down what is added to an LM's own words, so that a new encoder's event vectors are near these."""
        learned = [self.item, self.source, self.time, self.number[-1], *self.tabular.children()]
        for part in [*learned, *(text.mlp[-1] for text in self.text.parts)]:
            for parameter in part.parameters():
                parameter.mul_(share)

    def forward(self, batch: EventBatch) -> torch.Tensor:
        """Event vectors `[B, N, d]`."""
        text = batch.text if self.config.item_text else batch.text * (batch.item == 0)[..., None]
        vectors = (
            self._text(text, batch.source)
            + self.item(batch.item)
            + self.tabular(batch.column, batch.category, batch.number)
            + self.source(batch.source)
            + self.number(batch.number)
            + self.time(batch.time)
        )
        if self.config.item_attributes and batch.attributes.shape[2]:
            vectors = vectors + self.tabular.category(batch.attributes).sum(2)
        return self.dropout(self.norm(vectors))

    def catalogue(self, item_vectors: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Targets of the next-item objective: items `index` `[n]` with text vectors `[n, text_dim]` -> `[n, d]`.

        With `item_targets` text, ids stay on the input side: what is learned from who took what then lies in the space
        in which an instruction names an item, and a new item is a target like any other; items without text go by
        their id. With `item_targets` id, an item is the sum of its id and, if it is read at all, its text.
        """
        ids, source = self.item.weight[1:][index], self._source_of_item[index]
        if self.config.item_targets == "id":
            return ids + self._text(item_vectors, source) if self.config.item_text else ids
        named = item_vectors.abs().sum(-1, keepdim=True) > 0
        return torch.where(named, self._text(item_vectors, source), ids)

    def _text(self, vectors: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return self.text(vectors, source) if self.config.source_adapters else self.text(vectors)
