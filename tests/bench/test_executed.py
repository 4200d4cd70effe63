"""XLA's count with loops: a loop costs what its unrolled program costs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mllmrec_jax.bench.executed import count_executed, read_planned_memory

X, WEIGHTS = jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((6, 64, 64), jnp.float32)
PRODUCT = 2 * 8 * 64 * 64


def scanned(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def unrolled(x: jax.Array, weights: jax.Array) -> jax.Array:
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, lambda f: lambda *args: jax.grad(lambda *a: f(*a).sum())(*args)])
def test_a_scan_counts_as_its_unrolled_program(wrap: Any) -> None:
    # The counters of the loops are a few FLOPs.
    assert count_executed(wrap(scanned), X, WEIGHTS).flops == pytest.approx(count_executed(wrap(unrolled), X, WEIGHTS).flops, rel=1e-3)


def test_loops_in_loops_and_loops_of_one() -> None:
    def twice(x: jax.Array, weights: jax.Array, times: int) -> jax.Array:
        return jax.lax.scan(lambda x, _: (scanned(x, weights), None), x, None, length=times)[0]

    for times in (1, 5):
        counted = count_executed(lambda x, w, times=times: twice(x, w, times), X, WEIGHTS).flops
        assert counted == pytest.approx(times * 6 * PRODUCT, rel=0.02)


def test_a_while_loop_runs_as_often_as_it_is_told() -> None:
    def loop(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda carry: carry.sum() < 1e9, lambda carry: scanned(carry, weights), x)

    once, nine = (count_executed(loop, X, WEIGHTS, while_trips=trips).flops for trips in (1, 9))
    assert once == pytest.approx(6 * PRODUCT, rel=0.02)
    assert nine == pytest.approx(9 * once, rel=0.01)


def test_bytes_grow_with_the_trips() -> None:
    def count(length: int) -> float:
        weights = jax.ShapeDtypeStruct((length, 64, 64), jnp.float32)
        return count_executed(scanned, X, weights, compiled=jax.jit(scanned).lower(X, weights).compile()).bytes

    few, many = count(10), count(40)
    # Every trip reads its weights at least, and no trip costs more than a copy and a use of them.
    assert 30 * 64 * 64 * 4 <= many - few <= 4 * 30 * 64 * 64 * 4


def test_planned_memory_has_the_arguments_in_it() -> None:
    memory = read_planned_memory(jax.jit(scanned).lower(X, WEIGHTS).compile())
    assert memory is not None
    assert memory["argument"] == 4 * (8 * 64 + 6 * 64 * 64)
    assert memory["peak"] >= memory["argument"] + memory["output"]
