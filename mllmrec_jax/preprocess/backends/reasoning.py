"""What a reasoning model thinks aloud is no part of its answer."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_OPEN = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_CLOSE = re.compile(r"</think(?:ing)?>", re.IGNORECASE)


def strip_reasoning(text: str) -> str:
    """A model's answer without its `<think>` blocks, white space around it removed.

    A chat template may have opened the block, so that the text has its end alone: what stands before that is left out. A block without an
    end was cut off by the limit of tokens: from there on everything is left out, and where nothing else was written, the answer is empty.
    """
    answer = _CLOSE.split(_BLOCK.sub("", text))[-1]
    return _OPEN.split(answer, maxsplit=1)[0].strip()
