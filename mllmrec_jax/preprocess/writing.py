"""Runs a writing stage: asks for what the store does not have, and stores each answer as it arrives."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator

from mllmrec_jax.data.records import DataError
from mllmrec_jax.preprocess.backends.protocol import Request, Writer
from mllmrec_jax.preprocess.store import Store
from mllmrec_jax.progress import Progress


@dataclasses.dataclass
class Tally:
    """What a stage did: distinct pieces of work, how many of them were there already, how many were done now, and what that cost."""

    wanted: int = 0
    found: int = 0
    done: int = 0
    usage: Counter[str] = dataclasses.field(default_factory=Counter)


def write_texts(requests: Iterable[Request], writer: Writer, store: Store, *, description: str) -> Tally:
    """Has every request answered once; equal requests are asked once. Answers are `{"text": ..., "usage": ...}` in `store`.

    Raises:
      DataError: the writer left requests unanswered; what it did answer is kept.
    """
    tally = Tally()
    seen: set[str] = set()
    asked: list[str] = []

    def list_new() -> Iterator[Request]:
        for request in requests:
            if request.key in seen:
                continue
            seen.add(request.key)
            tally.wanted += 1
            if request.key in store:
                tally.found += 1
            else:
                asked.append(request.key)
                yield request

    with Progress(description=description, unit="text") as progress:
        for written in writer.write(list_new()):
            store.put(written.key, {"text": written.text, "usage": written.usage})
            tally.done += 1
            tally.usage.update(written.usage)
            progress.advance()
    missing = [key for key in asked if key not in store]
    if missing:
        raise DataError(f"{description}: expected {tally.wanted} texts, {len(missing)} are missing; run it again to ask for these alone")
    return tally
