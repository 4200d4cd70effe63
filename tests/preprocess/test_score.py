from __future__ import annotations

import numpy as np
import pytest

from mllmrec_jax.preprocess.mix import choose_rows
from mllmrec_jax.preprocess.score import ItemVectors, measure_agreement, measure_items, score_histories, score_profiles


def make_items() -> ItemVectors:
    """Items 10, 20, 30, 40 in the plane; 40 has no picture."""
    title = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    picture = np.array([[1, 0], [1, 0], [0.6, 0.8], [0, 0]], np.float32)
    return measure_items(np.array([10, 20, 30, 40]), picture, title)


def test_history_score_is_the_mean_agreement_of_its_pictured_items() -> None:
    histories = [(10,), (10, 20), (10, 20, 30), (40,), (40, 30)]
    np.testing.assert_allclose(score_histories(histories, make_items()), [1, 0.5, 1.6 / 3, 0, 0.6], atol=1e-7)


def test_profile_score_is_the_cosine_with_title_and_picture_of_the_target() -> None:
    profiles = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    np.testing.assert_allclose(score_profiles([10, 20, 40], profiles, make_items()), [1, np.sqrt(0.5), 1], atol=1e-7)


def test_agreement_is_the_area_under_the_curve() -> None:
    rng = np.random.default_rng(0)
    titles, pictures = rng.standard_normal((2, 30, 8))
    titles /= np.linalg.norm(titles, axis=1, keepdims=True)
    pictures = 0.5 * titles + 0.5 * pictures / np.linalg.norm(pictures, axis=1, keepdims=True)
    cosines = titles @ pictures.T
    own, other = np.diagonal(cosines), cosines
    wins = [own[i] > other[j, k] for i in range(30) for j in range(30) for k in range(30) if j != k]
    agreement = measure_agreement(titles, pictures)
    assert agreement is not None and agreement.pairs == 30
    assert agreement.auc == pytest.approx(np.mean(wins), abs=1e-12) and agreement.low < agreement.auc < agreement.high


def test_agreement_of_unrelated_vectors_is_a_coin_and_of_one_pair_nothing() -> None:
    titles, pictures = np.random.default_rng(1).standard_normal((2, 400, 16))
    agreement = measure_agreement(titles, pictures)
    assert agreement is not None and agreement.low < 0.5 < agreement.high
    assert measure_agreement(titles[:1], pictures[:1]) is None


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.5, 1.0])
def test_top_fraction_keeps_its_share_and_the_threshold_parts_it(fraction: float) -> None:
    scores = np.random.default_rng(2).random(200)
    kept, threshold = choose_rows(scores, np.ones(200, bool), fraction)
    assert len(kept) == round(200 * fraction)
    if threshold is None:
        assert fraction == 0
    else:
        assert (scores[kept] >= threshold).all() and (np.delete(scores, kept) < threshold).all()


def test_unusable_windows_are_never_kept_but_count_in_the_share() -> None:
    scores, usable = np.arange(10.0), np.arange(10) < 4
    assert choose_rows(scores, usable, 0.3).kept.tolist() == [1, 2, 3]
    assert choose_rows(scores, usable, 0.9).kept.tolist() == [0, 1, 2, 3]
    assert choose_rows(scores, usable, 0.3, selection="random", seed=1).kept.max() < 4


def test_equal_scores_keep_the_earlier_row() -> None:
    assert choose_rows(np.zeros(10), np.ones(10, bool), 0.3).kept.tolist() == [0, 1, 2]
