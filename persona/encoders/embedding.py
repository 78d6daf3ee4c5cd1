"""User embeddings in the manner of sentence-transformers: `encode` users, `encode_answers`, compare by dot product."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import normalize

from persona.errors import EventError
from persona.history import History


def pooled(tokens: torch.Tensor, count: int | None = None, dim: int | None = None) -> torch.Tensor:
    """One vector of user tokens `[..., K, d]`: the mean of the first `count`, its first `dim` numbers, L2-normalised.

    Both ends are Matryoshka (Kusupati et al. 2022): what is cut off later is what would not have been made at all.
    """
    return normalize(tokens[..., :count, :].mean(-2)[..., :dim], dim=-1)


class EmbeddingMixin:
    """`encode` and `encode_answers` for `UserEncoder`. Evaluation mode is the caller's to set."""

    @torch.inference_mode()
    def encode(
        self,
        histories: Sequence[History],
        instruction: str | Sequence[str] = "",
        *,
        dim: int | None = None,
        tokens: int | None = None,
        batch_size: int = 64,
        convert_to_tensor: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Embeddings of users `[len(histories), dim]`, L2-normalised, float32.

        `instruction` says what they are for: one for all, or one for each; empty, a general embedding. `tokens` of the
        K user tokens are averaged and the first `dim` numbers kept; all by default. Raises `EventError` for a number of
        instructions, tokens or dimensions that does not fit.
        """
        asked = [instruction] * len(histories) if isinstance(instruction, str) else list(instruction)
        if len(asked) != len(histories):
            raise EventError(f"there are {len(histories)} histories, but {len(asked)} instructions")
        dim, tokens = self._check_dim(dim), self.check_count(tokens)
        made = [torch.zeros(0, dim)]
        for start in range(0, len(histories), batch_size):
            part = slice(start, start + batch_size)
            found = self.tokens(self.read(histories[part], batch_size), asked[part], tokens)
            made.append(pooled(torch.stack([f.tokens for f in found]).float(), None, dim).cpu())
        vectors = torch.cat(made)
        return vectors if convert_to_tensor else vectors.numpy()

    @torch.inference_mode()
    def encode_answers(
        self, texts: Sequence[str], *, dim: int | None = None, batch_size: int = 256, convert_to_tensor: bool = False
    ) -> np.ndarray | torch.Tensor:
        """Answers in the space of `encode`, `[len(texts), dim]`, for an encoder that was trained by contrast.

        The dot product of a user's embedding and an answer's is their cosine. Raises `EventError` for a bad `dim`.
        """
        dim = self._check_dim(dim)
        made = [torch.zeros(0, dim)]
        for start in range(0, len(texts), batch_size):
            found = self.answer_vectors(list(texts[start : start + batch_size]))
            made.append(normalize(found.float()[:, :dim], dim=-1).cpu())
        vectors = torch.cat(made)
        return vectors if convert_to_tensor else vectors.numpy()

    def _check_dim(self, dim: int | None) -> int:
        dim = self.config.width if dim is None else dim
        if not 1 <= dim <= self.config.width:
            raise EventError(f"this encoder's embeddings have 1 to {self.config.width} dimensions, not {dim}")
        return dim
