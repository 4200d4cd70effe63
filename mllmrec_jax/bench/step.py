"""GRPO on random weights, prompts and rewards: a whole step, its rollout alone, its update alone."""

from __future__ import annotations

import time
from typing import Any

import jax

from mllmrec_jax.bench.grpo_work import GrpoWork
from mllmrec_jax.bench.measure import find_percentiles, read_clocks, repeat_runs
from mllmrec_jax.bench.rows import make_document
from mllmrec_jax.bench.work import call_phase, find_sizes, join_phases, make_phase_row
from mllmrec_jax.config import RunConfig

WARMUP = 2


def bench_step(config: RunConfig, *, repeats: int = 20) -> dict[str, Any]:
    """Times `repeats` steps after warm-up, each on fresh random prompts and rewards.

    Sizes come from the configuration: `grpo.batch_size` x `grpo.accumulation` prompts of exactly `prompt.max_prompt_tokens` tokens,
    `grpo.group_size` completions of exactly `grpo.max_new_tokens` tokens (nothing stops them), `tokenizer.vocab_size` tokens.

    Returns:
      Rows `generate` (until the sampled tokens are ready), `update` (everything after: policy, reference, loss, backward, optimizer, until
      the new weights are ready) and `step`; p20/p50/p80 of each (seconds) also as `generate_s`, `update_s`, `step_s`; `compile_s` of both
      programs.
    """
    work = GrpoWork(config, find_sizes(config), steps=repeats + WARMUP)
    prompts = work.draw_prompts(0)
    rollout = work.compile_rollout(prompts)
    update = work.compile_update(prompts, call_phase(rollout, work.rollout_arguments(prompts)))

    def run(repeat: int) -> dict[str, float]:
        prompts = work.draw_prompts(repeat)
        started = time.perf_counter()
        sampled = jax.block_until_ready(call_phase(rollout, work.rollout_arguments(prompts)))
        generated = time.perf_counter()
        result = jax.block_until_ready(call_phase(update, work.update_arguments(prompts, sampled)))
        ended = time.perf_counter()
        work.check_rollout(sampled)
        work.take_update(result)
        return {"generate": generated - started, "update": ended - generated, "step": ended - started}

    clocks = read_clocks()
    seconds = repeat_runs(run, warmup=WARMUP, repeats=repeats, description="bench step")
    phases = {"generate": rollout, "update": update, "step": join_phases(rollout, update)}
    reuse = {"reuse_rollout": config.grpo.reuse_rollout}
    rows = [make_phase_row(name, phase, seconds[name], config, work.sizes, **reuse) for name, phase in phases.items()]
    timing = {f"{name}_s": find_percentiles(values) for name, values in seconds.items()}
    compile_s = sum(row.get("compile_s", 0.0) for row in rows)
    more = {**timing, "compile_s": compile_s, "shapes": work.sizes._asdict()}
    return make_document("step", config, rows, repeats=repeats, clocks=clocks, **more)
