"""Backend `local`: no model and no download. Captions are measured; traces count what captions and titles have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mllmrec_jax.preprocess.backends.local_rater import rate_form
from mllmrec_jax.preprocess.backends.measures import describe_measures, measure_image
from mllmrec_jax.preprocess.backends.protocol import Picture, Request, ShownItem, Written
from mllmrec_jax.preprocess.backends.words import list_words
from mllmrec_jax.prompts import sanitise_text

VERSION = 1  # raise it when the same request gives another text
_KEPT = 1 << 14  # descriptions kept in memory
_NO_PICTURE = "no picture"
_TITLE_CHARS = 200


def _rank_words(texts: Sequence[str]) -> list[tuple[str, int]]:
    """Words by the number of texts they occur in, then by how late, then by the alphabet."""
    counts: Counter[str] = Counter()
    latest: dict[str, int] = {}
    for place, text in enumerate(texts):
        for word in list_words(text):
            counts[word] += 1
            latest[word] = place
    return sorted(counts.items(), key=lambda entry: (-entry[1], -latest[entry[0]], entry[0]))


def compose_trace(titles: Sequence[str], descriptions: Sequence[str], draft: str = "") -> str:
    """Four steps from a history's titles and descriptions, oldest first (empty where an item has none).

    Step 2 tells what several items share, step 3 what the newer half has and the older has not, step 4 what the newer half has most, what
    the whole shares, and what `draft` predicted. No title is written out.
    """
    shown = [", ".join(list_words(text)[:6]) or _NO_PICTURE for text in descriptions]
    common = _rank_words(descriptions)
    shared = [(word, count) for word, count in common if count > 1][:8]
    title_words = [word for word, count in _rank_words([sanitise_text(title, _TITLE_CHARS) for title in titles]) if count > 1][:4]
    half = len(descriptions) // 2
    older = {word for text in descriptions[:half] for word in list_words(text)}
    recent = _rank_words(descriptions[half:])
    newer = [word for word, _ in recent if word not in older][:4]
    predicted, overall = set(list_words(draft.rpartition("Step 4:")[2])), dict(common)
    profile = sorted(recent, key=lambda entry: (-(2 * entry[1] + overall[entry[0]] + 2 * (entry[0] in predicted)), entry[0]))[:6]

    together = ", ".join(f"{word} ({count} of {len(descriptions)})" for word, count in shared) or "nothing that repeats"
    named = f"; their titles share the words {', '.join(title_words)}" if title_words else "; their titles share no word"
    turn = f"the newer choices bring {', '.join(newer)}" if newer else "the newer choices bring nothing new"
    wanted = ", ".join([word for word, _ in profile] + title_words) or "no clear direction"
    return (
        f"Step 1: from the oldest to the newest, the pictures show {'; '.join(shown)}.\n"
        f"Step 2: they have in common {together}{named}.\n"
        f"Step 3: {turn}.\n"
        f"Step 4: next fits {wanted}."
    )


class LocalWriter:
    """Answers every request at once, in order."""

    def __init__(self) -> None:
        self._descriptions: dict[str, str] = {}

    def describe(self) -> dict[str, Any]:
        return {"backend": "local", "version": VERSION}

    def _describe_picture(self, picture: Picture) -> str:
        text = self._descriptions.get(picture.digest)
        if text is None:
            text = describe_measures(measure_image(picture.open()))
            if len(self._descriptions) >= _KEPT:
                self._descriptions.pop(next(iter(self._descriptions)))
            self._descriptions[picture.digest] = text
        return text

    def _look(self, item: ShownItem) -> str:
        return item.caption or (self._describe_picture(item.picture) if item.picture is not None else "")

    def write(self, requests: Iterable[Request]) -> Iterator[Written]:
        for request in requests:
            if request.task == "caption":
                text = self._look(request.items[0])
            elif request.task == "quality":
                text = rate_form(request)
            else:
                text = compose_trace([item.title for item in request.items], [self._look(item) for item in request.items], request.draft)
            yield Written(request.key, text, {})
