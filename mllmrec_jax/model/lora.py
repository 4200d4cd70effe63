"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): y = W x + alpha / rank * B (A x)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mllmrec_jax.config import LoraConfig


class LoraParam(nnx.Param):
    """A weight that belongs to an adapter: the type by which `nnx.split` tells adapters from the base."""


class LoraScale(nnx.Variable):
    """alpha / rank: carried with the base, never trained."""


def draw_normal(rngs: nnx.Rngs, shape: tuple[int, ...], *, scale: float) -> jax.Array:
    """Float32 from a normal distribution of deviation `scale`; the same bits compiled or not, on any mesh."""
    # Without the barrier a compiler folds `scale` into the constants of the inverse error function, which rounds differently.
    return jax.lax.optimization_barrier(jax.random.normal(rngs.params(), shape)) * scale


@jax.custom_vjp
def apply_adapter(
    x: Float[Array, "... i"], a: Float[Array, "i r"], b: Float[Array, "r o"], scale: Float[Array, ""]
) -> Float[Array, "... o"]:
    """(x A) B * scale in the dtype of x; `scale` is a constant.

    The gradients are those of the formula, written out for the order of their factors: with the wide one first, as derived, XLA's CPU
    backend transposes a copy of it, which took an eighth of a GRPO step.
    """
    return _apply_forward(x, a, b, scale)[0]


def _apply_forward(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    low = x @ a.astype(x.dtype)
    # Scaled last: a plain product would be summed into the base's, and adapters that are still zero would change its rounding.
    return (low @ b.astype(x.dtype)) * scale.astype(x.dtype), (x, low, a, b, scale)


def _apply_backward(residuals: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    x, low, a, b, scale = residuals
    low, low_gradient = (y * scale.astype(x.dtype) for y in (low, gradient @ b.astype(x.dtype).T))
    tokens = tuple(range(x.ndim - 1))

    def sum_tokens(narrow: jax.Array, wide: jax.Array) -> jax.Array:
        return jax.lax.dot_general(narrow, wide, ((tokens, tokens), ((), ())))

    return (
        low_gradient @ a.astype(x.dtype).T,
        sum_tokens(low_gradient, x).T.astype(a.dtype),
        sum_tokens(low, gradient).astype(b.dtype),
        None,
    )


apply_adapter.defvjp(_apply_forward, _apply_backward)


class Linear(nnx.Module):
    """y = x W (+ b) (+ adapter). Weights may carry leading stack axes; a scan over layers slices them off.

    Attributes:
      kernel: [..., in, out]; bias: [..., out] or None; lora_a: [..., in, rank]; lora_b: [..., rank, out].
      axes: logical axes of in and out (`sharding.RULES`).
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        *,
        axes: tuple[str, str],
        stack: tuple[int, ...],
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        shape = (*stack, fan_in, fan_out)
        self.axes = axes
        depth = (None,) * len(stack)
        kernel = draw_normal(rngs, shape, scale=fan_in**-0.5).astype(dtype)
        self.kernel = nnx.Param(kernel, axes=(*depth, *axes))
        self.bias = nnx.Param(jnp.zeros((*stack, fan_out), dtype), axes=(*depth, axes[1])) if bias else None
        self.lora_a: LoraParam | None = nnx.data(None)
        self.lora_b: LoraParam | None = nnx.data(None)
        self.lora_scale: LoraScale | None = nnx.data(None)

    def __call__(self, x: jax.Array, *, adapters: bool) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        if adapters and self.lora_a is not None and self.lora_b is not None and self.lora_scale is not None:
            y += apply_adapter(x, self.lora_a[...], self.lora_b[...], self.lora_scale[...])
        return y


def _linears(module: nnx.Module) -> Sequence[tuple[str, Linear]]:
    return [(str(path[-1]), node) for path, node in nnx.iter_graph(module) if isinstance(node, Linear)]


def add_adapters(module: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Adds float32 adapters in place to the linear layers named in `config.targets`; B starts at 0, so the function is unchanged."""
    for name, linear in _linears(module):
        if name not in config.targets:
            continue
        *stack, fan_in, fan_out = linear.kernel[...].shape
        a = draw_normal(rngs, (*stack, fan_in, config.rank), scale=fan_in**-0.5)
        depth = (None,) * len(stack)
        linear.lora_a = LoraParam(a, axes=(*depth, linear.axes[0], None))
        linear.lora_b = LoraParam(jnp.zeros((*stack, config.rank, fan_out)), axes=(*depth, None, linear.axes[1]))
        linear.lora_scale = LoraScale(jnp.full(tuple(stack), config.alpha / config.rank, jnp.float32))


def merge_adapters(module: nnx.Module) -> None:
    """Folds adapters into the kernels in place, in float32 before the one rounding to the kernel's dtype, and removes them."""
    for _, linear in _linears(module):
        if linear.lora_a is None or linear.lora_b is None or linear.lora_scale is None:
            continue
        delta = jnp.matmul(linear.lora_a[...], linear.lora_b[...], precision="highest") * linear.lora_scale[...][..., None, None]
        linear.kernel[...] = (linear.kernel[...].astype(jnp.float32) + delta).astype(linear.kernel[...].dtype)
        linear.lora_a = linear.lora_b = linear.lora_scale = None
