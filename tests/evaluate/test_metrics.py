"""Metrics: known answers, ties in expectation, intervals that cover, impossible results that stop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmrec_jax.evaluate.metrics import (
    ImpossibleResultError,
    Ranks,
    check_possible,
    compare_paired,
    compute_metrics,
    expected_random,
    holm,
    rank_targets,
    score_users,
)


def ranks_at(places: list[int]) -> Ranks:
    return Ranks(np.array(places) - 1, np.zeros(len(places), int))


def test_known_ranking():
    scores = np.array([[0.1, 0.9, 0.5], [3.0, -np.inf, 2.0], [1.0, 1.0, 0.0]])
    ranks = rank_targets(scores, np.array([2, 1, 0]))
    np.testing.assert_array_equal(ranks.average, [2, 3, 1.5])


def test_known_metrics():
    metrics = compute_metrics(ranks_at([1, 4, 2, 11]), bootstrap=50)
    assert metrics["HR@1"]["mean"] == 0.25
    assert metrics["HR@5"]["mean"] == 0.75
    assert metrics["NDCG@5"]["mean"] == pytest.approx((1 + 1 / math.log2(5) + 1 / math.log2(3)) / 4)
    assert metrics["NDCG@10"] == metrics["NDCG@5"]
    assert metrics["MRR"]["mean"] == pytest.approx((1 + 1 / 4 + 1 / 2 + 1 / 11) / 4)
    assert metrics["users"] == 4


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=8), st.integers(0, 5))
def test_ties_are_the_mean_over_random_tie_breaks(rows: list[list[int]], column: int):
    """Enumerated: the target takes each of its tied places once."""
    scores, target = np.array(rows, float), np.full(len(rows), column)
    users = score_users(rank_targets(scores, target), cutoffs=(1, 3))
    for row, values in enumerate(rows):
        better, same = sum(v > values[column] for v in values), sum(v == values[column] for v in values)
        places = range(better + 1, better + same + 1)
        assert users["HR@3"][row] == pytest.approx(np.mean([place <= 3 for place in places]))
        assert users["NDCG@3"][row] == pytest.approx(np.mean([(place <= 3) / math.log2(place + 1) for place in places]))
        assert users["MRR"][row] == pytest.approx(np.mean([1 / place for place in places]))


def test_the_order_of_candidates_does_not_matter():
    rng = np.random.default_rng(0)
    scores, target = rng.integers(0, 4, size=(50, 10)).astype(float), rng.integers(0, 10, size=50)
    order = rng.permuted(np.tile(np.arange(10), (50, 1)), axis=1)
    moved = rank_targets(np.take_along_axis(scores, order, axis=1), np.argmax(order == target[:, None], axis=1))
    np.testing.assert_array_equal(rank_targets(scores, target).average, moved.average)


def test_equal_scores_are_the_random_floor_exactly():
    same = compute_metrics(rank_targets(np.zeros((7, 10)), np.arange(7)), bootstrap=20)
    floor = expected_random(10, users=7)
    assert floor["HR@3"]["mean"] == pytest.approx(0.3)
    assert floor["NDCG@3"]["mean"] == pytest.approx(0.213, abs=5e-4)
    assert floor["NDCG@5"]["mean"] == pytest.approx(0.295, abs=5e-4)
    assert set(same) == set(floor)
    for name in set(floor) - {"users"}:
        assert same[name]["mean"] == pytest.approx(floor[name]["mean"])
        assert same[name]["ci95"] == pytest.approx(floor[name]["ci95"])


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), [0, 1], "got NaN at row 1, candidate 0"),
        (np.zeros((2, 3)), [0, 3], "expected columns from 0 to 2, got 0..3"),
        (np.zeros((2, 3)), [0], r"got \(2, 3\) and \(1,\)"),
        (np.zeros(3), [0], "expected shapes"),
    ],
)
def test_broken_scores_are_refused(scores: np.ndarray, target: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        rank_targets(scores, np.array(target))


def test_no_users_is_an_error():
    with pytest.raises(ValueError, match="at least one user"):
        compute_metrics(ranks_at([]))


def test_intervals_have_the_width_of_the_standard_error():
    hits = np.random.default_rng(0).random(2000) < 0.3
    interval = compute_metrics(ranks_at([1 if hit else 2 for hit in hits]), bootstrap=4000)["HR@1"]
    error = math.sqrt(interval["mean"] * (1 - interval["mean"]) / 2000)
    low, high = interval["ci95"]
    assert low < interval["mean"] < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.06)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=30))
def test_every_ranking_is_possible(pairs: list[tuple[int, int]]):
    better, tied = np.array(pairs).T
    compute_metrics(Ranks(better, tied), bootstrap=5)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"HR@3": 0.5, "NDCG@3": 0.6}, "NDCG@3: expected at most HR@3 = 0.5, got 0.6"),
        ({"HR@3": 0.5, "NDCG@3": 0.2}, "NDCG@3: expected a value in .*, got 0.2"),
        ({"HR@3": 0.7, "NDCG@3": 0.6, "HR@5": 0.8, "NDCG@5": 0.65}, r"NDCG@5 - NDCG@3: expected a value in \[0.387, 0.431\] x"),
        ({"HR@3": 0.7, "NDCG@3": 0.6, "HR@5": 0.6, "NDCG@5": 0.6}, "HR@5 - HR@3: expected at least 0"),
        ({"HR@1": 0.4, "NDCG@1": 0.3}, "NDCG@1: expected a value in"),
        ({"MRR": 1.2}, "MRR: expected a value from 0 to 1, got 1.2"),
        ({"HR@1": {"mean": float("nan"), "ci95": [0, 1]}}, "got nan"),
    ],
)
def test_impossible_results_stop(metrics: dict, message: str):
    with pytest.raises(ImpossibleResultError, match=message):
        check_possible(metrics)


def test_rounded_results_pass_with_their_rounding():
    check_possible({"HR@3": 0.89, "NDCG@3": 0.80, "HR@5": 0.95, "NDCG@5": 0.83, "users": 1208}, tolerance=0.005)


def test_paired_comparison_sees_what_unpaired_intervals_cannot():
    rng = np.random.default_rng(0)
    base = rng.random(1000) < 0.5
    better = base | (rng.random(1000) < 0.04)
    a, b = (ranks_at([1 if hit else 2 for hit in hits]) for hits in (base, better))
    result = compare_paired(a, b)
    assert result["difference"] == pytest.approx(better.mean() - base.mean())
    assert result["ci95"][0] > 0
    assert result["p_value"] < 0.01
    assert compute_metrics(b)["HR@1"]["ci95"][0] < compute_metrics(a)["HR@1"]["ci95"][1]
    assert compare_paired(b, a)["difference"] == -result["difference"]


def test_no_difference_has_p_one():
    result = compare_paired(ranks_at([1, 2, 3]), ranks_at([1, 2, 3]), metric="NDCG@3")
    assert (result["difference"], result["p_value"]) == (0.0, 1.0)


def test_the_sign_flip_p_value_is_the_binomial_one():
    """8 users all better: two-sided 2 / 2^8."""
    result = compare_paired(ranks_at([2] * 8 + [1] * 5), ranks_at([1] * 13), permutations=200_000)
    assert result["p_value"] == pytest.approx(2 / 2**8, rel=0.15)


def test_comparisons_need_the_same_users_and_a_known_metric():
    with pytest.raises(ValueError, match="expected the same 2 users"):
        compare_paired(ranks_at([1, 2]), ranks_at([1]))
    with pytest.raises(ValueError, match="expected HR@K, NDCG@K or MRR, got 'F1'"):
        compare_paired(ranks_at([1]), ranks_at([1]), metric="F1")


def test_holm_known_answer():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
