"""One GRPO step on random weights, prompts and rewards, in parts that can be timed alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllmrec_jax.bench.flops import Sizes, count_rollout, count_update, sum_work
from mllmrec_jax.bench.work import Phase, check_work, compile_phase, copy_tree, draw_tokens, full_lengths, make_policy
from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.generate.rollout import Rollout, make_keys
from mllmrec_jax.objectives.advantages import compute_advantages
from mllmrec_jax.sharding import place_batch
from mllmrec_jax.train.grpo_loop import cut_activations, make_rollout
from mllmrec_jax.train.grpo_step import GrpoBatch, make_grpo_step
from mllmrec_jax.train.stage import start_state
from mllmrec_jax.train.state import make_optimizer

REWARDS = (-1.0, 0.3, 1.3)


class Prompts(NamedTuple):
    """All rows R of a step."""

    prompt: jax.Array
    """[R, P]"""
    length: jax.Array
    """[R]"""
    keys: jax.Array
    """[R, G]"""
    advantage: np.ndarray
    """[R, G] float32."""


class GrpoWork:
    """A policy, its optimizer state, and the functions of a step; inputs are drawn anew for every call.

    `micro` are the sizes of a micro-batch, of which a step has `grpo.accumulation`. With G = 1 they describe the repeated layout.
    """

    def __init__(self, config: RunConfig, micro: Sizes, *, steps: int):
        check_work(config, micro)
        grpo = config.grpo
        self.config, self.micro = config, micro
        self.sizes = micro._replace(prompts=micro.prompts * grpo.accumulation)
        self.policy = make_policy(config, mode=grpo.mode, lora=grpo.lora)
        optimizer = make_optimizer(grpo.optimizer, steps)
        self.state = start_state(self.policy.trained, optimizer)
        self.reference = copy_tree(self.policy.trained) if grpo.mode == "full" and grpo.beta > 0 else None
        self._rollout = make_rollout(self.policy, grpo, stop_ids=(), pad_id=0)
        self._update = make_grpo_step(self.policy, optimizer, grpo, config.logprob)
        self._generator = np.random.default_rng(config.seed)

    def draw_prompts(self, step: int) -> Prompts:
        """Ready on the device."""
        r, p, g, _, v = self.sizes
        prompt, length, row = place_batch([draw_tokens(self._generator, (r, p), v), full_lengths(r, p), np.arange(r, dtype=np.int32)])
        reward = self._generator.choice(REWARDS, (r, g)).astype(np.float32)
        advantage = np.asarray(compute_advantages(jnp.asarray(reward)))
        return jax.block_until_ready(Prompts(prompt, length, make_keys(self.config.seed, step, row, g), advantage))

    def draw_completions(self) -> Rollout:
        """What a rollout would have sampled, without one and without activations."""
        r, _, g, c, v = self.sizes
        tokens, lengths = draw_tokens(self._generator, (r, g, c), v), np.full((r, g), c, np.int32)
        logp = np.full((r, g, c), -np.log(v), np.float32)
        return Rollout(*place_batch((tokens, lengths, np.zeros((r, g), bool), logp, logp)))

    def rollout_arguments(self, prompts: Prompts) -> tuple[Any, ...]:
        """Of the program that generates."""
        return self.state.trained, self.policy.frozen, prompts.prompt, prompts.length, prompts.keys

    def update_arguments(self, prompts: Prompts, sampled: Rollout) -> tuple[Any, ...]:
        """Of the program that updates, which takes the state with it: the next is `take_update`'s."""
        accumulation, width = self.config.grpo.accumulation, self.micro.new_tokens
        rows = [prompts.prompt, prompts.length, sampled.completion, sampled.completion_length, prompts.advantage, sampled.logp_raw]
        micros = [np.asarray(x).reshape(accumulation, -1, *x.shape[1:]) for x in rows]
        *group, advantage, logp = place_batch(micros, leading=1)
        kept = sampled.activations
        kept = None if kept is None else cut_activations(kept, accumulation, 1, width)
        return self.state, self.policy.frozen, self.reference, GrpoBatch(GroupBatch(*group), advantage, logp, None, kept)

    def take_update(self, result: Any) -> None:
        """Keeps the new state of an update.

        Raises:
          RuntimeError: the loss is not finite.
        """
        self.state, metrics, _ = result
        if not np.isfinite(float(metrics["loss"])):
            raise RuntimeError(f"update: expected a finite loss, got {float(metrics['loss'])}; the numbers would be of other work")

    def check_rollout(self, sampled: Rollout) -> None:
        """Raises RuntimeError where a completion is shorter than it should be."""
        if not bool(jnp.all(sampled.completion_length == self.micro.new_tokens)):
            raise RuntimeError(f"rollout: expected completions of {self.micro.new_tokens} tokens; the numbers would be of other work")

    def compile_rollout(self, prompts: Prompts, **counts: bool) -> Phase:
        """The program that generates; its decoding loop runs to the last token, since nothing stops it; options as `compile_phase`."""
        grpo = self.config.grpo
        work = count_rollout(self.config.model, self.sizes, lora=grpo.lora if grpo.mode == "lora" else None)
        trips = self.micro.new_tokens - 1
        return compile_phase(self._rollout, *self.rollout_arguments(prompts), work=work, while_trips=trips, **counts)

    def compile_update(self, prompts: Prompts, sampled: Rollout, **counts: bool) -> Phase:
        """The program that updates, with or without the rollout's activations, as `sampled` has them; options as `compile_phase`."""
        reuse = sampled.activations is not None
        work = sum_work(count_update(self.config.model, self.micro, self.config.grpo, self.config.logprob, reuse=reuse))
        return compile_phase(self._update, *self.update_arguments(prompts, sampled), work=work, **counts)
