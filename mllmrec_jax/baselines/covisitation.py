"""Co-visitation: which items follow which, counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllmrec_jax.baselines.popularity import count_items, look_up
from mllmrec_jax.data.records import History, find_rows

_BLOCK_PAIRS = 1 << 22  # (history item, candidate) pairs looked up at a time: bounds the scratch memory
_TIE_BREAK = 1e-9


def count_pairs(histories: Sequence[History], items: np.ndarray, *, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of 1 / distance over every place where one item precedes another by at most `max_distance` places in a history.

    Args:
      histories: sequences to count in.
      items: ascending ids [I] of every item in `histories`.
      max_distance: farthest apart that still counts (places).

    Returns:
      Ascending keys [P] int64, `row(earlier) * I + row(later)`, and their sums [P] float64.
    """
    lengths = np.fromiter((len(history.items) for history in histories), np.int64, len(histories))
    flat = np.fromiter((item for history in histories for item in history.items), np.int64, int(lengths.sum()))
    rows = np.searchsorted(items, flat)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    keys, weights = [], []
    for distance in range(1, max_distance + 1):
        same_user = owner[distance:] == owner[:-distance]
        key = rows[:-distance][same_user] * len(items) + rows[distance:][same_user]
        keys.append(key)
        weights.append(np.full(len(key), 1 / distance))
    unique, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    return unique, np.bincount(inverse, weights=np.concatenate(weights), minlength=len(unique))


def score_covisitation(
    train_histories: Sequence[History], histories: Sequence[tuple[int, ...]], candidates: np.ndarray, *, max_distance: int = 8
) -> np.ndarray:
    """Scores candidates by how often they follow the items of a history in training.

    With count(i, j) = sum of 1 / distance over places in training where i precedes j by at most `max_distance`, candidate c scores
    sum over history items h of count(h, c) / sqrt(popularity(h) + 1). Popularity breaks ties: it is added times 1e-9 / the largest.

    Args:
      train_histories: interactions that belong to training, and no others.
      histories: item ids of each of the N users, any order within a user, may be empty.
      candidates: item ids [N, K].
      max_distance: farthest apart that still counts (places).

    Returns:
      float64 [N, K].

    Raises:
      ValueError: `histories` and `candidates` differ in length.
    """
    if len(histories) != len(candidates):
        raise ValueError(f"candidates: expected one row a history ({len(histories)}), got {len(candidates)} rows")
    items, counts = count_items(train_histories)
    if not len(items):
        return np.zeros(candidates.shape)
    keys, sums = count_pairs(train_histories, items, max_distance=max_distance)
    width = max((len(history) for history in histories), default=0)
    padded = np.full((len(histories), max(width, 1)), -1, np.int64)  # -1 is no item: its look-ups give 0
    for row, history in enumerate(histories):
        padded[row, : len(history)] = history
    popularity = look_up(items, counts, candidates)
    scores = popularity * (_TIE_BREAK / counts.max())
    weights = 1 / np.sqrt(look_up(items, counts, padded) + 1)
    step = max(1, _BLOCK_PAIRS // (padded.shape[1] * max(1, candidates.shape[1])))
    for start in range(0, len(candidates), step):
        block = slice(start, start + step)
        earlier, later = find_rows(items, padded[block]), find_rows(items, candidates[block])
        pairs = np.where((earlier[:, :, None] >= 0) & (later[:, None, :] >= 0), earlier[:, :, None] * len(items) + later[:, None, :], -1)
        scores[block] += np.einsum("nhk,nh->nk", look_up(keys, sums, pairs), weights[block])
    return scores
