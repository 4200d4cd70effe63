"""The `rank` protocol: every model scores the same frozen candidate lists, and every score becomes ranks and metrics the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mllmrec_jax.config import EvaluateConfig, RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.data.loader import iterate_all
from mllmrec_jax.data.shards import Shards
from mllmrec_jax.distributed import is_main_process
from mllmrec_jax.evaluate.metrics import Ranks, check_possible, compare_paired, compute_metrics, expected_random, holm, rank_targets
from mllmrec_jax.generate.rank import score_candidates
from mllmrec_jax.progress import track
from mllmrec_jax.sharding import constrain, find_own_rows, place_batch, round_batch
from mllmrec_jax.train.state import Policy, merge_policy


@dataclasses.dataclass(frozen=True)
class RankedModel:
    """One row of the results table."""

    scores: np.ndarray
    """[N, K] float64, higher is better, candidates in their shown order."""
    ranks: Ranks


def make_scorer(policy: Policy, config: RunConfig) -> Callable[[Any, Any, GroupBatch], jax.Array]:
    """The compiled `(trained, frozen, batch) -> scores [B, K]`."""

    @jax.jit
    def score(trained: Any, frozen: Any, batch: GroupBatch) -> jax.Array:
        scores = score_candidates(merge_policy(policy._replace(frozen=frozen), trained), batch, config.logprob)
        return constrain(scores, None, None)  # every process has them all

    return score


def score_shards(policy: Policy, trained: Any, shards: Shards, config: RunConfig, *, description: str = "rank") -> np.ndarray:
    """Log-likelihood of every candidate's answer, float64 [N, K], for the first `evaluate.max_users` rows (all where 0).

    Batches lie over the mesh in context, rounded up to what divides over it.
    """
    score = make_scorer(policy, config)
    count = min(shards.rows, config.evaluate.max_users or shards.rows)
    size = round_batch(config.evaluate.batch_size)
    own = find_own_rows(size)
    batches = iterate_all(shards, batch_size=size, rows=np.arange(count), buckets=config.loader.buckets)
    scores = []
    for batch in track(batches, description=description, total=-(-count // size), unit="batch") if is_main_process() else batches:
        answers, lengths = shards.item_answer[batch.candidates], shards.item_answer_length[batch.candidates]
        group = GroupBatch(*place_batch([x[own] for x in (batch.prompt, batch.prompt_length, answers, lengths)]))
        scores.append(np.asarray(score(trained, policy.frozen, group), np.float64)[batch.valid])
    return np.concatenate(scores)


def rank_models(scores: Mapping[str, np.ndarray], target_position: np.ndarray) -> dict[str, RankedModel]:
    """Ranks of each model's target among its candidates; NaN scores raise with the model's name."""
    ranked = {}
    for name, values in scores.items():
        try:
            ranked[name] = RankedModel(values, rank_targets(values, target_position))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return ranked


def tabulate_metrics(models: Mapping[str, RankedModel], config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Metrics of every model and of random ranking (exact); raises `ImpossibleResultError` on numbers no ranking can give."""
    first = next(iter(models.values()))
    table = {"random": expected_random(first.scores.shape[1], users=len(first.ranks))}
    table |= {name: compute_metrics(model.ranks, bootstrap=config.bootstrap, seed=config.seed) for name, model in models.items()}
    for metrics in table.values():
        check_possible(metrics)
    return table


def compare_models(
    models: Mapping[str, RankedModel],
    pairs: Sequence[tuple[str, str]],
    config: EvaluateConfig,
    *,
    metrics: Sequence[str] = ("HR@1", "NDCG@3"),
) -> list[dict[str, Any]]:
    """Paired differences a - b on the same users for each pair (a, b) whose models are there, p-values Holm-corrected over all of them."""
    rows = []
    for a, b in pairs:
        if a in models and b in models:
            for metric in metrics:
                found = compare_paired(models[b].ranks, models[a].ranks, metric=metric, bootstrap=config.bootstrap, seed=config.seed)
                rows.append(
                    {"a": a, "b": b, "metric": metric, **{"difference": found["difference"], "ci95": found["ci95"], "p": found["p_value"]}}
                )
    adjusted = holm([row["p"] for row in rows])
    return [{**row, "p_holm": p} for row, p in zip(rows, adjusted, strict=True)]
