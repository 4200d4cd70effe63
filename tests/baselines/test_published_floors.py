"""The floors measured on MovieLens-1M, reproduced: 1,208 test users, last item as target, the 8 before it as history, 9 negatives.

The published figures have a standard error of about 0.012 (1,208 users, one draw of negatives, two decimals). Averaging several draws
takes our own share of that noise out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mllmrec_jax.baselines.covisitation import score_covisitation
from mllmrec_jax.baselines.popularity import score_popularity
from mllmrec_jax.config import DataConfig
from mllmrec_jax.data.candidates import draw_candidates, locate_targets
from mllmrec_jax.data.movielens import read_movielens
from mllmrec_jax.data.records import Dataset
from mllmrec_jax.data.splits import Splits, split_windows
from mllmrec_jax.evaluate.metrics import rank_targets, score_users

STANDARD_ERROR = 0.012
METRICS = ("HR@1", "HR@3", "HR@5", "NDCG@3", "NDCG@5")
DRAWS = 4


@pytest.fixture(scope="module")
def ml1m(shared_data: Path) -> tuple[Dataset, Splits]:
    config = DataConfig(source="movielens", path=shared_data / "ml-1m", sequences="sequences_5core.txt", split_seed=0, history_len=8)
    dataset = read_movielens(config)
    splits = split_windows(dataset, config)
    assert (len(splits.train_histories), len(splits.valid), len(splits.test)) == (4228, 604, 1208)
    return dataset, splits


@pytest.mark.parametrize(
    ("floor", "sampling", "published"),
    [
        ("popularity", "uniform", (0.40, 0.71, 0.87, 0.58, 0.64)),
        ("covisitation", "uniform", (0.68, 0.89, 0.95, 0.80, 0.83)),
        ("covisitation", "popularity", (0.47, 0.74, 0.85, 0.63, 0.67)),
    ],
)
def test_floors_on_ml1m(ml1m: tuple[Dataset, Splits], floor: str, sampling, published: tuple[float, ...]):
    dataset, splits = ml1m
    train = splits.train_histories
    draws = [draw_candidates(splits.test, dataset, negatives=9, sampling=sampling, seed=seed).candidates for seed in range(DRAWS)]
    candidates = np.concatenate(draws)
    pasts = [window.history for window in splits.test] * DRAWS
    scores = score_popularity(train, candidates) if floor == "popularity" else score_covisitation(train, pasts, candidates)
    users = score_users(rank_targets(scores, locate_targets(splits.test * DRAWS, candidates)))
    measured = [users[metric].mean() for metric in METRICS]
    np.testing.assert_allclose(measured, published, atol=STANDARD_ERROR)
