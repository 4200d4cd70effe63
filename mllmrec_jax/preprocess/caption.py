"""Stage 1: c ~ p(c | picture, title), one caption for each distinct picture content."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

from mllmrec_jax.preprocess.backends.protocol import Request, ShownItem, Writer, make_request
from mllmrec_jax.preprocess.samples import Samples
from mllmrec_jax.preprocess.store import Store
from mllmrec_jax.preprocess.templates import render_caption
from mllmrec_jax.preprocess_config import CaptionConfig
from mllmrec_jax.prompts import mentions_title, sanitise_text

_KEPT = 1 << 14  # finished captions kept in memory: a popular item is in many histories


def list_requests(samples: Samples, config: CaptionConfig, writer: Writer, *, noun: str) -> Iterator[tuple[int, Request]]:
    """(row of `samples.pictures`, request) of each distinct picture, under the title of the item of lowest id that has it."""
    described = writer.describe()
    for item, picture in samples.list_distinct():
        prompt = render_caption(item.title, noun=noun, max_words=config.max_words)
        yield samples.pictures.find_row(item.id), make_request("caption", prompt, [ShownItem(item.title, picture=picture)], described)


def finish_caption(text: str, title: str, *, max_words: int) -> str:
    """One line of at most `max_words` words; sentences that repeat the title are left out."""
    line = sanitise_text(text)
    sentences = [part for part in re.split(r"(?<=[.!?。])\s+", line) if part and not mentions_title(part, title)]
    return " ".join(" ".join(sentences).split()[:max_words])


class Captions:
    """Finished captions by item, read from the store when they are asked for; `keys` are of each content's first row."""

    def __init__(self, samples: Samples, store: Store, keys: Sequence[str], config: CaptionConfig):
        self._samples, self._store, self._keys, self._config = samples, store, keys, config
        self._find = functools.lru_cache(maxsize=_KEPT)(self._read)

    def find(self, item: int) -> str:
        """The caption of an item's picture; empty where there is none."""
        return self._find(item)

    def _read(self, item: int) -> str:
        first = self._samples.pictures.first[self._samples.pictures.find_row(item)]
        if not self._config.enabled or first < 0:
            return ""
        text = self._store.get(self._keys[first])["text"]
        return finish_caption(text, self._samples.dataset.items[item].title, max_words=self._config.max_words)
