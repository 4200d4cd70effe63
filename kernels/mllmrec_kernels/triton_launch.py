"""Runs a Triton kernel as a JAX operation: on an NVIDIA GPU through jax-triton, or in Triton's interpreter on the CPU (for tests).

TRITON_INTERPRET=1, set before a kernel's module is imported, chooses the interpreter. jax-triton imports only beside JAX's CUDA plugin, so
it is imported when a kernel is launched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DEVICE_VARIABLE = "MLLMREC_TRITON_DEVICE"
INTERPRETER = "interpreter"


class Launch(NamedTuple):
    """What a kernel was asked to run with."""

    kernel: Any
    pointers: dict[str, jax.ShapeDtypeStruct]
    """By parameter name, inputs then outputs."""
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]


_collected: list[Launch] | None = None


@contextlib.contextmanager
def collect_launches() -> Iterator[list[Launch]]:
    """Inside, launches are listed and not run; use it around `jax.eval_shape` to learn what an operation would launch."""
    global _collected
    _collected = launches = []
    try:
        yield launches
    finally:
        _collected = None


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def find_device() -> str:
    """What kernels are launched for: "interpreter", or an architecture such as "sm_90".

    MLLMREC_TRITON_DEVICE=sm_90 names it where there is no GPU to ask (lowering for CUDA on another machine).

    Raises:
      ValueError: no NVIDIA GPU, no interpreter and no name.
    """
    if is_interpreted():
        return INTERPRETER
    if named := os.environ.get(DEVICE_VARIABLE):
        return named
    if jax.default_backend() != "gpu":
        raise ValueError(
            "implementation 'triton': needs an NVIDIA GPU, the default backend is "
            f"{jax.default_backend()!r}; use 'xla_chunked', or TRITON_INTERPRET=1 to run the kernels slowly on the CPU"
        )
    return "sm_" + str(jax.devices()[0].compute_capability).replace(".", "")


def launch(
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    constants: Mapping[str, Any],
) -> list[jax.Array]:
    """Runs `kernel(*input pointers, *output pointers, **constants)` over `grid`; returns the outputs, uninitialised where not written."""
    if _collected is not None:
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs, *outputs)]
        pointers = dict(zip(kernel.arg_names, arrays, strict=False))  # the parameters after the arrays are constants
        _collected.append(Launch(kernel, pointers, dict(constants), num_warps, num_stages, grid))
        return [jnp.zeros(o.shape, o.dtype) for o in outputs]
    if not is_interpreted():
        import jax_triton  # type: ignore[import-not-found]

        return jax_triton.triton_call(
            *inputs,
            kernel=kernel,
            out_shape=list(outputs),
            grid=grid,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=int(find_device().removeprefix("sm_")),
            **constants,
        )

    def run(*arrays: Any) -> list[np.ndarray]:
        results = [np.full(o.shape, np.nan if jnp.issubdtype(o.dtype, jnp.floating) else 0, o.dtype) for o in outputs]
        kernel[grid](*(_HostArray(np.ascontiguousarray(a)) for a in arrays), *map(_HostArray, results), **constants)
        return results

    return list(jax.pure_callback(run, list(outputs), *inputs, vmap_method="sequential"))


class _HostArray:
    """A NumPy array in the few methods of a torch tensor that Triton's interpreter calls; it is its own storage, and never copied."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _HostArray:
        return self

    def new_empty(self, *_: Any, **__: Any) -> _HostArray:
        return _HostArray(self.array)

    def _same(self, *_: Any, **__: Any) -> _HostArray:
        return self

    cpu = set_ = copy_ = storage_offset = size = stride = _same
