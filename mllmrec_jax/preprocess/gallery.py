"""What the page shows of single items and traces: plain JSON for the report, short of the pictures themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mllmrec_jax.data.splits import Window
from mllmrec_jax.preprocess.sanitize import ID_MASK, TITLE_MASK
from mllmrec_jax.preprocess.score import Scores

BEST = WORST = 3
BESIDE = 2
"""Windows shown on each side of a threshold."""
PLAIN = 4
"""Windows shown where there are no scores."""
ITEMS = 8
"""Items shown of each end of the catalogue."""
AROUND = 60
"""Characters shown on each side of a mask or a leak."""
BINS = 40
ENDS = (
    ("most", "Titles and pictures that agree most", "by cos(title, picture)"),
    ("least", "Titles and pictures that agree least", "where wrong pictures would be"),
)
_TITLE_CHARS, _CAPTION_CHARS, _TRACE_CHARS = 200, 600, 4000


def cut_text(text: str, most: int) -> str:
    """The first `most` characters, the last one an ellipsis where some are left out."""
    return text if len(text) <= most else text[: most - 1] + "…"


class Group(NamedTuple):
    """Windows that are shown together."""

    title: str
    about: str
    rows: Sequence[int]


class Training(NamedTuple):
    """Rows of one training's windows, and of those that keep their trace; `threshold` is the lowest score kept, None where none decides."""

    rows: np.ndarray
    kept: np.ndarray
    threshold: float | None


def choose_groups(scores: np.ndarray | None, usable: np.ndarray, trainings: Mapping[str, Training]) -> list[Group]:
    """Which windows to show: the best, those on both sides of each threshold, the worst; without scores the first.

    Args:
      scores: s [N], or None.
      usable: bool [N]; only windows with a usable trace are shown.
      trainings: by name.
    """
    rows = np.flatnonzero(usable)
    if scores is None:
        return [Group("First windows", "in the order of the split; there are no scores yet", rows[:PLAIN].tolist())] if len(rows) else []
    ordered = rows[np.argsort(-scores[rows], kind="stable")]
    groups = [Group("Highest scores", "", ordered[:BEST].tolist())]
    for name, training in trainings.items():
        if training.threshold is None:
            continue
        own = ordered[np.isin(ordered, training.rows)]
        chosen = np.isin(own, training.kept)
        about = f"s = {training.threshold:.4f}: the last kept and the first left out"
        beside = np.concatenate([own[chosen][-BESIDE:], own[~chosen][:BESIDE]])
        groups.append(Group(f"At the threshold of {name.upper()}", about, beside.tolist()))
    worst = [row for row in ordered[::-1][:WORST].tolist() if row not in groups[0].rows]
    return [group for group in (*groups, Group("Lowest scores", "", worst)) if group.rows]


class Catalogue(NamedTuple):
    """Where titles, captions and pictures are found."""

    find_title: Callable[[int], str]
    find_caption: Callable[[int], str]
    has_picture: Callable[[int], bool]

    def describe(self, item: int) -> dict[str, Any]:
        """One item as the page shows it."""
        title, caption = self.find_title(item), self.find_caption(item)
        return {
            "id": item,
            "title": cut_text(title, _TITLE_CHARS),
            "caption": cut_text(caption, _CAPTION_CHARS),
            "picture": self.has_picture(item),
        }


def describe_window(
    row: int, window: Window, catalogue: Catalogue, texts: Mapping[str, str], scores: Scores | None, trainings: Mapping[str, Training]
) -> dict[str, Any]:
    """One training window as the page shows it; `texts` are its traces by name."""
    return {
        "user": window.user,
        "history": [catalogue.describe(item) for item in window.history],
        "target": catalogue.describe(window.target),
        "texts": {name: cut_text(text, _TRACE_CHARS) for name, text in texts.items()},
        "scores": None if scores is None else {name: float(values[row]) for name, values in scores._asdict().items()},
        "kept": [name for name, training in trainings.items() if row in training.kept],
    }


def count_scores(scores: Scores) -> dict[str, Any]:
    """Histograms of s', s'' and s over the windows with a trace, and how many windows have none (their s'' is -1)."""
    traced = scores.relevance > -1
    histograms = {}
    for name, values in scores._asdict().items():
        counts, edges = np.histogram(values[traced].astype(np.float64), bins=BINS) if traced.any() else (np.array([]), np.array([0.0]))
        histograms[name] = {"counts": counts.tolist(), "edges": edges.tolist()}
    return {"histograms": histograms, "without_trace": int((~traced).sum())}


def choose_items(item_id: np.ndarray, cosines: np.ndarray, pictured: np.ndarray) -> dict[str, list[tuple[int, float]]]:
    """The items whose title and picture agree least and most: (item, cosine), only of items with a picture."""
    rows = np.flatnonzero(pictured)
    ordered = rows[np.argsort(cosines[rows], kind="stable")]
    most, least = ordered[::-1][:ITEMS], ordered[:ITEMS]
    least = least[~np.isin(least, most)]
    return {name: [(int(item_id[row]), float(cosines[row])) for row in chosen] for name, chosen in (("most", most), ("least", least))}


def spread_items(item_id: Sequence[int]) -> list[int]:
    """Up to `2 * ITEMS` items, evenly over the catalogue."""
    places = np.unique(np.linspace(0, len(item_id) - 1, min(len(item_id), 2 * ITEMS)).round().astype(int)) if len(item_id) else []
    return [item_id[place] for place in places]


def show_masks(text: str, changes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each change of a sanitised text (see `sanitize.Change`) with what stands around its mask."""
    shown, shift = [], 0
    for change in changes:
        mask = ID_MASK if change["kind"] == "id" else TITLE_MASK
        start = change["start"] + shift
        end = start + len(mask)
        shift += len(mask) - (change["end"] - change["start"])
        around = {"before": text[max(0, start - AROUND) : start], "mask": mask, "after": text[end : end + AROUND]}
        shown.append({"rule": change["rule"], "was": cut_text(change["text"], _TITLE_CHARS), **around})
    return shown


def show_place(text: str, found: str) -> dict[str, str]:
    """What stands around `found` in a text; the text's beginning where it does not stand there letter by letter (a fuzzy leak)."""
    place = text.casefold().find(found.casefold())
    if place < 0:
        return {"before": text[: 2 * AROUND], "after": ""}
    return {"before": text[max(0, place - AROUND) : place], "after": text[place + len(found) : place + len(found) + AROUND]}
