"""The GRPO loop: rollout, reward, update."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mllmrec_jax.config import GrpoConfig, RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.data.loader import ExampleBatch
from mllmrec_jax.data.shards import Shards
from mllmrec_jax.generate.rollout import Rollout, check_positions, make_keys, rollout_group
from mllmrec_jax.model.replay import Activations
from mllmrec_jax.objectives.advantages import compute_advantages, find_no_signal
from mllmrec_jax.objectives.kl import warn_about_k1
from mllmrec_jax.rewards import Rewards, RewardTask, score_completions
from mllmrec_jax.sharding import constrain, place_batch, read_own_rows, share_rows
from mllmrec_jax.train.grpo_step import GrpoBatch, GrpoStep, make_grpo_step
from mllmrec_jax.train.stage import Watch, name_host_work, name_wait, open_stage
from mllmrec_jax.train.state import Policy, TrainState, merge_policy

# Mean absolute difference of rollout and training log-probs above which the two are not the same policy (rounding gives far less).
MISMATCH_LIMIT = {"float32": 1e-3, "bfloat16": 5e-2}
# Completions are cut to the shortest of these widths (tokens) that holds them: padding costs as much as tokens do.
COMPLETION_WIDTHS = tuple(8 * 2**i for i in range(12))


@runtime_checkable
class TokenReader(Protocol):
    """What the loop needs of a tokenizer."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def pad_id(self) -> int: ...

    def decode(self, ids: Iterable[int]) -> str: ...


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
    """This process's rows of one rollout, on the host, and their rewards."""

    batch: ExampleBatch
    rollout: Rollout
    rewards: Rewards


class Outcome(NamedTuple):
    """What every process knows of all rows [R] of a rollout."""

    reward: np.ndarray
    """[R, G] float32."""
    well_formed: np.ndarray
    """[R, G] bool."""
    hit: np.ndarray
    """[R, G] bool."""
    completion_length: np.ndarray
    """[R, G] int32."""
    stopped: np.ndarray
    """[R, G] bool."""
    prompt_length: np.ndarray
    """[R] int32."""


def make_rollout(policy: Policy, grpo: GrpoConfig, *, stop_ids: tuple[int, ...], pad_id: int) -> Any:
    """The compiled `(trained, frozen, prompt, prompt_length, keys) -> Rollout`, its rows laid out as a batch."""

    @jax.jit
    def rollout(trained: Any, frozen: Any, prompt: jax.Array, prompt_length: jax.Array, keys: jax.Array) -> Rollout:
        sampled = rollout_group(
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
            keep_activations=grpo.reuse_rollout,
        )
        rows = jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), sampled._replace(activations=None))
        return rows._replace(activations=sampled.activations)

    return rollout


def judge_rollout(
    batch: ExampleBatch, rollout: Rollout, item_id: np.ndarray, tokenizer: TokenReader, grpo: GrpoConfig, titles: Mapping[int, str]
) -> Sampled:
    """Copies this process's rows of a rollout (not its activations) to the host, decodes and scores them."""
    host: Rollout = read_own_rows(rollout._replace(activations=None))
    texts = [
        [tokenizer.decode(row[:length]) for row, length in zip(group, lengths, strict=True)]
        for group, lengths in zip(host.completion, host.completion_length, strict=True)
    ]
    tasks = [
        RewardTask(int(item_id[target]), [int(item_id[c]) for c in candidates])
        for target, candidates in zip(batch.target, batch.candidates, strict=True)
    ]
    return Sampled(batch, host, score_completions(texts, tasks, grpo.reward, titles))


def share_outcome(sampled: Sampled, accumulation: int) -> Outcome:
    """The processes' outcomes put together, in the order of the batch: what follows from them is the same however it is cut."""
    rewards, rollout = sampled.rewards, sampled.rollout
    lengths = rollout.completion_length, rollout.stopped, sampled.batch.prompt_length
    own = Outcome(rewards.reward, rewards.well_formed, rewards.hit, *(np.asarray(x) for x in lengths))
    whole = share_rows(jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), own), leading=1)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), whole)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def cut_activations(kept: Activations, accumulation: int, parts: int, width: int) -> Activations:
    """Activations of a rollout's rows, which lie in `parts` blocks (one a process), as micro-batches [A, ...] of `width` new tokens."""

    def cut(x: jax.Array, axis: int) -> jax.Array:
        blocks = x.reshape(*x.shape[:axis], parts, accumulation, -1, *x.shape[axis + 1 :])
        micros = jnp.moveaxis(blocks, axis + 1, 0)
        micros = micros.reshape(accumulation, *x.shape[:axis], -1, *x.shape[axis + 1 :])
        return constrain(micros, None, *(None,) * axis, "batch", *(None,) * (x.ndim - axis - 1))

    completion, predicting = kept.completion[:, :, :, :width], kept.predicting[:, :, :width]
    return Activations(cut(kept.prompt, 1), cut(completion, 1), cut(predicting, 0))


def to_grpo_batch(
    sampled: Sampled, outcome: Outcome, grpo: GrpoConfig, places: np.ndarray, activations: Activations | None = None
) -> GrpoBatch:
    """A scored rollout as micro-batches, completions cut to the next standard width; this process has the rows `places` of it."""
    rollout = sampled.rollout
    longest = int(outcome.completion_length.max())
    width = min(grpo.max_new_tokens, next((w for w in COMPLETION_WIDTHS if w >= longest), grpo.max_new_tokens))
    advantage = np.asarray(compute_advantages(jnp.asarray(outcome.reward), scale=grpo.scale_rewards))[places]
    host = sampled.batch.prompt, sampled.batch.prompt_length, rollout.completion[..., :width], rollout.completion_length
    rows = [np.asarray(x) for x in (*host, advantage, rollout.logp_raw[..., :width])]
    *group, advantage, logp = place_batch([x.reshape(grpo.accumulation, -1, *x.shape[1:]) for x in rows], leading=1)
    if activations is not None:
        parts = grpo.batch_size * grpo.accumulation // len(places)
        activations = cut_activations(activations, grpo.accumulation, parts, width)
    return GrpoBatch(GroupBatch(*group), advantage, logp, None, activations)


def summarise_rollout(outcome: Outcome) -> dict[str, float]:
    """What the rewards and completions alone say about a step; on the host, so that it does not wait for what the device does."""
    return {
        "reward_mean": float(outcome.reward.mean()),
        "reward_std": float(outcome.reward.std()),
        "format_rate": float(outcome.well_formed.mean()),
        "hit_rate": float(outcome.hit.mean()),
        "no_signal_share": float(find_no_signal(outcome.reward).mean()),
        "completion_length": float(outcome.completion_length.mean()),
        "truncated_share": float(1 - outcome.stopped.mean()),
    }


def update_policy(
    step_fn: GrpoStep, state: TrainState, frozen: Any, reference: Any, batch: GrpoBatch, updates: int
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`updates` optimizer steps on one rollout; metrics are the last one's, the log-prob mismatch the first one's."""
    values: dict[str, jax.Array] = {}
    for _ in range(updates):
        state, metrics, logp_old = step_fn(state, frozen, reference, batch)
        values = {**metrics, "logprob_mismatch": values.get("logprob_mismatch", metrics["logprob_mismatch"])}
        batch = batch._replace(logp_old=logp_old, activations=None)
    return state, values


def check_mismatch(step: int, mismatch: float, dtype: str) -> None:
    """Warns where rollout and training log-probs differ by more than rounding."""
    if mismatch > MISMATCH_LIMIT[dtype]:
        warnings.warn(
            f"grpo step {step}: rollout and training log-probs differ by {mismatch:.2e} on average (rounding is below "
            f"{MISMATCH_LIMIT[dtype]:.0e}): the sampler and the trainer do not compute the same policy",
            stacklevel=2,
        )


def run_grpo(
    config: RunConfig,
    policy: Policy,
    shards: Shards,
    tokenizer: TokenReader,
    titles: Mapping[int, str],
    *,
    folder: Path,
    identity: dict[str, Any],
    resume: bool,
    watch: Watch | None = None,
) -> tuple[Any, int]:
    """Trains for the configured epochs or rollouts; returns (trained weights, rollouts done).

    `titles` (item id -> title as prompts show it) serves `reward.require_title`.

    Raises:
      TrainingError: a loss, gradient or weight is not finite.
      LoaderError: the data do not fill one batch.
      CheckpointError: a checkpoint cannot be written or belongs to another run.
      ConfigError: prompt and completion do not fit the model.
    """
    grpo, model = config.grpo, merge_policy(policy).config
    check_positions(int(shards.prompt_length.max()), grpo.max_new_tokens, model.max_position)
    warn_about_k1(grpo.kl_estimator, grpo.beta)
    keys_fn = jax.jit(make_keys, static_argnums=(0, 3))
    rollout_fn = make_rollout(policy, grpo, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    reference = jax.tree.map(jnp.copy, policy.trained) if grpo.mode == "full" and grpo.beta > 0 else None
    clock = ReadyClock()
    with open_stage("grpo", config, policy, shards, folder=folder, identity=identity, resume=resume, watch=watch) as stage:
        step_fn = make_grpo_step(policy, stage.optimizer, grpo, config.logprob)
        state = stage.state
        pending: tuple[int, dict[str, Any], float, Future[float]] | None = None

        def finish(step: int, values: dict[str, Any], dispatched: float, ready: Future[float]) -> float:
            """Reads a step's metrics, once the next rollout is on its way; returns when its update ended."""
            with name_wait("update"):
                ended = ready.result()
            update_s = ended - dispatched
            step_s = values["generate_s"] + values["reward_s"] + update_s
            timing = {"update_s": update_s, "step_s": step_s, "tokens_per_second": values.pop("tokens") / step_s}
            with name_host_work("read metrics"):
                row = stage.record(step, {**values, **timing})
                check_mismatch(step, row["logprob_mismatch"], model.dtype)
                stage.progress.advance(reward=row["reward_mean"], hit=row["hit_rate"], kl=row.get("kl", 0.0))
            return ended

        for step, batch in stage.batches():
            began = time.perf_counter()
            with name_host_work("dispatch rollout"):
                prompt, prompt_length, row = place_batch([batch.prompt, batch.prompt_length, batch.row.astype(np.int32)])
                rollout = rollout_fn(state.trained, policy.frozen, prompt, prompt_length, keys_fn(config.seed, step, row, grpo.group_size))
            if pending is not None:
                began = max(began, finish(*pending))
            with name_wait("rollout"):
                rollout = jax.block_until_ready(rollout)
            activations, rollout = rollout.activations, rollout._replace(activations=None)
            generated = time.perf_counter()
            with name_host_work("reward"):
                sampled = judge_rollout(batch, rollout, shards.item_id, tokenizer, grpo, titles)
                outcome = share_outcome(sampled, grpo.accumulation)
            dispatched = time.perf_counter()
            with name_host_work("dispatch update"):
                grpo_batch = to_grpo_batch(sampled, outcome, grpo, stage.places, activations)
                del activations  # their memory is the update's, once they are cut into micro-batches
                state, metrics = update_policy(step_fn, state, policy.frozen, reference, grpo_batch, grpo.updates_per_rollout)
                del grpo_batch
            values = {**metrics, **summarise_rollout(outcome), "reward_s": dispatched - generated, "generate_s": generated - began}
            values["tokens"] = int(outcome.prompt_length.sum() + outcome.completion_length.sum())
            pending = step, values, dispatched, clock.note(metrics)
            if stage.is_due(step + 1):
                finish(*pending)
                pending = None
                with name_host_work("save checkpoint"):
                    stage.save(step + 1, state)
    return state.trained, stage.total
