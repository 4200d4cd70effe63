"""FLOPs by formula against XLA's count of the programs that are timed. Nothing is compiled: sizes may be those where products are all."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mllmrec_jax.bench.executed import count_executed
from mllmrec_jax.bench.flops import (
    Sizes,
    count_forward,
    count_parameters,
    count_rollout,
    count_sft,
    count_update,
    repeat_prompts,
    sum_work,
)
from mllmrec_jax.bench.kernels import JOBS, list_attention_kernels, make_logprob_kernel
from mllmrec_jax.config import GrpoConfig, LogprobConfig, LoraConfig, ModelConfig, RunConfig, SftConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.generate.rollout import make_keys
from mllmrec_jax.model.lora import LoraParam, add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.model.replay import Activations
from mllmrec_jax.model.sharded import make_abstract
from mllmrec_jax.train.grpo_loop import make_rollout
from mllmrec_jax.train.grpo_step import GrpoBatch, make_grpo_step
from mllmrec_jax.train.sft_step import SftBatch, make_sft_step
from mllmrec_jax.train.state import Policy, init_state, make_optimizer

MODEL = ModelConfig(num_layers=3, hidden_size=1024, intermediate_size=3072, num_heads=16, num_kv_heads=8, head_dim=128, dtype="float32")
MICRO = Sizes(prompts=2, prompt_tokens=384, group_size=6, new_tokens=32, vocabulary=8192)
LONG = Sizes(prompts=1, prompt_tokens=1200, group_size=9, new_tokens=120, vocabulary=4096)
"""Attention runs over blocks of queries, and the log-prob operation over chunks of rows."""
LORA = LoraConfig(rank=16, alpha=32.0)
CHUNKS = LogprobConfig(chunk_tokens=256)


def struct(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def describe_policy(model: ModelConfig, vocabulary: int, mode: str) -> Policy:
    def build() -> Decoder:
        decoder = Decoder(model, vocab_size=vocabulary, rngs=nnx.Rngs(0))
        if mode == "lora":
            add_adapters(decoder, LORA, rngs=nnx.Rngs(1))
        return decoder

    return Policy(*nnx.split(make_abstract(build), LoraParam if mode == "lora" else nnx.Param, ...))


def describe_group(leading: tuple[int, ...], sizes: Sizes) -> GroupBatch:
    b, p, g, c, _ = sizes
    shapes = (*leading, b, p), (*leading, b), (*leading, b, g, c), (*leading, b, g)
    return GroupBatch(*map(struct, shapes))  # type: ignore[arg-type]


def count_update_by_xla(model: ModelConfig, sizes: Sizes, grpo: GrpoConfig, *, reuse: bool = False) -> float:
    policy, a = describe_policy(model, sizes.vocabulary, grpo.mode), grpo.accumulation
    b, p, g, c, _ = sizes
    optimizer = make_optimizer(grpo.optimizer, 3)
    state = jax.eval_shape(lambda trained: init_state(trained, optimizer), policy.trained)
    kept = None
    if reuse:
        layers, d = model.num_layers, model.hidden_size
        shapes = (a, layers, b, p, d), (a, layers, b, g, c, d), (a, b, g, c, d)
        kept = Activations(*(struct(shape, jnp.float32) for shape in shapes))  # type: ignore[arg-type]
    rows = struct((a, b, g), jnp.float32), struct((a, b, g, c), jnp.float32)
    batch = GrpoBatch(describe_group((a,), sizes), *rows, None, kept)  # type: ignore[arg-type]
    reference = policy.trained if grpo.mode == "full" and grpo.beta > 0 else None
    return count_executed(make_grpo_step(policy, optimizer, grpo, CHUNKS), state, policy.frozen, reference, batch).flops


@pytest.mark.parametrize(
    ("sizes", "remat", "options", "reuse"),
    [
        (MICRO, "full", {}, False),
        (MICRO, "full", {"accumulation": 3}, True),
        (MICRO, "none", {"mode": "full"}, False),
        (MICRO, "dots", {"kl_estimator": "exact"}, False),
        (LONG, "dots", {}, False),
        (LONG, "full", {"mode": "full", "beta": 0.0}, False),
        (repeat_prompts(MICRO), "full", {}, False),
    ],
)
def test_update(sizes: Sizes, remat: Any, options: dict[str, Any], reuse: bool) -> None:
    model = dataclasses.replace(MODEL, remat=remat)
    grpo = GrpoConfig(**{"lora": LORA, "accumulation": 1, **options})
    formula = sum_work(count_update(model, sizes, grpo, CHUNKS, reuse=reuse))
    # What the formula leaves out (norms, softmax, optimizer) is elementwise.
    assert formula.flops <= count_update_by_xla(model, sizes, grpo, reuse=reuse) <= 1.02 * formula.flops
    assert formula.model_flops < formula.flops


@pytest.mark.parametrize("sizes", [MICRO, LONG, repeat_prompts(MICRO)])
def test_rollout(sizes: Sizes) -> None:
    model = dataclasses.replace(MODEL, max_position=2048)
    grpo = GrpoConfig(lora=LORA, max_new_tokens=sizes.new_tokens, reuse_rollout=False)
    policy = describe_policy(model, sizes.vocabulary, "lora")
    b, p, g, c, _ = sizes
    keys = jax.eval_shape(lambda: make_keys(0, 0, jnp.arange(b), g))
    function = make_rollout(policy, grpo, stop_ids=(), pad_id=0)
    counted = count_executed(function, policy.trained, policy.frozen, struct((b, p)), struct((b,)), keys, while_trips=c - 1).flops
    formula = count_rollout(model, sizes, lora=LORA)
    # Sampling is elementwise, over the whole vocabulary.
    assert formula.flops <= counted <= 1.03 * formula.flops


@pytest.mark.parametrize("sft", [SftConfig(accumulation=2), SftConfig(mode="full", accumulation=1, history_loss_weight=0.5)])
def test_sft(sft: SftConfig) -> None:
    sizes = MICRO._replace(group_size=1)
    policy = describe_policy(MODEL, sizes.vocabulary, sft.mode)
    optimizer = make_optimizer(sft.optimizer, 3)
    state = jax.eval_shape(lambda trained: init_state(trained, optimizer), policy.trained)
    mask = struct((sft.accumulation, sizes.prompts, sizes.prompt_tokens), jnp.uint8)
    batch = SftBatch(describe_group((sft.accumulation,), sizes), mask)  # type: ignore[arg-type]
    counted = count_executed(make_sft_step(policy, optimizer, sft, CHUNKS, seed=0), state, policy.frozen, batch).flops
    formula = sum_work(count_sft(MODEL, sizes, sft, CHUNKS))
    assert formula.flops <= counted <= 1.02 * formula.flops


@pytest.mark.parametrize("job", JOBS)
def test_logprob_jobs(job: str) -> None:
    config = RunConfig(model=MODEL, logprob=CHUNKS)
    for implementation in ("xla_chunked", "reference"):
        kernel = make_logprob_kernel(job, implementation, config, MICRO)
        counted = count_executed(kernel.function, *jax.eval_shape(kernel.draw, jax.random.key(0))).flops
        # The reference is differentiated as it stands: in full, with no product made twice.
        products = kernel.work.flops if implementation == "xla_chunked" else counted
        assert products <= counted <= 1.03 * products


@pytest.mark.parametrize("sizes", [MICRO, LONG])
def test_attention(sizes: Sizes) -> None:
    for kernel in list_attention_kernels(RunConfig(model=MODEL), sizes):
        counted = count_executed(kernel.function, *jax.eval_shape(kernel.draw, jax.random.key(0))).flops
        assert kernel.work.flops <= counted <= 1.06 * kernel.work.flops, kernel.name


def test_parameters_are_the_models() -> None:
    for family, tied in (("qwen3", True), ("qwen2", False), ("llama", True)):
        model = dataclasses.replace(MODEL, family=family, tie_embeddings=tied)
        state = nnx.state(make_abstract(lambda model=model: Decoder(model, vocab_size=512, rngs=nnx.Rngs(0))), nnx.Param)
        assert count_parameters(model, 512) == sum(leaf.size for leaf in jax.tree.leaves(state))


def test_repeating_prompts_costs_what_the_architecture_page_says() -> None:
    """At P = 1000, C = 128, G = 8 the trunk has 9024 / 2024 of the tokens; attention's quadratic part shifts the whole a little."""
    sizes = Sizes(1, 1000, 8, 128, 8192)
    assert repeat_prompts(sizes).tokens / sizes.tokens == sizes.unshared_tokens / sizes.tokens == 9024 / 2024
    ratio = count_forward(MODEL, repeat_prompts(sizes)).model_flops / count_forward(MODEL, sizes).model_flops
    assert ratio == pytest.approx(9024 / 2024, rel=0.1)
