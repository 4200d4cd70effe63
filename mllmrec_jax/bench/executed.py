"""What XLA counts for a function, loops included.

XLA's cost analysis takes the body of a loop once, however often it runs. Here each loop's body is counted as a program of its own and
multiplied: a scan says its length, a while loop's is for the caller to say. XLA does not see into Triton kernels: a program that launches
one is not counted at all, rather than too low.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.extend
import numpy as np
from jax.interpreters import partial_eval


class Executed(NamedTuple):
    """By XLA's cost analysis, elementwise operations included."""

    flops: float
    bytes: float
    """Read and written by the instructions of the compiled program, caches between them left out; NaN where it was not given."""


def count_executed(function: Callable[..., Any], *args: Any, while_trips: int = 1, compiled: Any = None) -> Executed:
    """What XLA counts for `function` at the shapes of `args`; NaN where a Triton kernel is launched.

    FLOPs are of the program before the compiler's passes, on one device; called outside of a mesh, they are those of all devices together.
    Nothing is run, and without `compiled` nothing is compiled.

    Args:
      function: jitted or not.
      args: arrays or `jax.ShapeDtypeStruct`s.
      while_trips: how often the outermost while loops run; those within other loops count once.
      compiled: `function` compiled for `args` on one device, for the bytes; each loop's body is compiled once more, alone.
    """
    closed = _trace(function, args)
    if _launches_triton(closed.jaxpr):
        return Executed(np.nan, np.nan)

    def measure(part: Any) -> np.ndarray:
        lowered = _lower(part)
        if compiled is None:
            return np.array([_read_cost(lowered, "flops"), np.nan])
        return np.array([_read_cost(lowered, "flops"), _read_cost(compiled if part is closed else lowered.compile(), "bytes accessed")])

    return Executed(*map(float, _count(closed, measure, while_trips)))


def _trace(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The function's equations without those that no result needs, loops' carries among them: the compiler drops these too."""
    closed = jax.make_jaxpr(function)(*args)
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return jax.extend.core.ClosedJaxpr(needed, closed.consts)


def _count(closed: Any, measure: Callable[[Any], np.ndarray], while_trips: int) -> np.ndarray:
    """`measure` of a program whose loops run as often as they do; it takes each loop's body once."""
    total = measure(closed)
    for equation in _find_loops(closed.jaxpr, while_trips):
        body, trips = _read_loop(equation, while_trips)
        once = measure(body)
        total = total + trips * _count(body, lambda part, body=body, once=once: once if part is body else measure(part), 1) - once
    return total


def _read_loop(equation: Any, while_trips: int) -> tuple[Any, int]:
    if equation.primitive.name == "scan":
        return equation.params["jaxpr"], equation.params["length"]
    return equation.params["body_jaxpr"], while_trips


def _lower(closed: Any) -> Any:
    shapes = (jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type) for aval in closed.in_avals)
    return jax.jit(jax.extend.core.jaxpr_as_fun(closed), keep_unused=True).lower(*shapes)


def _read_cost(program: Any, name: str) -> float:
    cost: Any = program.cost_analysis()
    return float((cost or {}).get(name, 0.0))


def _find_loops(jaxpr: Any, while_trips: int) -> Iterator[Any]:
    """The outermost loops that run more than once, those within called functions and within other loops included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("scan", "while") and _read_loop(equation, while_trips)[1] != 1:
            yield equation
            continue
        for inner in _list_inner(equation):
            yield from _find_loops(inner, while_trips)


def _launches_triton(jaxpr: Any) -> bool:
    names = ("triton_kernel_call", "pure_callback")  # on a GPU, and in Triton's interpreter
    return any(equation.primitive.name in names or any(map(_launches_triton, _list_inner(equation))) for equation in jaxpr.eqns)


def _list_inner(equation: Any) -> list[Any]:
    """The functions an equation calls."""
    found = [inner for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(inner)]
    return [inner if isinstance(inner, jax.extend.core.Jaxpr) else inner.jaxpr for inner in found]


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def read_planned_memory(compiled: Any) -> dict[str, int] | None:
    """Bytes of one device by XLA's plan: arguments, outputs, outputs that take arguments' place, temporaries, and all at once (`peak`)."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    parts = {name: int(getattr(memory, f"{name}_size_in_bytes")) for name in ("argument", "output", "alias", "temp")}
    return {**parts, "peak": parts["argument"] + parts["output"] - parts["alias"] + parts["temp"]}
