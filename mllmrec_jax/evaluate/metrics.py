"""Ranks, HR, NDCG and MRR with one relevant item, their intervals, paired tests, and the check that they are possible at all.

Ties never depend on the order of candidates: a target that ties with t others takes each of its t + 1 places with equal probability,
and every metric is the mean over these places. A model that scores all candidates alike therefore gets exactly the random floor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CUTOFFS = (1, 3, 5, 10)


class ImpossibleResultError(ValueError):
    """Metrics that no ranking can produce: there is a bug in what made them."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Of each of N targets: how many candidates score higher, and how many others tie with it; both int64 [N]."""

    better: np.ndarray
    tied: np.ndarray

    @property
    def average(self) -> np.ndarray:
        """Mean of the places a target may take, float64 [N]; 1 is best."""
        return 1 + self.better + self.tied / 2

    def __len__(self) -> int:
        return len(self.better)


def rank_targets(scores: np.ndarray, target_position: np.ndarray) -> Ranks:
    """Ranks each row's target among its candidates, higher scores first.

    Args:
      scores: [N, K] floats; -inf is a legal score, NaN is not.
      target_position: column of the target in each row, integers [N].

    Raises:
      ValueError: shapes disagree, a position is outside the row, or a score is NaN (the message names the first).
    """
    scores, target_position = np.asarray(scores), np.asarray(target_position)
    if scores.ndim != 2 or target_position.shape != scores.shape[:1]:
        raise ValueError(f"scores, target_position: expected shapes [N, K] and [N], got {scores.shape} and {target_position.shape}")
    if target_position.size and not (target_position.min() >= 0 and target_position.max() < scores.shape[1]):
        raise ValueError(
            f"target_position: expected columns from 0 to {scores.shape[1] - 1}, got {target_position.min()}..{target_position.max()}"
        )
    broken = np.argwhere(np.isnan(scores))
    if len(broken):
        row, column = broken[0]
        raise ValueError(f"scores: expected numbers, got NaN at row {row}, candidate {column} ({len(broken)} NaN in all)")
    own = np.take_along_axis(scores, target_position[:, None], axis=1)
    return Ranks((scores > own).sum(axis=1), (scores == own).sum(axis=1) - 1)


def _gains(places: int, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """Each metric of a single target at place 1..places, float64 [places]; NDCG's ideal DCG is 1."""
    place = np.arange(1, places + 1)
    discounted = 1 / np.log2(place + 1)
    gains = {f"HR@{cutoff}": (place <= cutoff).astype(np.float64) for cutoff in cutoffs}
    gains |= {f"NDCG@{cutoff}": np.where(place <= cutoff, discounted, 0.0) for cutoff in cutoffs}
    return gains | {"MRR": 1 / place}


def score_users(ranks: Ranks, *, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, np.ndarray]:
    """Every metric of every user, float64 [N], averaged over the places a tied target may take."""
    if not len(ranks):
        raise ValueError("ranks: expected at least one user, got none")
    first, last = ranks.better, ranks.better + ranks.tied + 1
    values = {}
    for name, gain in _gains(int(last.max()), cutoffs).items():
        total = np.concatenate([[0.0], np.cumsum(gain)])
        values[name] = np.where(ranks.tied == 0, gain[first], (total[last] - total[first]) / (last - first))
    return values


def _resample_means(values: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """[resamples, M] means of `values` [N, M] over users drawn with replacement.

    Users with equal values are interchangeable, so how often each distinct row is drawn is multinomial: same law, far fewer draws.
    """
    distinct, counts = np.unique(values, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    return drawn @ distinct / len(values)


def compute_metrics(ranks: Ranks, *, cutoffs: Sequence[int] = CUTOFFS, bootstrap: int = 2000, seed: int = 0) -> dict[str, Any]:
    """HR@K, NDCG@K and MRR over users, with percentile bootstrap intervals.

    Args:
      ranks: of N users' targets.
      cutoffs: the K's.
      bootstrap: resamples of users.
      seed: seed of the bootstrap.

    Returns:
      `{"HR@1": {"mean": float, "ci95": [low, high]}, ..., "NDCG@10": ..., "MRR": ..., "users": N}`.

    Raises:
      ValueError: there are no users.
      ImpossibleResultError: the metrics contradict each other (see `check_possible`).
    """
    users = score_users(ranks, cutoffs=cutoffs)
    values = np.stack(list(users.values()), axis=1)
    low, high = np.percentile(_resample_means(values, resamples=bootstrap, seed=seed), [2.5, 97.5], axis=0)
    metrics: dict[str, Any] = {
        name: {"mean": float(mean), "ci95": [float(low[column]), float(high[column])]}
        for column, (name, mean) in enumerate(zip(users, values.mean(axis=0), strict=True))
    }
    check_possible(metrics)
    return metrics | {"users": len(ranks)}


def expected_random(candidates: int, *, users: int, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, Any]:
    """What random ranking of `candidates` items scores, exactly; same shape as `compute_metrics`, intervals of width 0."""
    means = {name: float(gain.mean()) for name, gain in _gains(candidates, cutoffs).items()}
    return {name: {"mean": mean, "ci95": [mean, mean]} for name, mean in means.items()} | {"users": users}


def check_possible(metrics: Mapping[str, Any], *, tolerance: float = 1e-9) -> None:
    """Checks the relations that hold for every ranking with one relevant item.

    A target at a place in (a, b] adds 1 to HR@b - HR@a and between 1 / log2(b + 1) and 1 / log2(a + 2) to NDCG@b - NDCG@a. Hence NDCG@b -
    NDCG@a lies between these times HR@b - HR@a (for 3 and 5: 0.387 and 0.431), and NDCG@K never exceeds HR@K.

    Args:
      metrics: `compute_metrics`' result or plain numbers by name; cutoffs are read off the names, missing ones are not checked.
      tolerance: half of the last printed digit, for numbers that were rounded.

    Raises:
      ImpossibleResultError: naming the relation, what it allows, and the values.
    """
    means = {name: float(value["mean"] if isinstance(value, Mapping) else value) for name, value in metrics.items() if name != "users"}
    for name, value in means.items():
        if not -tolerance <= value <= 1 + tolerance:
            raise ImpossibleResultError(f"{name}: expected a value from 0 to 1, got {value}")
    cutoffs = sorted(int(name[3:]) for name in means if name.startswith("HR@") and f"NDCG@{name[3:]}" in means)
    for cutoff in cutoffs:
        hr, ndcg = means[f"HR@{cutoff}"], means[f"NDCG@{cutoff}"]
        if ndcg > hr + 2 * tolerance:
            raise ImpossibleResultError(f"NDCG@{cutoff}: expected at most HR@{cutoff} = {hr}, got {ndcg}")
    for low, high in itertools.pairwise([0, *cutoffs]):
        hits = means[f"HR@{high}"] - (means[f"HR@{low}"] if low else 0.0)
        gain = means[f"NDCG@{high}"] - (means[f"NDCG@{low}"] if low else 0.0)
        least, most = 1 / math.log2(high + 1), 1 / math.log2(low + 2)
        name = f"NDCG@{high} - NDCG@{low}" if low else f"NDCG@{high}"
        over = f"HR@{high} - HR@{low}" if low else f"HR@{high}"
        if hits < -2 * tolerance:
            raise ImpossibleResultError(f"{over}: expected at least 0, got {hits:.6g}")
        if not least * hits - 4 * tolerance <= gain <= most * hits + 4 * tolerance:
            allowed = f"[{least:.3f}, {most:.3f}] x ({over} = {hits:.6g})"
            raise ImpossibleResultError(f"{name}: expected a value in {allowed} for one relevant item, got {gain:.6g}")


def compare_paired(
    ranks_a: Ranks, ranks_b: Ranks, *, metric: str = "HR@1", bootstrap: int = 2000, permutations: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """How much better `b` is than `a` on the same users.

    The interval is a paired percentile bootstrap over users. The p-value is two-sided, of the sign-flip test: were the models
    exchangeable, each user's difference would be as likely with the other sign. It counts the observed one, so it is never 0.

    Args:
      ranks_a: of N users.
      ranks_b: of the same N users in the same order.
      metric: `HR@K`, `NDCG@K` or `MRR`.
      bootstrap: resamples behind the interval.
      permutations: sign flips behind the p-value.
      seed: seed of both.

    Returns:
      `{"metric", "difference": mean of b - a, "ci95": [low, high], "p_value", "users"}`.

    Raises:
      ValueError: the numbers of users differ, or the metric is unknown.
    """
    if len(ranks_a) != len(ranks_b):
        raise ValueError(f"ranks_b: expected the same {len(ranks_a)} users as ranks_a, got {len(ranks_b)}")
    kind, _, cutoff = metric.partition("@")
    if metric != "MRR" and not (kind in ("HR", "NDCG") and cutoff.isdigit() and int(cutoff) > 0):
        raise ValueError(f"metric: expected HR@K, NDCG@K or MRR, got {metric!r}")
    cutoffs = (int(cutoff),) if cutoff else ()
    difference = score_users(ranks_b, cutoffs=cutoffs)[metric] - score_users(ranks_a, cutoffs=cutoffs)[metric]
    means = _resample_means(difference[:, None], resamples=bootstrap, seed=seed)[:, 0]
    low, high = np.percentile(means, [2.5, 97.5])
    # Users with the same size of difference are interchangeable: the sum of c random signs is 2 Binomial(c, 1/2) - c.
    sizes, counts = np.unique(np.abs(difference), return_counts=True)
    signs = 2 * np.random.default_rng([seed, 1]).binomial(counts, 0.5, size=(permutations, len(counts))) - counts
    extreme = int((np.abs(signs @ sizes) >= abs(difference.sum()) - 1e-9).sum())
    return {
        "metric": metric,
        "difference": float(difference.mean()),
        "ci95": [float(low), float(high)],
        "p_value": (extreme + 1) / (permutations + 1),
        "users": len(ranks_a),
    }


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for several tests (Scandinavian Journal of Statistics 6, 1979), in the order given."""
    order = sorted(range(len(pvalues)), key=lambda index: pvalues[index])
    adjusted = [0.0] * len(pvalues)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(pvalues) - place) * pvalues[index]))
        adjusted[index] = largest
    return adjusted
