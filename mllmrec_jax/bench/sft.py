"""One SFT step on random weights, prompts and answers."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mllmrec_jax.bench.flops import count_sft, sum_work
from mllmrec_jax.bench.measure import read_clocks, repeat_runs, time_call
from mllmrec_jax.bench.rows import make_document
from mllmrec_jax.bench.step import WARMUP
from mllmrec_jax.bench.work import call_phase, check_work, compile_phase, draw_tokens, find_sizes, full_lengths, make_phase_row, make_policy
from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.sharding import place_batch
from mllmrec_jax.train.sft_step import SftBatch, make_sft_step
from mllmrec_jax.train.stage import start_state
from mllmrec_jax.train.state import make_optimizer


def bench_sft(config: RunConfig, *, repeats: int = 20) -> dict[str, Any]:
    """Times optimizer steps on fresh random examples.

    Sizes come from the configuration: `sft.batch_size` x `sft.accumulation` prompts of exactly `prompt.max_prompt_tokens` tokens with one
    answer of `grpo.max_new_tokens` tokens each.

    Returns:
      Row `sft`.
    """
    sft = config.sft
    micro = find_sizes(config)._replace(prompts=sft.batch_size, group_size=1)
    check_work(config, micro)
    sizes = micro._replace(prompts=micro.prompts * sft.accumulation)
    policy = make_policy(config, mode=sft.mode, lora=sft.lora)
    optimizer = make_optimizer(sft.optimizer, repeats + WARMUP)
    state = start_state(policy.trained, optimizer)
    function = make_sft_step(policy, optimizer, sft, config.logprob, seed=config.seed)
    generator = np.random.default_rng(config.seed)

    def draw_batch() -> SftBatch:
        a, b, p, c, v = sft.accumulation, micro.prompts, micro.prompt_tokens, micro.new_tokens, micro.vocabulary
        lengths = [full_lengths(a * b, p).reshape(a, b), full_lengths(a * b, c).reshape(a, b, 1)]
        rows = draw_tokens(generator, (a, b, p), v), lengths[0], draw_tokens(generator, (a, b, 1, c), v), lengths[1]
        *group, history_mask = place_batch([*rows, generator.integers(0, 2, (a, b, p)).astype(np.uint8)], leading=1)
        return jax.block_until_ready(SftBatch(GroupBatch(*group), history_mask))

    phase = compile_phase(function, state, policy.frozen, draw_batch(), work=sum_work(count_sft(config.model, micro, sft, config.logprob)))

    def run(repeat: int) -> dict[str, float]:
        nonlocal state
        batch = draw_batch()
        seconds, (state, metrics) = time_call(call_phase, phase, (state, policy.frozen, batch))
        if not np.isfinite(float(metrics["loss"])):
            raise RuntimeError(f"sft: expected a finite loss, got {float(metrics['loss'])}; the numbers would be of other work")
        return {"sft": seconds}

    clocks = read_clocks()
    seconds = repeat_runs(run, warmup=WARMUP, repeats=repeats, description="bench sft")
    rows = [make_phase_row("sft", phase, seconds["sft"], config, sizes, mode=sft.mode, history_loss=sft.history_loss_weight > 0)]
    return make_document("sft", config, rows, repeats=repeats, clocks=clocks, shapes=sizes._asdict())
