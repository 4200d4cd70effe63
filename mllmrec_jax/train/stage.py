"""What the SFT and the GRPO loop share: where a stage starts, its batches, its log, and which states may become checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mllmrec_jax.checkpoint import Checkpoints
from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.loader import ExampleBatch, Loader, make_loader
from mllmrec_jax.data.shards import Shards
from mllmrec_jax.distributed import PreemptedError, PreemptionGuard, is_main_process
from mllmrec_jax.progress import Progress
from mllmrec_jax.sharding import find_own_rows, lay_out
from mllmrec_jax.train.metrics_log import MetricsLog
from mllmrec_jax.train.state import Policy, TrainState, init_state, make_optimizer, make_schedule

Watch = Callable[[int], bool]
"""Called before each step with its number; False ends the stage there, without a checkpoint."""


class TrainingError(RuntimeError):
    """Training that cannot go on; the message names the step and the cause."""


def name_host_work(what: str) -> jax.profiler.TraceAnnotation:
    """Names what the loop does between programs in a trace; costs nothing where none is recorded."""
    return jax.profiler.TraceAnnotation(f"host: {what}")


def name_wait(what: str) -> jax.profiler.TraceAnnotation:
    """Names what the loop waits for."""
    return jax.profiler.TraceAnnotation(f"wait: {what}")


@jax.jit
def _is_sound(state: TrainState, updates: jax.Array) -> jax.Array:
    """Whether `updates` optimizer steps were applied, none of them left out, and every number is finite."""
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([state.step == updates, *(jnp.all(jnp.isfinite(leaf)) for leaf in floats)]).all()


def start_state(trained: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state over the mesh in context, made where it lies."""
    return jax.jit(lambda trained: lay_out(init_state(trained, optimizer)))(trained)


@dataclasses.dataclass
class Stage:
    """An open stage. Steps are batches of the loader; each makes `updates` optimizer steps."""

    name: Literal["sft", "grpo"]
    state: TrainState
    """Where the stage starts."""
    start: int
    """Steps done before."""
    total: int
    """Steps at the end."""
    updates: int
    checkpoint_every: int
    optimizer: optax.GradientTransformation
    learning_rates: np.ndarray
    """[optimizer steps] on the host: a value computed on the device would be ready only after the step that runs there."""
    loader: Loader
    places: np.ndarray
    """Which of a batch's rows this process has."""
    checkpoints: Checkpoints
    log: MetricsLog | None
    """None where process 0 writes it."""
    progress: Progress
    guard: PreemptionGuard
    watch: Watch

    def batches(self) -> Iterator[tuple[int, ExampleBatch]]:
        """(step, batch) from `start` to `total`, each step named in traces."""
        batches = iter(self.loader)
        for step in range(self.start, self.total):
            if not self.watch(step):
                return
            with name_host_work("load batch"):
                batch = next(batches)
            with jax.profiler.StepTraceAnnotation(self.name, step_num=step):
                yield step, batch

    def record(self, step: int, values: dict[str, Any]) -> dict[str, float]:
        """Writes a step's metrics (waiting for them) and returns them.

        Raises:
          TrainingError: loss or gradient is not finite; the step was not applied.
        """
        values = {**values, "learning_rate": self.learning_rates[step * self.updates]}
        row = {name: float(np.asarray(value)) for name, value in values.items()}
        if self.log is not None:
            self.log.write(step, row)
        for name in ("loss", "grad_norm"):
            if not np.isfinite(row[name]):
                raise TrainingError(
                    f"{self.name} step {step}: {name} is {row[name]}; the step was not applied. Lower the learning rate, or check the "
                    "weights"
                )
        return row

    def is_due(self, done: int) -> bool:
        """Whether the state after `done` steps is to be kept. To be asked once after each step, on every process."""
        return self.guard.should_stop() or done % self.checkpoint_every == 0 or done == self.total

    def save(self, done: int, state: TrainState) -> None:
        """Starts writing a checkpoint, once it is known that `state` is that of `done` whole steps.

        Raises:
          PreemptedError: SIGTERM has come; leaving the stage waits for the checkpoint.
          TrainingError: it holds numbers that are not finite, or a step was not applied; nothing is written.
          CheckpointError: the disk is full or the folder not writable.
        """
        if not _is_sound(state, np.int32(done * self.updates)):
            raise TrainingError(
                f"{self.name} step {done - 1}: weights or optimizer state are not finite, or an update was not applied; no checkpoint was "
                "written. Lower the learning rate, or check the weights"
            )
        # The write goes on while the next step reuses the donated buffers, so it gets a copy of its own.
        self.checkpoints.save(done, jax.tree.map(jnp.copy, tuple(state)))
        if self.guard.stopping:
            raise PreemptedError(f"stopped by SIGTERM after {self.name} step {done - 1}; go on with --resume")


@contextlib.contextmanager
def open_stage(
    name: Literal["sft", "grpo"],
    config: RunConfig,
    policy: Policy,
    shards: Shards,
    *,
    folder: Path,
    identity: dict[str, Any],
    resume: bool,
    watch: Watch | None = None,
) -> Iterator[Stage]:
    """Opens a stage at the newest checkpoint in `folder`/checkpoints/`name` where `resume` is set, else at its beginning.

    From a checkpoint it goes on to the same floats as an uninterrupted run on the same mesh, and to rounding on another. The state lies
    over the mesh in context.

    Raises:
      LoaderError: the data do not fill one batch.
      CheckpointError: a checkpoint belongs to another run, or (at the end) could not be written.
    """
    settings = getattr(config, name)
    updates = config.grpo.updates_per_rollout if name == "grpo" else 1
    with contextlib.closing(Checkpoints(folder / "checkpoints" / name, identity)) as checkpoints:
        if not resume:
            checkpoints.clear()
        start = checkpoints.latest_step or 0
        # Each micro-batch lies over all devices, so a process has a part of each.
        micros = np.arange(settings.accumulation)[:, None] * settings.batch_size
        places = (micros + find_own_rows(settings.batch_size)).ravel()
        loader = make_loader(
            shards,
            batch_size=settings.batch_size * settings.accumulation,
            places=places,
            seed=config.seed + (name == "grpo"),
            epochs=settings.epochs,
            buckets=config.loader.buckets,
            start_step=start,
            prefetch=config.loader.prefetch,
            threads=config.loader.threads,
        )
        total = min(loader.total_steps, settings.max_steps or loader.total_steps)
        optimizer = make_optimizer(settings.optimizer, total * updates)
        state = start_state(policy.trained, optimizer)
        if start:
            state = TrainState(*checkpoints.restore(tuple(state), start)[1])
        main = is_main_process()
        with (
            MetricsLog(folder, name, start_step=start) if main else contextlib.nullcontext() as log,
            Progress(total=total, completed=start, description=name, unit="step", stream=None if main else io.StringIO()) as progress,
            PreemptionGuard() as guard,
        ):
            yield Stage(
                name=name,
                state=state,
                start=start,
                total=total,
                updates=updates,
                checkpoint_every=settings.checkpoint_every,
                optimizer=optimizer,
                learning_rates=np.asarray(jax.vmap(make_schedule(settings.optimizer, total * updates))(jnp.arange(total * updates))),
                loader=loader,
                places=places,
                checkpoints=checkpoints,
                log=log,
                progress=progress,
                guard=guard,
                watch=watch or (lambda step: True),
            )
