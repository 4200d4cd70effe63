"""Words that say something about a taste: what backend `local` counts."""

from __future__ import annotations

import re

# Words that say nothing about a taste, those of the captions' own frame among them.
_FRAME = (
    "a an and are as at by for from has have in is it its no not of on or that the this to was were with picture colour light edges form "
    "composition clear shapes lines shows image poster movie film even-toned half-lit measured moderate middle centre"
)
_EMPTY = frozenset(_FRAME.split())
_WORD = re.compile(r"[^\W\d_]{3,}(?:-[^\W\d_]+)*")


def list_words(text: str) -> list[str]:
    """The words of a text that may say something about a taste, lower case, each once, in order."""
    return list(dict.fromkeys(word for word in _WORD.findall(text.lower()) if word not in _EMPTY))
