"""The SFT loop: batches in, trained weights, metrics and checkpoints out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.data.loader import ExampleBatch
from mllmrec_jax.data.shards import Shards
from mllmrec_jax.sharding import place_batch
from mllmrec_jax.train.sft_step import SftBatch, make_sft_step
from mllmrec_jax.train.stage import Watch, name_host_work, name_wait, open_stage
from mllmrec_jax.train.state import Policy


def to_sft_batch(batch: ExampleBatch, accumulation: int) -> SftBatch:
    """Rows [A * B, ...] of the loader as A micro-batches of groups with one completion, the answer."""

    answer, answer_length = batch.answer[:, None], batch.answer_length[:, None]
    rows = batch.prompt, batch.prompt_length, answer, answer_length, batch.history_mask
    *group, history_mask = place_batch([x.reshape(accumulation, -1, *x.shape[1:]) for x in rows], leading=1)
    return SftBatch(GroupBatch(*group), history_mask)


def run_sft(
    config: RunConfig,
    policy: Policy,
    shards: Shards,
    *,
    folder: Path,
    identity: dict[str, Any],
    resume: bool,
    watch: Watch | None = None,
) -> tuple[Any, int]:
    """Trains for the configured epochs or steps; returns (trained weights, steps done).

    Raises:
      TrainingError: a loss, gradient or weight is not finite.
      LoaderError: the data do not fill one batch.
      CheckpointError: a checkpoint cannot be written or belongs to another run.
    """
    sft = config.sft
    with open_stage("sft", config, policy, shards, folder=folder, identity=identity, resume=resume, watch=watch) as stage:
        step_fn = make_sft_step(policy, stage.optimizer, sft, config.logprob, seed=config.seed)
        state = stage.state
        pending: tuple[int, dict[str, Any]] | None = None
        clock = time.perf_counter()

        def finish(step: int, values: dict[str, Any]) -> None:
            """Reads a step's metrics, once the next step is on its way."""
            nonlocal clock
            with name_wait("update"):
                tokens = float(values["tokens"])
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            with name_host_work("read metrics"):
                row = stage.record(step, {**values, "step_s": seconds, "tokens_per_second": tokens / seconds})
                stage.progress.advance(loss=row["loss"])

        for step, batch in stage.batches():
            with name_host_work("dispatch update"):
                state, metrics = step_fn(state, policy.frozen, to_sft_batch(batch, sft.accumulation))
            if pending is not None:
                finish(*pending)
            pending = step, metrics
            if stage.is_due(step + 1):
                finish(*pending)
                pending = None
                with name_host_work("save checkpoint"):
                    stage.save(step + 1, state)
    return state.trained, stage.total
