"""Ranking users' candidates, beside one generation for each K, a user at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllmrec_jax.bench.flops import Sizes, count_forward, count_head, count_rollout
from mllmrec_jax.bench.measure import find_percentiles, read_clocks, repeat_runs, time_call
from mllmrec_jax.bench.rows import make_document
from mllmrec_jax.bench.step import WARMUP
from mllmrec_jax.bench.work import (
    Phase,
    call_phase,
    check_work,
    compile_phase,
    draw_tokens,
    find_sizes,
    full_lengths,
    make_phase_row,
    make_policy,
    repeat_phase,
)
from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.evaluate.metrics import CUTOFFS
from mllmrec_jax.evaluate.protocol import make_scorer
from mllmrec_jax.generate.rollout import make_keys, rollout_group
from mllmrec_jax.sharding import current_mesh, place_batch, round_batch
from mllmrec_jax.train.state import Policy, merge_policy


def bench_rank(config: RunConfig, *, repeats: int = 10) -> dict[str, Any]:
    """Times the ranking of random users, and the way of public evaluation code on the same model.

    Sizes come from the configuration: `evaluate.batch_size` users with prompts of exactly `prompt.max_prompt_tokens` tokens and
    `data.negatives` + 1 candidates, whose answers have `grpo.max_new_tokens` tokens each.

    Returns:
      Rows `rank` (all candidates of a batch of users scored under their shared prompts: every HR@K and NDCG@K follows from it) and
      `generate_per_k` (one user: a greedy generation of `grpo.max_new_tokens` tokens for each K of the report, batch 1), with
      `users_per_s`; `times_faster`: the ratio of the two. On a mesh, whose devices one user cannot fill, only the first.
    """
    candidates = config.data.negatives + 1
    sizes = find_sizes(config)._replace(prompts=round_batch(config.evaluate.batch_size), group_size=candidates)
    check_work(config, sizes)
    policy = make_policy(config, mode=config.grpo.mode, lora=config.grpo.lora)
    lora = config.grpo.lora if config.grpo.mode == "lora" else None
    generator = np.random.default_rng(config.seed)
    b, p, k, c, v = sizes

    def draw_users() -> GroupBatch:
        rows = draw_tokens(generator, (b, p), v), full_lengths(b, p), draw_tokens(generator, (b, k, c), v), np.full((b, k), c, np.int32)
        return jax.block_until_ready(GroupBatch(*place_batch(list(rows))))

    work = count_forward(config.model, sizes, lora=lora).plus(count_head(config.model, b * k * c, v, config.logprob, job="forward"))
    rank = compile_phase(make_scorer(policy, config), policy.trained, policy.frozen, draw_users(), work=work)

    phases = {"rank": rank}
    one = sizes._replace(prompts=1, group_size=1)
    if current_mesh() is None:
        phases["generate_per_k"] = compile_generation(config, policy, one)

    def run(repeat: int) -> dict[str, float]:
        users = draw_users()
        seconds = {"rank": time_call(call_phase, rank, (policy.trained, policy.frozen, users))[0]}
        if "generate_per_k" in phases:
            user = (policy.trained, policy.frozen, *jax.device_put((draw_tokens(generator, (1, p), v), full_lengths(1, p))))
            jax.block_until_ready(user)
            seconds["generate_per_k"] = sum(time_call(call_phase, phases["generate_per_k"], user)[0] for _ in CUTOFFS)
        return seconds

    clocks = read_clocks()
    seconds = repeat_runs(run, warmup=WARMUP, repeats=repeats, description="bench rank")
    rows = [{**make_phase_row("rank", rank, seconds["rank"], config, sizes), "users_per_s": b / find_percentiles(seconds["rank"])["p50"]}]
    more: dict[str, Any] = {"shapes": sizes._asdict()}
    if "generate_per_k" in phases:
        several = repeat_phase(phases["generate_per_k"], len(CUTOFFS))
        row = make_phase_row("generate_per_k", several, seconds["generate_per_k"], config, one, cutoffs=list(CUTOFFS))
        rows.append({**row, "users_per_s": 1 / row["p50"]})
        more["times_faster"] = find_percentiles([b * y / x for x, y in zip(seconds["rank"], seconds["generate_per_k"], strict=True)])
    return make_document("rank", config, rows, repeats=repeats, clocks=clocks, **more)


def compile_generation(config: RunConfig, policy: Policy, sizes: Sizes) -> Phase:
    """A greedy generation for one prompt."""
    lora = config.grpo.lora if config.grpo.mode == "lora" else None

    @jax.jit
    def generate(trained: Any, frozen: Any, prompt: jax.Array, length: jax.Array) -> Any:
        model = merge_policy(policy._replace(frozen=frozen), trained)
        keys = make_keys(config.seed, 0, jnp.zeros(1, jnp.int32), 1)
        return rollout_group(model, prompt, length, keys, max_new_tokens=sizes.new_tokens, temperature=0.0, stop_ids=(), pad_id=0)

    shapes = jax.ShapeDtypeStruct((1, sizes.prompt_tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    work, trips = count_rollout(config.model, sizes, lora=lora), sizes.new_tokens - 1
    return compile_phase(generate, policy.trained, policy.frozen, *shapes, work=work, while_trips=trips)
