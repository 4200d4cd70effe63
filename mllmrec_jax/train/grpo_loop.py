"""The GRPO loop: rollout, reward, update."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllmrec_jax.checkpoint import Checkpoints
from mllmrec_jax.config import GrpoConfig, RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.data.loader import ExampleBatch, make_loader
from mllmrec_jax.data.shards import Shards
from mllmrec_jax.data.tokenizer import Tokenizer
from mllmrec_jax.generate.rollout import Rollout, check_positions, make_keys, rollout_group
from mllmrec_jax.objectives.advantages import compute_advantages, find_no_signal
from mllmrec_jax.objectives.kl import warn_about_k1
from mllmrec_jax.progress import Progress
from mllmrec_jax.rewards import Rewards, RewardTask, score_completions
from mllmrec_jax.train.grpo_step import GrpoBatch, make_grpo_step
from mllmrec_jax.train.metrics_log import MetricsLog
from mllmrec_jax.train.sft_loop import check_finite
from mllmrec_jax.train.state import Policy, TrainState, init_state, make_optimizer, make_schedule, merge_policy

# Mean absolute difference of rollout and training log-probs above which the two are not the same policy (rounding gives far less).
MISMATCH_LIMIT = {"float32": 1e-3, "bfloat16": 5e-2}
# Completions are cut to the shortest of these widths (tokens) that holds them: padding costs as much as tokens do.
COMPLETION_WIDTHS = tuple(8 * 2**i for i in range(12))


class ReadyClock:
    """Notes when device values become ready, from a thread of its own, so that timing never blocks the loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ready-clock")

    def note(self, values: Any) -> Future[float]:
        """A future of the `time.perf_counter()` at which `values` are ready."""

        def wait() -> float:
            jax.block_until_ready(values)
            return time.perf_counter()

        return self._thread.submit(wait)


class Sampled(NamedTuple):
    """One rollout on the host, its rewards, and how long both took."""

    batch: ExampleBatch
    rollout: Rollout
    rewards: Rewards
    reward_s: float


def make_rollout(policy: Policy, grpo: GrpoConfig, *, stop_ids: tuple[int, ...], pad_id: int) -> Any:
    """The compiled `(trained, frozen, prompt, prompt_length, keys) -> Rollout`."""

    @jax.jit
    def rollout(trained: Any, frozen: Any, prompt: jax.Array, prompt_length: jax.Array, keys: jax.Array) -> Rollout:
        return rollout_group(
            merge_policy(policy._replace(frozen=frozen), trained),
            prompt,
            prompt_length,
            keys,
            max_new_tokens=grpo.max_new_tokens,
            temperature=grpo.temperature,
            top_p=grpo.top_p,
            top_k=grpo.top_k,
            stop_ids=stop_ids,
            pad_id=pad_id,
        )

    return rollout


def judge_rollout(
    batch: ExampleBatch, rollout: Rollout, item_id: np.ndarray, tokenizer: Tokenizer, grpo: GrpoConfig, titles: Mapping[int, str]
) -> Sampled:
    """Copies a rollout to the host, decodes and scores it."""
    host: Rollout = jax.tree.map(np.asarray, rollout)
    started = time.perf_counter()
    texts = [
        [tokenizer.decode(row[:length]) for row, length in zip(group, lengths, strict=True)]
        for group, lengths in zip(host.completion, host.completion_length, strict=True)
    ]
    tasks = [
        RewardTask(int(item_id[target]), [int(item_id[c]) for c in candidates])
        for target, candidates in zip(batch.target, batch.candidates, strict=True)
    ]
    return Sampled(batch, host, score_completions(texts, tasks, grpo.reward, titles), time.perf_counter() - started)


def to_grpo_batch(sampled: Sampled, grpo: GrpoConfig) -> GrpoBatch:
    """A scored rollout as micro-batches, completions cut to the next standard width."""
    rollout = sampled.rollout
    longest = int(rollout.completion_length.max())
    width = min(grpo.max_new_tokens, next((w for w in COMPLETION_WIDTHS if w >= longest), grpo.max_new_tokens))
    advantage = compute_advantages(jnp.asarray(sampled.rewards.reward), scale=grpo.scale_rewards)
    prompt, prompt_length = jnp.asarray(sampled.batch.prompt), jnp.asarray(sampled.batch.prompt_length)
    group = GroupBatch(prompt, prompt_length, rollout.completion[..., :width], rollout.completion_length)
    batch = GrpoBatch(group, advantage, rollout.logp_raw[..., :width], None)
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(grpo.accumulation, -1, *x.shape[1:]), batch)


def summarise_rollout(sampled: Sampled) -> dict[str, float]:
    """What the rewards and completions alone say about a step."""
    reward, rollout = sampled.rewards, sampled.rollout
    return {
        "reward_mean": float(reward.reward.mean()),
        "reward_std": float(reward.reward.std()),
        "format_rate": float(reward.well_formed.mean()),
        "hit_rate": float(reward.hit.mean()),
        "no_signal_share": float(np.asarray(find_no_signal(jnp.asarray(reward.reward))).mean()),
        "completion_length": float(rollout.completion_length.mean()),
        "truncated_share": float(1 - rollout.stopped.mean()),
    }


def run_grpo(
    config: RunConfig,
    policy: Policy,
    shards: Shards,
    tokenizer: Tokenizer,
    titles: Mapping[int, str],
    *,
    folder: Path,
    identity: dict[str, Any],
    resume: bool,
) -> tuple[Any, int]:
    """Trains for the configured epochs or rollouts; returns (trained weights, rollouts done).

    `titles` (item id -> title as prompts show it) serves `reward.require_title`. Resumes like `run_sft`.

    Raises:
      TrainingError: a loss or gradient is not finite.
      LoaderError: the data do not fill one batch.
      CheckpointError: a checkpoint cannot be written or belongs to another run.
      ConfigError: prompt and completion do not fit the model.
    """
    grpo = config.grpo
    check_positions(int(shards.prompt_length.max()), grpo.max_new_tokens, merge_policy(policy).config.max_position)
    warn_about_k1(grpo.kl_estimator, grpo.beta)
    checkpoints = Checkpoints(folder / "checkpoints" / "grpo", identity)
    if not resume:
        checkpoints.clear()
    start = checkpoints.latest_step or 0
    loader = make_loader(
        shards,
        batch_size=grpo.batch_size * grpo.accumulation,
        seed=config.seed + 1,
        epochs=grpo.epochs,
        buckets=config.loader.buckets,
        start_step=start,
        prefetch=config.loader.prefetch,
        threads=config.loader.threads,
    )
    total = min(loader.total_steps, grpo.max_steps or loader.total_steps)
    optimizer = make_optimizer(grpo.optimizer, total * grpo.updates_per_rollout)
    schedule = make_schedule(grpo.optimizer, total * grpo.updates_per_rollout)
    rollout_fn = make_rollout(policy, grpo, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    step_fn = make_grpo_step(policy, optimizer, grpo, config.logprob)
    reference = jax.tree.map(jnp.copy, policy.trained) if grpo.mode == "full" and grpo.beta > 0 else None
    state = init_state(policy.trained, optimizer)
    if start:
        state = TrainState(*checkpoints.restore(tuple(state), start)[1])
    item_id = shards.item_id
    clock = ReadyClock()
    limit = MISMATCH_LIMIT[merge_policy(policy).config.dtype]
    with (
        contextlib.closing(checkpoints),
        MetricsLog(folder, "grpo", start_step=start) as log,
        Progress(total=total, completed=start, description="grpo", unit="step") as progress,
    ):
        pending: tuple[int, dict[str, Any], float, Future[float]] | None = None

        def finish(step: int, values: dict[str, Any], dispatched: float, ready: Future[float]) -> float:
            """Reads a step's metrics, once the next rollout is on its way; returns when its update ended."""
            ended = ready.result()
            tokens = values.pop("tokens")
            update_s = ended - dispatched
            step_s = values["generate_s"] + values["reward_s"] + update_s
            timing = {"update_s": update_s, "step_s": step_s, "tokens_per_second": tokens / step_s}
            row = log.write(step, {**values, **timing, "learning_rate": schedule(step * grpo.updates_per_rollout)})
            check_finite("grpo", step, row)
            if row["logprob_mismatch"] > limit:
                warnings.warn(
                    f"grpo step {step}: rollout and training log-probs differ by {row['logprob_mismatch']:.2e} on average "
                    f"(rounding is below {limit:.0e}): the sampler and the trainer do not compute the same policy",
                    stacklevel=2,
                )
            progress.advance(reward=row["reward_mean"], hit=row["hit_rate"], kl=row.get("kl", 0.0))
            return ended

        for step, batch in zip(range(start, total), loader, strict=False):
            began = time.perf_counter()
            keys = make_keys(config.seed, step, jnp.asarray(batch.row), grpo.group_size)
            rollout = rollout_fn(state.trained, policy.frozen, batch.prompt, batch.prompt_length, keys)
            if pending is not None:
                began = max(began, finish(*pending))
            sampled = judge_rollout(batch, rollout, item_id, tokenizer, grpo, titles)
            dispatched = time.perf_counter()
            micro = to_grpo_batch(sampled, grpo)
            values: dict[str, Any] = {}
            for update in range(grpo.updates_per_rollout):
                state, metrics, logp_old = step_fn(state, policy.frozen, reference, micro)
                values |= metrics if update == 0 else {k: v for k, v in metrics.items() if k != "logprob_mismatch"}
                micro = micro._replace(logp_old=logp_old)
            values |= summarise_rollout(sampled)
            values |= {"generate_s": dispatched - began - sampled.reward_s, "reward_s": sampled.reward_s}
            values["tokens"] = int(batch.prompt_length.sum() + sampled.rollout.completion_length.sum())
            pending = (step, values, dispatched, clock.note(metrics))
            if (step + 1) % grpo.checkpoint_every == 0 and step + 1 < total:
                # The write goes on while the next step reuses the donated buffers, so it gets a copy of its own.
                checkpoints.save(step + 1, jax.tree.map(jnp.copy, tuple(state)))
        if pending is not None:
            finish(*pending)
        checkpoints.save(total, tuple(state))
    return state.trained, total
