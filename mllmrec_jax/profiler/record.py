"""Runs the training loop and records chosen steps of it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from mllmrec_jax.config import RunConfig
from mllmrec_jax.profiler.compilations import Compilation, watch_compilations
from mllmrec_jax.profiler.programs import Program, collect_programs
from mllmrec_jax.profiler.work import Stage, Work
from mllmrec_jax.train.grpo_loop import run_grpo
from mllmrec_jax.train.sft_loop import run_sft

LEAST_FIRST = 4
"""Step 0 compiles, step 1 may compile again, step 2 is timed without a trace, and the step before the first that counts is traced."""


@dataclasses.dataclass
class Recording:
    """What a recorded run leaves beside its trace."""

    programs: list[Program]
    compilations: list[Compilation]
    """In the steps that count; none is expected."""
    untraced_s: float
    """Mean seconds a step before the trace began, without the first two."""


def record_steps(config: RunConfig, stage: Stage, work: Work, *, first: int, count: int, folder: Path) -> Recording:
    """Runs the stage's loop on `work` for `first + count` steps; the trace of the last `count + 1` goes to `folder`/trace.

    No checkpoint is written; the loop's own log goes to `folder`/loop.

    Args:
      config: of the run; its number of epochs and steps, and its checkpoints, are ignored.
      stage: which loop.
      work: what it works on.
      first: number of the first step that counts, at least LEAST_FIRST.
      count: steps that count.
      folder: must exist.
    """
    total = first + count
    endless = dataclasses.replace(getattr(config, stage), epochs=total + 1, max_steps=total + 1, checkpoint_every=total + 2)
    config = dataclasses.replace(config, **{stage: endless})
    starts: dict[int, float] = {}
    recording = Recording([], [], 0.0)

    with contextlib.ExitStack() as tracing, contextlib.ExitStack() as watching:

        def watch(step: int) -> bool:
            starts[step] = time.perf_counter()
            if step == first - 1:
                tracing.enter_context(_trace(folder / "trace"))
            elif step == first:
                recording.compilations = watching.enter_context(watch_compilations())
            elif step == total:
                watching.close()
                tracing.close()
                # While the loop holds its arrays and programs.
                jax.profiler.save_device_memory_profile(str(folder / "memory.prof"))
                recording.programs = collect_programs()
                return False
            return True

        loop = {"folder": folder / "loop", "identity": {"profile": config.name}, "resume": False, "watch": watch}
        if stage == "sft":
            run_sft(config, work.policy, work.shards, **loop)
        else:
            run_grpo(config, work.policy, work.shards, work.tokenizer, work.titles, **loop)
    recording.untraced_s = (starts[first - 1] - starts[2]) / (first - 3)
    return recording


@contextlib.contextmanager
def _trace(folder: Path) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a record of every Python call would slow down what is measured
    options.host_tracer_level = 2  # the CPU backend records its operations from this level on
    jax.profiler.start_trace(folder, profiler_options=options)
    try:
        yield
    finally:
        jax.profiler.stop_trace()
