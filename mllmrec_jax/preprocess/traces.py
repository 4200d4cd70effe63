"""The trace of each training window, from its requests to its sanitised text; only keys are in memory, texts are read from the stores."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from mllmrec_jax.data.splits import Window
from mllmrec_jax.preprocess import sanitize, title_index
from mllmrec_jax.preprocess.backends.protocol import Request, Writer
from mllmrec_jax.preprocess.caption import Captions
from mllmrec_jax.preprocess.gallery import show_masks
from mllmrec_jax.preprocess.hashes import Hashes
from mllmrec_jax.preprocess.key_table import KeyTable
from mllmrec_jax.preprocess.pseudo_cot import make_pseudo_request
from mllmrec_jax.preprocess.refine_cot import finish_trace, make_refine_request
from mllmrec_jax.preprocess.samples import Samples
from mllmrec_jax.preprocess.store import Store, hash_content, hash_rows
from mllmrec_jax.preprocess.writing import Tally, write_texts
from mllmrec_jax.progress import track

_SHOWN = 3  # changes of each rule that a report shows


@functools.cache
def hash_sanitizer() -> str:
    """Of the sanitiser's code: traces are sanitised again when it changes, which costs nothing."""
    sources = "".join(inspect.getsource(module) for module in (sanitize, title_index))
    return hashlib.sha256(sources.encode()).hexdigest()


def write_pseudo(windows: Sequence[Window], samples: Samples, writer: Writer, store: Store, *, noun: str) -> tuple[Tally, Sequence[str]]:
    """Stage 2: answers in `store`; returns the key of each window's."""
    keys = Hashes()

    def list_requests() -> Iterator[Request]:
        for window in windows:
            request = make_pseudo_request(window.history, samples, writer, noun=noun)
            keys.append(request.key)
            yield request

    return write_texts(list_requests(), writer, store, description="pseudo_cot"), keys


def write_refined(
    windows: Sequence[Window],
    drafts: Sequence[str],
    draft_store: Store,
    samples: Samples,
    captions: Captions,
    writer: Writer,
    store: Store,
    *,
    noun: str,
) -> tuple[Tally, Sequence[str]]:
    """Stage 3: answers in `store`; `drafts` are keys in `draft_store`, none where the stage before is left out."""
    keys = Hashes()

    def list_requests() -> Iterator[Request]:
        for row, window in enumerate(windows):
            draft = draft_store.get(drafts[row])["text"] if drafts else ""
            request = make_refine_request(window.history, draft, samples, captions, writer, noun=noun)
            keys.append(request.key)
            yield request

    return write_texts(list_requests(), writer, store, description="refine_cot"), keys


class Traces:
    """Sanitised traces by row of the windows; empty where a model did not write all four steps."""

    def __init__(self, store: Store, keys: Sequence[str]):
        self._store, self.keys = store, keys

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, row: int) -> str:
        """The trace of one window."""
        return self._store.get(self.keys[row])["text"]

    def count_changes(self) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """How many traces were changed or unusable, and how many changes each rule made, over all windows; the first three of each rule."""
        shown: list[dict[str, Any]] = []
        counts: dict[str, int] = {"traces": len(self), "unusable": 0, "changed": 0}
        for key in self.keys:
            value = self._store.get(key)
            counts["unusable"] += not value["text"]
            counts["changed"] += bool(value["changes"])
            for mask in show_masks(value["text"], value["changes"]):
                rule = f"rule: {mask['rule']}"
                counts[rule] = counts.get(rule, 0) + 1
                shown += [mask] if counts[rule] <= _SHOWN else []
        return counts, shown


def sanitise_traces(keys: Sequence[str], source: Store, samples: Samples, store: Store) -> tuple[Tally, Traces]:
    """Stage 4: cuts what models wrote down to the four steps and masks ids and titles; every change is kept in `store`.

    Args:
      keys: of each window's text in `source`.
      samples: the catalogue whose titles are masked; the windows' targets are not looked at.
    """
    items = samples.list_items()
    catalogue = hash_rows(([item.id, item.title, item.genres] for item in items), "catalogue")
    index: title_index.TitleIndex | None = None
    tally, found, seen = Tally(), Hashes(), KeyTable()
    for key in track(keys, description="sanitize", unit="trace"):
        text = finish_trace(source.get(key)["text"])
        own = hash_content("sanitize", hash_sanitizer(), catalogue, text)
        found.append(own)
        if not seen.add(own):
            continue
        tally.wanted += 1
        if own in store:
            tally.found += 1
            continue
        if index is None:
            index = title_index.TitleIndex(items)
        cleaned = sanitize.sanitize_trace(text, index)
        store.put(own, {"text": cleaned.text, "changes": [change._asdict() for change in cleaned.changes]})
        tally.done += 1
    seen.close()
    return tally, Traces(store, found)
