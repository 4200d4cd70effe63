"""Generation alone: the prefill of the prompts, and the whole rollout."""

from __future__ import annotations

from typing import Any

import jax

from mllmrec_jax.bench.flops import Sizes, count_prefill
from mllmrec_jax.bench.grpo_work import GrpoWork
from mllmrec_jax.bench.measure import find_percentiles, read_clocks, repeat_runs, time_call
from mllmrec_jax.bench.rows import make_document
from mllmrec_jax.bench.step import WARMUP
from mllmrec_jax.bench.work import call_phase, compile_phase, find_sizes, make_phase_row
from mllmrec_jax.config import RunConfig
from mllmrec_jax.train.state import merge_policy


def bench_rollout(config: RunConfig, *, repeats: int = 20) -> dict[str, Any]:
    """Times prefill and rollout of the same fresh random prompts; sizes as in `bench step`.

    Returns:
      Rows `prefill` and `rollout` (which has a prefill of its own); `decode_token_s`: what is left of a rollout for each of the C - 1
      decoding steps, negative where decoding takes less than the noise of a prefill.
    """
    work = GrpoWork(config, find_sizes(config), steps=1)
    lora = config.grpo.lora if config.grpo.mode == "lora" else None

    def fill(trained: Any, frozen: Any, prompt: jax.Array, length: jax.Array) -> Any:
        return merge_policy(work.policy._replace(frozen=frozen), trained).prefill(prompt, length)

    prompts = work.draw_prompts(0)
    prefill = compile_phase(jax.jit(fill), *work.rollout_arguments(prompts)[:-1], work=count_prefill(config.model, work.sizes, lora=lora))
    rollout = work.compile_rollout(prompts)

    def run(repeat: int) -> dict[str, float]:
        arguments = work.rollout_arguments(work.draw_prompts(repeat))
        prefill_s, _ = time_call(call_phase, prefill, arguments[:-1])
        rollout_s, sampled = time_call(call_phase, rollout, arguments)
        work.check_rollout(sampled)
        return {"prefill": prefill_s, "rollout": rollout_s}

    clocks = read_clocks()
    seconds = repeat_runs(run, warmup=WARMUP, repeats=repeats, description="bench rollout")
    # A prefill makes no completions: its tokens are the prompts', and with G = 1 both ways of counting agree.
    alone: Sizes = work.sizes._replace(group_size=1, new_tokens=0)
    reuse = {"reuse_rollout": config.grpo.reuse_rollout}
    rows = [
        make_phase_row("prefill", prefill, seconds["prefill"], config, alone),
        make_phase_row("rollout", rollout, seconds["rollout"], config, work.sizes, **reuse),
    ]
    left = [(whole - part) / max(1, work.sizes.new_tokens - 1) for whole, part in zip(seconds["rollout"], seconds["prefill"], strict=True)]
    more = {"decode_token_s": find_percentiles(left), "shapes": work.sizes._asdict()}
    return make_document("rollout", config, rows, repeats=repeats, clocks=clocks, **more)
