"""One GRPO step on random weights and random prompts: what the machine needs for generation and for everything after it."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.generate.rollout import make_keys
from mllmrec_jax.model.lora import add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.objectives.advantages import compute_advantages
from mllmrec_jax.progress import track
from mllmrec_jax.provenance import collect_provenance
from mllmrec_jax.train.grpo_loop import make_rollout
from mllmrec_jax.train.grpo_step import GrpoBatch, make_grpo_step
from mllmrec_jax.train.state import init_state, make_optimizer, split_policy

WARMUP_STEPS = 2


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(seconds, q)) for q in (20, 50, 80)}


def bench_step(config: RunConfig, *, repeats: int = 20) -> dict[str, Any]:
    """Times `repeats` steps after warm-up; each on fresh random prompts and rewards.

    Sizes come from the configuration: `grpo.batch_size` prompts of exactly `prompt.max_prompt_tokens` tokens, `grpo.group_size`
    completions of exactly `grpo.max_new_tokens` tokens (nothing stops them), `tokenizer.vocab_size` tokens.

    Returns:
      p20/p50/p80 (seconds) of `generate_s` (until the sampled tokens are ready), `update_s` (everything after: policy, reference, loss,
      backward, optimizer, until the new weights are ready) and `step_s`; `compile_s` of both programs; shapes and provenance.
    """
    grpo, vocab = config.grpo, config.tokenizer.vocab_size
    b, g, p, c = grpo.batch_size, grpo.group_size, config.prompt.max_prompt_tokens, grpo.max_new_tokens
    model = Decoder(config.model, vocab_size=vocab, rngs=nnx.Rngs(config.seed))
    if grpo.mode == "lora":
        add_adapters(model, grpo.lora, rngs=nnx.Rngs(config.seed + 1))
    policy = split_policy(model, grpo.mode)
    optimizer = make_optimizer(grpo.optimizer, repeats + WARMUP_STEPS)
    state = init_state(policy.trained, optimizer)
    reference = jax.tree.map(jnp.copy, policy.trained) if grpo.mode == "full" and grpo.beta > 0 else None
    rollout = make_rollout(policy, grpo, stop_ids=(), pad_id=0)
    update = make_grpo_step(policy, optimizer, grpo, config.logprob)
    length = jnp.full((b,), p, jnp.int32)
    generator = np.random.default_rng(config.seed)

    def draw_inputs(step: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        prompt = jnp.asarray(generator.integers(0, vocab, (b, p)), jnp.int32)
        reward = jnp.asarray(generator.choice([-1.0, 0.3, 1.3], (b, g)), jnp.float32)
        return jax.block_until_ready((prompt, make_keys(config.seed, step, jnp.arange(b), g), compute_advantages(reward)))

    def run_step(step: int) -> dict[str, float]:
        nonlocal state
        prompt, keys, advantage = draw_inputs(step)
        started = time.perf_counter()
        sampled = jax.block_until_ready(rollout(state.trained, policy.frozen, prompt, length, keys))
        generated = time.perf_counter()
        group = GroupBatch(prompt, length, sampled.completion, sampled.completion_length)
        batch = jax.tree.map(lambda x: x[None], GrpoBatch(group, advantage, sampled.logp_raw, None))
        state, metrics, _ = jax.block_until_ready(update(state, policy.frozen, reference, batch))
        ended = time.perf_counter()
        if not bool(jnp.all(sampled.completion_length == c)) or not np.isfinite(float(metrics["loss"])):
            raise RuntimeError(f"step {step}: expected completions of {c} tokens and a finite loss; the numbers would be of other work")
        return {"generate_s": generated - started, "update_s": ended - generated, "step_s": ended - started}

    first = run_step(0)
    for step in range(1, WARMUP_STEPS):
        run_step(step)
    rows = [run_step(WARMUP_STEPS + i) for i in track(range(repeats), description="bench step", unit="step")]
    timing: dict[str, Any] = {name: _percentiles([row[name] for row in rows]) for name in rows[0]}
    # The first step compiles both programs; what is over a usual step is compilation (near 0 when the cache holds them).
    timing["compile_s"] = max(0.0, first["step_s"] - timing["step_s"]["p50"])
    shapes = {"prompts": b, "prompt_tokens": p, "group_size": g, "new_tokens": c, "vocabulary": vocab}
    return {"benchmark": "step", **timing, "repeats": repeats, "shapes": shapes, "provenance": collect_provenance(config)}
