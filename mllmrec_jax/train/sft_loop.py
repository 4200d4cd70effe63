"""The SFT loop: batches in, trained weights, metrics and checkpoints out."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mllmrec_jax.checkpoint import Checkpoints
from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.data.loader import ExampleBatch, make_loader
from mllmrec_jax.data.shards import Shards
from mllmrec_jax.progress import Progress
from mllmrec_jax.train.metrics_log import MetricsLog
from mllmrec_jax.train.sft_step import SftBatch, make_sft_step
from mllmrec_jax.train.state import Policy, TrainState, init_state, make_optimizer, make_schedule


class TrainingError(RuntimeError):
    """Training that cannot go on; the message names the step and the cause."""


def check_finite(stage: str, step: int, metrics: dict[str, float]) -> None:
    """Raises TrainingError where loss or gradient of `step` is not finite; the weights are as they were before that step."""
    for name in ("loss", "grad_norm"):
        if not np.isfinite(metrics[name]):
            raise TrainingError(
                f"{stage} step {step}: {name} is {metrics[name]}; the step was not applied. Lower the learning rate, or check the weights"
            )


def to_sft_batch(batch: ExampleBatch, accumulation: int) -> SftBatch:
    """Rows [A * B, ...] of the loader as A micro-batches of groups with one completion, the answer."""

    def cut(x: np.ndarray) -> jax.Array:
        return jnp.asarray(x.reshape(accumulation, -1, *x.shape[1:]))

    group = GroupBatch(cut(batch.prompt), cut(batch.prompt_length), cut(batch.answer[:, None]), cut(batch.answer_length[:, None]))
    return SftBatch(group, cut(batch.history_mask))


def run_sft(config: RunConfig, policy: Policy, shards: Shards, *, folder: Path, identity: dict[str, Any], resume: bool) -> tuple[Any, int]:
    """Trains for the configured epochs or steps; returns (trained weights, steps done).

    Continues from the newest checkpoint in `folder`/checkpoints/sft where `resume` is set: to the same floats as an uninterrupted run.

    Raises:
      TrainingError: a loss or gradient is not finite.
      LoaderError: the data do not fill one batch.
      CheckpointError: a checkpoint cannot be written or belongs to another run.
    """
    sft = config.sft
    checkpoints = Checkpoints(folder / "checkpoints" / "sft", identity)
    if not resume:
        checkpoints.clear()
    start = checkpoints.latest_step or 0
    loader = make_loader(
        shards,
        batch_size=sft.batch_size * sft.accumulation,
        seed=config.seed,
        epochs=sft.epochs,
        buckets=config.loader.buckets,
        start_step=start,
        prefetch=config.loader.prefetch,
        threads=config.loader.threads,
    )
    total = min(loader.total_steps, sft.max_steps or loader.total_steps)
    optimizer = make_optimizer(sft.optimizer, total)
    schedule: optax.Schedule = make_schedule(sft.optimizer, total)
    step_fn = make_sft_step(policy, optimizer, sft, config.logprob, seed=config.seed)
    state = init_state(policy.trained, optimizer)
    if start:
        state = TrainState(*checkpoints.restore(tuple(state), start)[1])
    with (
        contextlib.closing(checkpoints),
        MetricsLog(folder, "sft", start_step=start) as log,
        Progress(total=total, completed=start, description="sft", unit="step") as progress,
    ):
        pending: dict[str, Any] | None = None
        clock = time.perf_counter()

        def finish(step: int, values: dict[str, Any]) -> None:
            """Reads a step's metrics, once the next step is on its way."""
            nonlocal clock
            seconds, tokens = time.perf_counter() - clock, float(values["tokens"])
            clock = time.perf_counter()
            row = log.write(step, {**values, "learning_rate": schedule(step), "step_s": seconds, "tokens_per_second": tokens / seconds})
            check_finite("sft", step, row)
            progress.advance(loss=row["loss"])

        for step, batch in zip(range(start, total), loader, strict=False):
            state, metrics = step_fn(state, policy.frozen, to_sft_batch(batch, sft.accumulation))
            if pending is not None:
                finish(step - 1, pending)
            pending = metrics
            if (step + 1) % sft.checkpoint_every == 0 and step + 1 < total:
                # The write goes on while the next step reuses the donated buffers, so it gets a copy of its own.
                checkpoints.save(step + 1, jax.tree.map(jnp.copy, tuple(state)))
        if pending is not None:
            finish(total - 1, pending)
        checkpoints.save(total, tuple(state))
    return state.trained, total
