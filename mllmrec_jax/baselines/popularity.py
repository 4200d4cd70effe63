"""Popularity: how many training users chose an item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllmrec_jax.data.records import History, find_rows


def count_items(histories: Sequence[History]) -> tuple[np.ndarray, np.ndarray]:
    """Ascending item ids [I] int64 that occur in `histories`, and how often each does [I] int64."""
    total = sum(len(history.items) for history in histories)
    flat = np.fromiter((item for history in histories for item in history.items), np.int64, total)
    return np.unique(flat, return_counts=True)


def look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """`values` at `queries` (any shape) of the ascending `keys`; 0 where a query is not a key. float64."""
    if not len(keys):
        return np.zeros(queries.shape)
    rows = find_rows(keys, queries)
    return np.where(rows >= 0, values[rows], 0).astype(np.float64)


def score_popularity(train_histories: Sequence[History], candidates: np.ndarray) -> np.ndarray:
    """Scores every candidate with its number of interactions in training.

    Args:
      train_histories: interactions that belong to training, and no others.
      candidates: item ids [N, K].

    Returns:
      float64 [N, K]; 0 for items that training never saw.
    """
    return look_up(*count_items(train_histories), candidates)
