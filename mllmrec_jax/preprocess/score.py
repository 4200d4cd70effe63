"""Stage 6: multimodal consistency of each training window, and how well pictures and titles of the catalogue agree at all.

s'   mean over the history of cos(title, picture); items without a picture do not count; 0 where none has one
s''  cos(the target, the profile of step 4), where the target is its title and picture, added and brought to length 1; with
     `embed.text_model`, both are texts in that model's own space, and the target is its title and caption
s    sigmoid(s' + s'')
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from mllmrec_jax.data.records import find_rows
from mllmrec_jax.data.splits import Window
from mllmrec_jax.preprocess.arrays import StoredArray, read_array, write_array
from mllmrec_jax.preprocess.embed import Vectors, split_rows

COMPARED = 1000
"""Most pairs whose agreement is compared with every other."""


class ItemVectors(NamedTuple):
    """`item_id` [I] int64 ascending; `picture`, `title` [I, D], a picture's row zeros where there is none: in memory, or read by row.

    `text` [I, T] where a text encoder measures s''. `agreement` [I] float64 is cos(title, picture), `pictured` [I] bool.
    """

    item_id: np.ndarray
    picture: np.ndarray | StoredArray
    title: np.ndarray | StoredArray
    text: np.ndarray | StoredArray | None
    agreement: np.ndarray
    pictured: np.ndarray


class Scores(NamedTuple):
    """float32 [N] each, in the order of the windows; `score` is s."""

    consistency: np.ndarray
    relevance: np.ndarray
    score: np.ndarray


def load_vectors(folder: Path) -> ItemVectors:
    """What `embed.embed_items` wrote; its rows stay on disk."""
    picture, title = StoredArray(folder / "picture"), StoredArray(folder / "title")
    text = StoredArray(folder / "text") if (folder / "text").is_dir() else None
    return measure_items(read_array(folder / "item_id"), picture, title, text)


def measure_items(
    item_id: np.ndarray, picture: np.ndarray | StoredArray, title: np.ndarray | StoredArray, text: np.ndarray | StoredArray | None = None
) -> ItemVectors:
    """Adds how well each item's title and picture agree, read block by block."""
    agreement, pictured = np.zeros(len(item_id)), np.zeros(len(item_id), bool)
    for block in split_rows(len(item_id)):
        rows = np.arange(block.start, block.stop)
        pictures = picture[rows]
        agreement[rows], pictured[rows] = _dot(title[rows], pictures), (pictures != 0).any(axis=1)
    return ItemVectors(item_id, picture, title, text, agreement, pictured)


def _normalise(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Row by row, in float64."""
    return (left.astype(np.float64) * right.astype(np.float64)).sum(axis=-1)


def score_histories(histories: Sequence[Sequence[int]], items: ItemVectors) -> np.ndarray:
    """s' float64 [N] of histories of item ids."""
    scores = np.zeros(len(histories))
    for row, history in enumerate(histories):
        found = find_rows(items.item_id, np.asarray(history, np.int64))
        found = found[items.pictured[found]]
        if len(found):
            scores[row] = items.agreement[found].mean()
    return scores


def score_profiles(targets: Sequence[int], profiles: np.ndarray, items: ItemVectors) -> np.ndarray:
    """s'' float64 [N] of targets (item ids) and the vectors [N, D], or [N, T], of the profiles of step 4."""
    rows = find_rows(items.item_id, np.asarray(targets, np.int64))
    stand = items.title[rows].astype(np.float64) + items.picture[rows] if items.text is None else items.text[rows].astype(np.float64)
    return _dot(_normalise(stand), profiles)


def score_windows(windows: Sequence[Window], read_profile: Callable[[int], str], items: ItemVectors, vectors: Vectors) -> Scores:
    """Scores of windows and the profiles predicted for them, by row; where a profile is empty, s'' is -1."""
    vectors.fill((profile for row in range(len(windows)) if (profile := read_profile(row))), description="embed profiles")
    consistency, relevance = np.zeros(len(windows), np.float32), np.zeros(len(windows), np.float32)
    for rows in split_rows(len(windows)):
        part, profiles = [windows[row] for row in rows], [read_profile(row) for row in rows]
        consistency[rows.start : rows.stop] = score_histories([window.history for window in part], items)
        embedded = np.stack([vectors.find(profile or None) for profile in profiles])
        found = score_profiles([window.target for window in part], embedded, items)
        relevance[rows.start : rows.stop] = np.where([bool(profile) for profile in profiles], found, -1.0)
    return Scores(consistency, relevance, expit(consistency.astype(np.float64) + relevance).astype(np.float32))


def write_scores(folder: Path, windows: Sequence[Window], scores: Scores) -> None:
    """Writes `user`, `position` [N] int64 and the three scores [N] float32."""
    keys = {"user": [window.user for window in windows], "position": [window.position for window in windows]}
    for name, values in keys.items():
        write_array(folder / name, (len(windows),), "int64", (np.array(values[rows.start : rows.stop]) for rows in split_rows(len(values))))
    for name, scored in scores._asdict().items():
        write_array(folder / name, scored.shape, "float32", (scored[rows.start : rows.stop] for rows in split_rows(len(scored))))


class Agreement(NamedTuple):
    """How well cos(title, picture) tells an item's own picture from another's: AUC over `pairs` items, with a 95% interval."""

    pairs: int
    auc: float
    low: float
    high: float


def measure_agreement(titles: np.ndarray, pictures: np.ndarray, *, seed: int = 0, resamples: int = 400) -> Agreement | None:
    """AUC of cos(title, picture) between own pairs and all mismatched ones, rows [M, D]; None for fewer than two rows.

    A mismatched pair is the title of one item with the picture of another. The interval is a bootstrap over items. At most `COMPARED`
    items are compared.
    """
    titles, pictures = titles[:COMPARED].astype(np.float64), pictures[:COMPARED].astype(np.float64)
    count = len(titles)
    if count < 2:
        return None
    cosines = titles @ pictures.T
    own = np.diagonal(cosines)
    # wins[i, j]: how often item i's own pair beats the mismatched pairs of title j, as a share
    others = [np.sort(np.delete(row, place)) for place, row in enumerate(cosines)]
    wins = np.stack([(np.searchsorted(row, own, "left") + np.searchsorted(row, own, "right")) / (2 * len(row)) for row in others], axis=1)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        weight = np.bincount(rng.integers(count, size=count), minlength=count) / count
        drawn.append(weight @ wins @ weight)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Agreement(count, float(wins.mean()), float(low), float(high))
