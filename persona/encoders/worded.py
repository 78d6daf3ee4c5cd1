"""`WordedTexts`: text vectors with an LM's own reading of the text behind them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from cachetools import LRUCache

from persona.encoders.llm_trunk import LLMTrunk
from persona.encoders.text import TextEncoder, text_key

WORDS_BYTES = 128 * 2**20
"""Memory for what an LM says of texts."""


class WordedTexts:
    """A `TextEncoder` whose vectors end in the mean of a trunk's word embeddings over the text, scaled to a mean square
    of 1: a trunk that only knows words then understands an event before its adapters have learned to say it. The
    text is read as within a sentence: to most tokenizers "garden" and " garden" are different words.
    """

    def __init__(self, texts: TextEncoder, trunk: LLMTrunk):
        self.texts, self.words = texts, trunk.width
        self._trunk = trunk
        self._lock = threading.Lock()
        self._cache: LRUCache[bytes, torch.Tensor] = LRUCache(WORDS_BYTES, getsizeof=lambda words: words.nbytes)
        self._forgotten = 0

    @property
    def name(self) -> str:
        """Of the text encoder."""
        return self.texts.name

    @property
    def dim(self) -> int:
        """Width of a vector: the text encoder's, and the trunk's."""
        return self.texts.dim + self.words

    @torch.no_grad()
    def vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors `[len(texts), dim]` on the CPU; the empty text is the zero vector."""
        keys = {text: text_key(text) for text in texts if text}
        with self._lock:
            found = {text: self._cache[key] for text, key in keys.items() if key in self._cache}
            forgotten = self._forgotten
        missing = [text for text in keys if text not in found]
        if missing:
            words = self._trunk.words([self._trunk.within(text) for text in missing])
            made = {text: _mean(own).cpu() for text, own in zip(missing, words)}
            with self._lock:
                if forgotten == self._forgotten:  # else one of these texts may be what was to be forgotten
                    self._cache.update((keys[text], vector) for text, vector in made.items())
            found |= made
        nothing = torch.zeros(self.words)
        words = torch.stack([found.get(t, nothing) for t in texts]) if texts else torch.zeros(0, self.words)
        return torch.cat([self.texts.vectors(texts), words], dim=1)

    def states_of(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """See `TextEncoder`."""
        return self.texts.states_of(texts)

    def forget(self, texts: Sequence[str]) -> None:
        """See `TextEncoder`."""
        with self._lock:
            for text in texts:
                self._cache.pop(text_key(text), None)
            self._forgotten += 1
        self.texts.forget(texts)


def _mean(words: torch.Tensor) -> torch.Tensor:
    """Mean of `[T, d]`, scaled to a mean square of 1; zero of nothing."""
    mean = words.float().mean(0) if len(words) else words.new_zeros(words.shape[1])
    return mean / mean.square().mean().sqrt().clamp(min=1e-6)
