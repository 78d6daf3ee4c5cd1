"""`Mentions`: finds the items that an instruction names, so that a question about an item meets its id, too."""

from __future__ import annotations

from collections.abc import Sequence

_PUNCTUATION = ".,;:!?\"'()[]"


class Mentions:
    """Looks up items by their whole text, word by word; the longest name wins, names do not overlap."""

    def __init__(self, item_texts: Sequence[str]):
        """`item_texts[i]` is the text of item index i + 1, as in `Vocabulary`."""
        self._items: dict[tuple[str, ...], int] = {}
        for index, text in enumerate(item_texts, 1):
            if words := _words(text):
                self._items.setdefault(words, index)
        self._longest = max(map(len, self._items), default=0)

    def find(self, text: str) -> list[int]:
        """Item indices in the order in which `text` names them."""
        words, found, at = _words(text), [], 0
        while at < len(words):
            for size in range(min(self._longest, len(words) - at), 0, -1):
                index = self._items.get(words[at : at + size])
                if index is not None:
                    found.append(index)
                    at += size
                    break
            else:
                at += 1
        return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for part in text.split() if (word := part.strip(_PUNCTUATION)))
