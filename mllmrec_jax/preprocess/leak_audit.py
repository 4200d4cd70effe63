"""Looks for the target of each trace in the trace: the only code of this room that sees targets. It changes nothing.

Four kinds of leak: the target's id; its title as the catalogue or a writer spells it (`exact`); its title in another case, punctuation or
form (`normalised`, by the rules of the sanitiser); nearly its title (`fuzzy`: a misspelling, an inflection). `exact` is looked for without
the sanitiser's code, so that a fault there shows here.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from rapidfuzz import fuzz

from mllmrec_jax.data.examples import LeakError
from mllmrec_jax.data.records import Item
from mllmrec_jax.preprocess.sanitize import count_names, sanitize_trace
from mllmrec_jax.preprocess.title_index import TitleIndex, fold_text, list_names, split_words

__all__ = ["Leak", "LeakError", "LeakReport", "audit_traces", "check_leaks"]

Kind = Literal["id", "exact", "normalised", "fuzzy"]

_EXAMPLES = 100  # leaks kept as examples; all are counted
_SHORTEST_FUZZY = 8  # folded characters: shorter names are near too many words


class Leak(NamedTuple):
    """One place where a trace tells its target."""

    row: int
    """Which trace, counted from 0."""
    target: int
    kind: Kind
    text: str
    score: float
    """Likeness to the title: 1 but for `fuzzy`."""


class LeakReport(NamedTuple):
    """What an audit found."""

    traces: int
    leaking: tuple[int, ...]
    """Which traces have at least one leak, counted from 0."""
    kinds: Mapping[Kind, int]
    """Traces by kind; one with several kinds counts in each."""
    ordinary: int
    """Traces in which a word of the target's title stands as an ordinary word ("the heat of the moment"): no leaks."""
    examples: tuple[Leak, ...]
    """The first leaks, at most 100."""

    @property
    def rate(self) -> float:
        """Share of traces that leak; 0 where there is no trace."""
        return len(self.leaking) / self.traces if self.traces else 0.0


class _Target(NamedTuple):
    index: TitleIndex
    spelled: re.Pattern[str] | None
    """Every written form of two words or more."""
    near: tuple[str, ...]
    """Folded names that are rare and long enough to be told from what is only like them."""


@functools.lru_cache(maxsize=1 << 12)
def _describe_target(item_id: int, title: str) -> _Target:
    index = TitleIndex([Item(item_id, title)])
    forms = {form for form in (title.strip(), *list_names(title)) if " " in form.strip()}
    spelled = "|".join(re.escape(form.strip()) for form in sorted(forms, key=len, reverse=True))
    near = tuple(key for key, name in index.names.items() if name.distinctive and len(key) >= _SHORTEST_FUZZY)
    return _Target(index, re.compile(rf"(?<!\w)(?:{spelled})(?!\w)") if spelled else None, near)


def _find_near(text: str, names: tuple[str, ...], fuzzy: float) -> tuple[str, float] | None:
    """The words of `text` that are most like one of the folded names, and how like (0 to 1); None below `fuzzy`."""
    words = [word.key for word in split_words(fold_text(text)[0])]
    folded = " ".join(words)
    best = None
    for name in names:
        place = fuzz.partial_ratio_alignment(name, folded, score_cutoff=100 * fuzzy - 10)
        if place is None:
            continue
        # The best place may begin or end inside a word: what counts is the whole words.
        start = folded.rfind(" ", 0, place.dest_start + 1) + 1
        end = folded.find(" ", max(place.dest_end - 1, start))
        found = folded[start : len(folded) if end < 0 else end]
        score = fuzz.ratio(name, found) / 100
        if score >= max(fuzzy, best[1] if best else 0.0):
            best = found, score
    return best


def _audit_trace(row: int, text: str, target: Item, fuzzy: float) -> tuple[list[Leak], bool]:
    """Leaks of one trace, at most one a kind; and whether a name of the target stands there as an ordinary word."""
    index, spelled, near = _describe_target(target.id, target.title)
    leaks: dict[Kind, Leak] = {}
    if spelled is not None and (match := spelled.search(text)):
        leaks["exact"] = Leak(row, target.id, "exact", match.group(), 1.0)
    cleaned = sanitize_trace(text, index)
    for change in cleaned.changes:
        if change.item == target.id:
            kind: Kind = "id" if change.kind == "id" else "exact" if _is_spelled(change.text, target.title) else "normalised"
            leaks.setdefault(kind, Leak(row, target.id, kind, change.text, 1.0))
    if nearly := _find_near(cleaned.text, near, fuzzy):
        leaks["fuzzy"] = Leak(row, target.id, "fuzzy", *nearly)
    return list(leaks.values()), count_names(cleaned.text, index) > 0


def _is_spelled(found: str, title: str) -> bool:
    return found in {title, *list_names(title)}


def audit_traces(traces: Iterable[str], targets: Iterable[Item], *, fuzzy: float = 0.9) -> LeakReport:
    """Reads every trace against its own target.

    Args:
      traces: texts as they will be shown, one a training window.
      targets: the item each trace must not tell, in the same order.
      fuzzy: likeness from which words that are not the title count as it (1 - edits / length, from 0 to 1). Only titles that are rare in
        English and have eight letters or more are compared.

    Raises:
      ValueError: there are more traces than targets, or fewer.
    """
    kinds: Counter[Kind] = Counter()
    examples: list[Leak] = []
    leaking: list[int] = []
    rows = ordinary = 0
    for row, (text, target) in enumerate(zip(traces, targets, strict=True)):
        leaks, stands = _audit_trace(row, text, target, fuzzy)
        rows += 1
        leaking += [row] if leaks else []
        ordinary += stands and not leaks
        kinds.update(leak.kind for leak in leaks)
        examples += leaks[: _EXAMPLES - len(examples)]
    return LeakReport(rows, tuple(leaking), dict(kinds), ordinary, tuple(examples))


def check_leaks(report: LeakReport, threshold: float) -> None:
    """Fails where too many traces tell their target.

    Args:
      threshold: largest share of leaking traces that is let through (0 to 1).

    Raises:
      LeakError: the share is larger; the message says how many of which kind and shows the first.
    """
    if report.rate > threshold:
        first = report.examples[0]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.kinds.items()))
        raise LeakError(
            f"traces: expected at most {threshold:.3%} to tell their target, got {len(report.leaking)} of {report.traces} ({kinds}); "
            f"the first is trace {first.row}, target {first.target}, {first.kind}: {first.text!r}"
        )
