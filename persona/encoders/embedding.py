"""User embeddings in the manner of sentence-transformers: `encode` users, `encode_answers`, compare by dot product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

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


def check_whole(name: str, value: int, least: int | None = None) -> int:
    """A whole number, of `least` or more; raises `EventError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise EventError(f"{name} must be a whole number, not {value!r} ({type(value).__name__})")
    if least is not None and value < least:
        raise EventError(f"{name} must be {least} or more, not {value}")
    return int(value)


def _listed(name: str, given: object, kind: type) -> list:
    """One or several Histories, or strings, as a list; raises `EventError` for anything else."""
    if isinstance(given, kind):
        return [given]
    one = "a string" if kind is str else f"a {kind.__name__}"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise EventError(f"{name} must be {one} or a list of them, not {type(given).__name__}")
    values = list(given)
    for number, value in enumerate(values):
        if not isinstance(value, kind):
            raise EventError(f"{name}[{number}] must be {one}, not {type(value).__name__}")
    return values


class EmbeddingMixin:
    """`encode` and `encode_answers` for `UserEncoder`. Evaluation mode is the caller's to set."""

    @torch.inference_mode()
    def encode(
        self,
        histories: History | Sequence[History],
        instruction: str | Sequence[str] = "",
        *,
        dim: int | None = None,
        tokens: int | None = None,
        batch_size: int = 64,
        convert_to_tensor: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Embeddings of users `[len(histories), dim]`, or of one user `[dim]`, L2-normalised, float32.

        `instruction` says what they are for: one for all, or one for each; empty, a general embedding. `tokens` of the
        K user tokens are averaged and the first `dim` numbers kept; all by default. Raises `EventError` for histories
        or instructions that are none, and for a number of instructions, tokens or dimensions that does not fit.
        """
        users = _listed("histories", histories, History)
        asked = _listed("instruction", instruction, str)
        if isinstance(instruction, str):
            asked *= len(users)
        if len(asked) != len(users):
            raise EventError(f"there are {len(users)} histories, but {len(asked)} instructions")
        dim, tokens, size = self._check_dim(dim), self.check_count(tokens), check_whole("batch_size", batch_size, 1)
        made = [torch.zeros(0, dim)]
        for start in range(0, len(users), size):
            part = slice(start, start + size)
            found = self.tokens(self.read(users[part], size), asked[part], tokens)
            made.append(pooled(torch.stack([f.tokens for f in found]).float(), None, dim).cpu())
        vectors = torch.cat(made)[0] if isinstance(histories, History) else torch.cat(made)
        return vectors if convert_to_tensor else vectors.numpy()

    @torch.inference_mode()
    def encode_answers(
        self,
        texts: str | Sequence[str],
        *,
        dim: int | None = None,
        batch_size: int = 256,
        convert_to_tensor: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Answers in the space of `encode`, `[len(texts), dim]`, or of one `[dim]`, for an encoder trained by contrast.

        The dot product of a user's embedding and an answer's is their cosine. Raises `EventError` for a bad `dim` and
        for texts that are none.
        """
        answers = _listed("texts", texts, str)
        dim, size = self._check_dim(dim), check_whole("batch_size", batch_size, 1)
        made = [torch.zeros(0, dim)]
        for start in range(0, len(answers), size):
            found = self.answer_vectors(answers[start : start + size])
            made.append(normalize(found.float()[:, :dim], dim=-1).cpu())
        vectors = torch.cat(made)[0] if isinstance(texts, str) else torch.cat(made)
        return vectors if convert_to_tensor else vectors.numpy()

    def _check_dim(self, dim: int | None) -> int:
        dim = self.config.width if dim is None else check_whole("dim", dim)
        if not 1 <= dim <= self.config.width:
            raise EventError(f"this encoder's embeddings have 1 to {self.config.width} dimensions, not {dim}")
        return dim
