"""Popularity and co-visitation against their definitions written as plain loops."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest

from mllmrec_jax.baselines import covisitation
from mllmrec_jax.baselines.covisitation import score_covisitation
from mllmrec_jax.baselines.popularity import score_popularity
from mllmrec_jax.data.records import History


def random_histories(users: int = 30, items: int = 25, seed: int = 0) -> list[History]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, size=users)
    return [History(user, tuple((7 * rng.permutation(items)[:length] + 5).tolist())) for user, length in enumerate(lengths)]


def count_slowly(histories: list[History], max_distance: int) -> tuple[Counter[int], dict[tuple[int, int], float]]:
    popularity: Counter[int] = Counter(item for history in histories for item in history.items)
    pairs: dict[tuple[int, int], float] = defaultdict(float)
    for history in histories:
        for (place, first), (later, second) in itertools.combinations(enumerate(history.items), 2):
            if later - place <= max_distance:
                pairs[first, second] += 1 / (later - place)
    return popularity, pairs


@pytest.mark.parametrize(("max_distance", "block"), [(8, 1 << 22), (1, 1 << 22), (8, 40)])
def test_covisitation_equals_its_definition(max_distance: int, block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(covisitation, "_BLOCK_PAIRS", block)
    train = random_histories()
    popularity, pairs = count_slowly(train, max_distance)
    rng = np.random.default_rng(1)
    candidates = 7 * rng.integers(0, 28, size=(12, 6)) + 5  # some of them unknown to training
    pasts = [tuple((7 * rng.permutation(28)[: rng.integers(0, 9)] + 5).tolist()) for _ in range(12)]
    expected = np.array(
        [
            [sum(pairs.get((h, c), 0.0) / np.sqrt(popularity[h] + 1) for h in past) for c in row]
            for past, row in zip(pasts, candidates.tolist(), strict=True)
        ]
    )
    tie_break = np.vectorize(lambda item: popularity[item])(candidates) * 1e-9 / max(popularity.values())
    np.testing.assert_allclose(score_covisitation(train, pasts, candidates, max_distance=max_distance), expected + tie_break, rtol=1e-12)


def test_order_counts_and_popularity_breaks_ties():
    train = [History(0, (1, 2)), History(1, (3, 4)), History(2, (4,))]
    scores = score_covisitation(train, [(1,), (2,)], np.array([[2, 3, 4, 99], [1, 3, 4, 99]]))
    assert scores[0].argmax() == 0
    assert scores[1, 2] > scores[1, 0] == scores[1, 1] > scores[1, 3] == 0  # 1 came before 2, not after


def test_popularity_counts_training_interactions():
    train = [History(0, (5, 9)), History(1, (9,))]
    np.testing.assert_array_equal(score_popularity(train, np.array([[9, 5, 7], [10, 9, 5]])), [[2, 1, 0], [0, 2, 1]])


def test_nothing_to_count_scores_nothing():
    candidates = np.array([[1, 2]])
    assert not score_popularity([], candidates).any()
    assert not score_covisitation([], [(1,)], candidates).any()
    assert not score_covisitation([History(0, (1,))], [()], np.array([[2, 3]])).any()


def test_rows_must_match():
    with pytest.raises(ValueError, match=r"expected one row a history \(2\), got 1 rows"):
        score_covisitation([History(0, (1, 2))], [(1,), (2,)], np.array([[1]]))
