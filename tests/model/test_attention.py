"""Oracles: attention as its definition says, a row at a time in float64; rotary frequencies as transformers computes them."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mllmrec_jax.config import RopeScalingConfig
from mllmrec_jax.model import attention
from mllmrec_jax.model.attention import NO_ROPE_SCALING, attend_cached, attend_group, attend_prompt, rotary_frequencies, rotate

THETA = 1000.0


def draw(seed: int, *shapes: tuple[int, ...], scale: float = 1.0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def attend_one(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q K^T / sqrt(d)) V of one query of one head: q [d], k and v [n, d]."""
    scores = k.astype(np.float64) @ q.astype(np.float64) / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ v.astype(np.float64)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_prompt_attention_is_causal_softmax(heads: int, kv_heads: int) -> None:
    b, p, d = 2, 5, 6
    q, k, v = map(np.asarray, draw(0, (b, p, heads, d), (b, p, kv_heads, d), (b, p, kv_heads, d)))
    got = np.asarray(jax.jit(attend_prompt)(q, k, v))
    for row, t, h in np.ndindex(b, p, heads):
        shared = h // (heads // kv_heads)
        expected = attend_one(q[row, t, h], k[row, : t + 1, shared], v[row, : t + 1, shared])
        np.testing.assert_allclose(got[row, t, h], expected, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_group_attention_is_softmax_over_prompt_and_own_past(heads: int, kv_heads: int) -> None:
    b, g, c, p, d = 2, 3, 4, 5, 6
    kv = (b, g, c, kv_heads, d), (b, g, c, kv_heads, d), (b, p, kv_heads, d), (b, p, kv_heads, d)
    arrays = draw(1, (b, g, c, heads, d), *kv)
    length = np.array([5, 2])
    got = np.asarray(jax.jit(attend_group)(*arrays, jnp.array(length)))
    q, k, v, prompt_k, prompt_v = map(np.asarray, arrays)
    for row, member, t, h in np.ndindex(b, g, c, heads):
        s, n = h // (heads // kv_heads), length[row]
        keys = np.concatenate([prompt_k[row, :n, s], k[row, member, : t + 1, s]])
        values = np.concatenate([prompt_v[row, :n, s], v[row, member, : t + 1, s]])
        np.testing.assert_allclose(got[row, member, t, h], attend_one(q[row, member, t, h], keys, values), atol=2e-6)


def test_one_row_at_a_time_equals_all_rows() -> None:
    b, g, c, p = 2, 3, 4, 5
    q, k, v, prompt_k, prompt_v = draw(2, (b, g, c, 4, 6), (b, g, c, 2, 6), (b, g, c, 2, 6), (b, p, 2, 6), (b, p, 2, 6))
    length = jnp.array([5, 2])
    whole = jax.jit(attend_group)(q, k, v, prompt_k, prompt_v, length)
    attend = jax.jit(attend_cached)
    k, v = (jnp.moveaxis(x, 3, 1) for x in (k, v))  # the cache has its heads first
    prompt_k, prompt_v = (jnp.swapaxes(x, 1, 2) for x in (prompt_k, prompt_v))
    for t in range(c):
        # Slots of the cache that are not written yet hold anything at all.
        garbage = jnp.where(jnp.arange(c)[:, None] <= t, k, 1e4)
        row = attend(q[:, :, t], garbage, v, prompt_k, prompt_v, length, jnp.int32(t))
        np.testing.assert_allclose(row, whole[:, :, t], atol=1e-6)


@pytest.mark.parametrize("block", [2, 4, 12])
def test_query_blocks_change_neither_values_nor_gradients(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    b, g, c, p = 2, 5, 3, 9
    arrays = draw(3, (b, p, 4, 6), (b, p, 2, 6), (b, p, 2, 6), (b, g, c, 4, 6), (b, g, c, 2, 6), (b, g, c, 2, 6))
    weights = draw(4, (b, p, 4, 6), (b, g, c, 4, 6))

    def run(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        q, k, v, group_q, group_k, group_v = arrays
        out = attend_prompt(q, k, v), attend_group(group_q, group_k, group_v, k, v, jnp.array([9, 4]))
        return sum((jnp.vdot(o, w) for o, w in zip(out, weights, strict=True)), jnp.float32(0)), out

    def value_and_grad() -> tuple[tuple[jax.Array, tuple[jax.Array, jax.Array]], tuple[jax.Array, ...]]:
        return jax.jit(jax.value_and_grad(lambda *a: run(*a), argnums=tuple(range(6)), has_aux=True))(*arrays)

    (_, expected), expected_grads = value_and_grad()
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(attention, "PROMPT_BLOCK", block)
    (_, got), grads = value_and_grad()
    for a, b_ in zip((*got, *grads), (*expected, *expected_grads), strict=True):
        np.testing.assert_allclose(a, b_, atol=3e-6)


def test_large_scores_and_fully_hidden_prompts_stay_finite() -> None:
    q, k, v, prompt_k, prompt_v = draw(5, (1, 2, 3, 2, 4), (1, 2, 3, 2, 4), (1, 2, 3, 2, 4), (1, 4, 2, 4), (1, 4, 2, 4), scale=1e3)
    gradients = jax.jit(jax.grad(lambda *arrays: jnp.sum(attend_group(*arrays)), argnums=(0, 1, 2, 3, 4)))
    for length in (0, 4):
        grads = gradients(q, k, v, prompt_k, prompt_v, jnp.array([length]))
        assert all(np.isfinite(grad).all() for grad in grads)


def test_bfloat16_in_bfloat16_out_near_float32() -> None:
    arrays = draw(6, (2, 9, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16))
    attend = jax.jit(attend_prompt)
    half = attend(*(x.astype(jnp.bfloat16) for x in arrays))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), attend(*arrays), atol=0.05)


def test_rotation_keeps_lengths_and_sees_only_distances() -> None:
    q, k = draw(7, (1, 1, 8), (1, 1, 8))
    turn = jax.jit(lambda x, position: rotate(x, position, theta=THETA))
    at = lambda x, position: np.asarray(turn(x, jnp.array([position])))  # noqa: E731
    np.testing.assert_array_equal(at(q, 0), q)
    for position in (1, 17, 500):
        np.testing.assert_allclose(np.linalg.norm(at(q, position)), np.linalg.norm(q), rtol=1e-5)
    for shift in (1, 40, 300):
        for i, j in ((3, 9), (9, 3), (5, 5)):
            np.testing.assert_allclose(np.vdot(at(q, i), at(k, j)), np.vdot(at(q, i + shift), at(k, j + shift)), atol=1e-3)
    assert abs(float(np.vdot(at(q, 3), at(k, 9))) - float(np.vdot(at(q, 3), at(k, 10)))) > 1e-2


def test_rotation_turns_each_half_pair_by_its_frequency() -> None:
    frequency = np.asarray(rotary_frequencies(8, theta=THETA, scaling=NO_ROPE_SCALING))
    np.testing.assert_allclose(frequency, THETA ** (-np.array([0, 2, 4, 6]) / 8), rtol=1e-6)
    (x,) = map(np.asarray, draw(8, (1, 1, 8)))
    got = np.asarray(rotate(jnp.array(x), jnp.array([5]), theta=THETA))[0, 0]
    pairs = (x[0, 0, :4] + 1j * x[0, 0, 4:]) * np.exp(5j * frequency)
    np.testing.assert_allclose(got, np.concatenate([pairs.real, pairs.imag]), atol=1e-5)


@pytest.mark.parametrize(("factor", "low", "high", "original"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 3.0, 64)])
def test_llama3_frequencies_are_those_of_transformers(factor: float, low: float, high: float, original: int) -> None:
    pytest.importorskip("torch", reason="transformers computes the frequencies with torch")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    config = LlamaConfig(head_dim=128, rope_parameters=rope, max_position_embeddings=131072)
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](config, device=None)
    assert scale == 1.0
    scaling = RopeScalingConfig(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position=original)
    got = np.asarray(rotary_frequencies(128, theta=500_000.0, scaling=scaling))
    np.testing.assert_allclose(got, expected.numpy(), rtol=3e-6)
    plain = np.asarray(rotary_frequencies(128, theta=500_000.0, scaling=NO_ROPE_SCALING))
    np.testing.assert_allclose(got[0], plain[0])
    np.testing.assert_allclose(got[-1], plain[-1] / factor, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 384, 1000, 2048, 2049, 9000])
def test_blocks_of_a_prompt_are_few_and_leave_no_row_out(size: int) -> None:
    blocks = attention.cut_prompt(size)
    assert [row for start, end in blocks for row in range(start, end)] == list(range(size))
    assert len(blocks) <= attention.MAX_PROMPT_BLOCKS


@pytest.mark.parametrize("block", [8, 512])
def test_no_scores_are_transposed(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward pass transpose queries, keys, values and outputs, which are narrow, and never scores, which are wide."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(attention, "PROMPT_BLOCK", block)
    b, g, c, p, h, kv, d = 2, 3, 8, 64, 4, 2, 4
    kv_shapes = (b, g, c, kv, d), (b, g, c, kv, d), (b, p, kv, d), (b, p, kv, d)
    q, *own = draw(9, (b, g, c, h, d), *kv_shapes)
    (prompt_q,) = draw(10, (b, p, h, d))

    def run(prompt_q: jax.Array, *arrays: jax.Array) -> jax.Array:
        q, k, v, prompt_k, prompt_v = arrays
        group = attend_group(q, k, v, prompt_k, prompt_v, jnp.array([p, 9]))
        return jnp.sum(attend_prompt(prompt_q, prompt_k, prompt_v)) + jnp.sum(group)

    program = jax.jit(jax.grad(run, argnums=range(6))).lower(prompt_q, q, *own).as_text()
    shapes = re.findall(r"stablehlo\.transpose .*-> tensor<([\dx]+)xf32>", program)
    assert shapes and max(math.prod(map(int, shape.split("x"))) for shape in shapes) <= b * max(p, g * c) * h * d


def test_scores_that_causality_hides_are_not_made() -> None:
    """Of 512 x 512 scores, four blocks of 128 rows make 10 of 16 parts."""
    arrays = draw(8, (1, 512, 1, 64), (1, 512, 1, 64), (1, 512, 1, 64))
    cost = jax.jit(attend_prompt).lower(*arrays).compile().cost_analysis()
    assert cost is not None and cost["flops"] == pytest.approx(10 / 16 * 4 * 512 * 512 * 64, rel=0.08)
