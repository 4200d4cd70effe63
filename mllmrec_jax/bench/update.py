"""The update alone: everything of a GRPO step after the sampled tokens are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from mllmrec_jax.bench.grpo_work import GrpoWork, Prompts
from mllmrec_jax.bench.measure import read_clocks, repeat_runs, time_call
from mllmrec_jax.bench.rows import make_document
from mllmrec_jax.bench.step import WARMUP
from mllmrec_jax.bench.work import call_phase, find_sizes, make_phase_row
from mllmrec_jax.config import RunConfig
from mllmrec_jax.generate.rollout import Rollout


def bench_update(config: RunConfig, *, repeats: int = 20) -> dict[str, Any]:
    """Times updates on fresh random prompts, completions and rewards; sizes as in `bench step`.

    Returns:
      Row `update`, with the policy's forward pass; where `grpo.reuse_rollout` is set, also `update_reusing`, which takes that pass from
      a rollout (not timed) of the same prompts, as a training step does.
    """
    work = GrpoWork(config, find_sizes(config), steps=2 * (repeats + WARMUP))
    prompts = work.draw_prompts(0)
    makers: dict[str, Callable[[Prompts], Rollout]] = {"update": lambda _: work.draw_completions()}
    if config.grpo.reuse_rollout:
        rollout = work.compile_rollout(prompts, flops_too=False)
        makers["update_reusing"] = lambda prompts: call_phase(rollout, work.rollout_arguments(prompts))
    phases = {name: work.compile_update(prompts, make(prompts)) for name, make in makers.items()}

    def run(repeat: int) -> dict[str, float]:
        prompts, seconds = work.draw_prompts(repeat), {}
        for name, make in makers.items():
            arguments = jax.block_until_ready(work.update_arguments(prompts, make(prompts)))
            seconds[name], result = time_call(call_phase, phases[name], arguments)
            work.take_update(result)
        return seconds

    clocks = read_clocks()
    seconds = repeat_runs(run, warmup=WARMUP, repeats=repeats, description="bench update")
    rows = [make_phase_row(name, phase, seconds[name], config, work.sizes) for name, phase in phases.items()]
    return make_document("update", config, rows, repeats=repeats, clocks=clocks, shapes=work.sizes._asdict())
