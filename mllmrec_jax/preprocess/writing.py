"""Runs a writing stage: asks for what the store does not have, and stores each answer as it arrives."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator

from mllmrec_jax.config import ConfigError
from mllmrec_jax.data.records import DataError
from mllmrec_jax.preprocess.backends.protocol import Request, Unanswered, Writer
from mllmrec_jax.preprocess.key_table import KeyTable
from mllmrec_jax.preprocess.store import Store
from mllmrec_jax.progress import Progress


@dataclasses.dataclass
class Tally:
    """What a stage did: distinct pieces of work, how many of them were there already, how many were done now, and what that cost."""

    wanted: int = 0
    found: int = 0
    done: int = 0
    usage: Counter[str] = dataclasses.field(default_factory=Counter)
    usage_before: Counter[str] = dataclasses.field(default_factory=Counter)
    """What the work that was there already had cost."""
    unanswered: Counter[str] = dataclasses.field(default_factory=Counter)
    """Kinds of failure."""
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    """The first failure of each kind in full."""


class WritingError(DataError):
    """Texts are missing; `tally` is what was done all the same."""

    def __init__(self, message: str, tally: Tally):
        super().__init__(message)
        self.tally = tally


def write_texts(requests: Iterable[Request], writer: Writer, store: Store, *, description: str) -> Tally:
    """Has every request answered once; equal requests are asked once. Answers are `{"text": ..., "usage": ...}` in `store`.

    Raises:
      WritingError: the writer stopped, or left requests unanswered; what it did answer is kept.
    """
    tally, seen = Tally(), KeyTable()
    asked: set[str] = set()  # and not answered yet

    def list_new() -> Iterator[Request]:
        for request in requests:
            if not seen.add(request.key):
                continue
            tally.wanted += 1
            if request.key in store:
                tally.found += 1
                tally.usage_before.update(store.get(request.key)["usage"])
            else:
                asked.add(request.key)
                yield request

    try:
        with Progress(description=description, unit="text") as progress:
            for answer in writer.write(list_new()):
                tally.usage.update(answer.usage)
                if isinstance(answer, Unanswered):
                    tally.unanswered[answer.kind] += 1
                    tally.reasons.setdefault(answer.kind, answer.detail)
                    continue
                store.put(answer.key, {"text": answer.text, "usage": answer.usage})
                asked.discard(answer.key)
                tally.done += 1
                progress.advance()
    except ConfigError as error:
        raise WritingError(f"{description}: {error}", tally) from None
    finally:
        seen.close()
    if asked:
        why = "".join(f"; {count:,} {kind} ({tally.reasons[kind]})" for kind, count in tally.unanswered.most_common())
        missing = f"{len(asked):,} are missing{why}"
        raise WritingError(f"{description}: expected {tally.wanted:,} texts, {missing}; run it again to ask for these alone", tally)
    return tally
