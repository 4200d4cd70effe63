"""The operation itself: chunks of rows, parts of the vocabulary, and the gradient, for any implementation of one chunk.

`backward="accumulate"` needs no second look at the vocabulary: for a frozen head,

    d log p_t / d h = (1 - p_t) (W_t - sum_{v != t} pi_v W_v) / T,        pi_v = p_v / (1 - p_t)

and the forward pass holds pi already, so it stores that direction ([N, D]) and the backward pass is elementwise: two passes over the
head's 2NDV FLOPs in all, where recomputing takes three. It gives the gradient of log p_t to `hidden` alone. `backward="recompute"` gives
every gradient, the head's too.

With a `VocabSharding`, every device sees its rows and its part of the vocabulary. What crosses devices is a few numbers a row
(`moments.Others`), hidden states where an axis cuts both, and one sum over the vocabulary of an [N, D] gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mllmrec_kernels.logprob_kl import xla_chunked
from mllmrec_kernels.logprob_kl.moments import Others, Rows, finish_rows, merge_parts
from mllmrec_kernels.logprob_kl.vocab_sharding import (
    VocabSharding,
    count_devices,
    first_token,
    gather_parts,
    gather_rows,
    keep_own_rows,
    look_up,
    sum_parts,
    sum_parts_of_own_rows,
    sum_rows,
)


class Options(NamedTuple):
    """Everything but arrays; see `api.compute_logprobs`."""

    temperature: float
    entropy: bool
    kl: bool
    backward: str
    implementation: str
    chunk_tokens: int
    sharding: VocabSharding | None


class RowInputs(NamedTuple):
    """Inputs of N rows."""

    hidden: jax.Array
    hidden_ref: jax.Array | None
    target: jax.Array


class Heads(NamedTuple):
    policy: jax.Array
    reference: jax.Array | None
    """None: the policy's."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def map_logprobs(rows: RowInputs, heads: Heads, options: Options) -> Rows:
    """Rows of `api.compute_logprobs`; `target` is in range and masked rows hold finite values."""
    return _on_mesh(_forward_part, options, rows, heads, direction=False)[0]


def _forward(rows: RowInputs, heads: Heads, options: Options) -> tuple[Rows, Any]:
    out, direction = _on_mesh(_forward_part, options, rows, heads, direction=options.backward == "accumulate")
    return out, (rows, heads, out, direction)


def _backward(options: Options, saved: Any, grads: Rows) -> tuple[RowInputs, Heads]:
    rows, heads, out, direction = saved
    zeros = jax.tree.map(jnp.zeros_like, heads)
    zero_ref = None if rows.hidden_ref is None else jnp.zeros_like(rows.hidden_ref)
    if direction is not None:
        d_hidden = (grads.logp[:, None] * direction.astype(jnp.float32)).astype(rows.hidden.dtype)
    else:
        wanted = Rows(grads.logp, out.log_rest, out.lse, grads.entropy if options.entropy else None, grads.kl if options.kl else None)
        d_hidden, d_head = _on_mesh(_backward_part, options, rows, heads, out, wanted)
        zeros = zeros._replace(policy=d_head)
    return RowInputs(d_hidden, zero_ref, None), zeros  # type: ignore[arg-type]  # integers have no gradient


map_logprobs.defvjp(_forward, _backward)


def _forward_part(rows: RowInputs, heads: Heads, options: Options, *, direction: bool) -> tuple[Rows, jax.Array | None]:
    """This device's rows against its part of the vocabulary; with `direction`, also d log p_t / d h in the dtype of hidden."""
    part, sharding = _implementation(options), options.sharding
    head, head_ref = heads.policy, heads.policy if heads.reference is None else heads.reference
    first = first_token(sharding, head.shape[0])
    scale = 1.0 / options.temperature

    def step(own: RowInputs) -> tuple[Rows, jax.Array | None]:
        row = gather_rows(sharding, own)

        def row_of(head: jax.Array) -> jax.Array:
            return look_up(sharding, head, row.target).astype(jnp.float32)

        def target_logit(hidden: jax.Array, head: jax.Array) -> jax.Array:
            # Scaled inside the sum: outside, the compiler may fuse it with what follows, and differently for policy and reference.
            return sum_parts(sharding, jnp.sum(hidden.astype(jnp.float32) * row_of(head) * scale, axis=-1))

        others, mean = part.compute_others(
            row.hidden,
            row.hidden_ref,
            head,
            head_ref,
            row.target - first,
            temperature=options.temperature,
            entropy=options.entropy,
            kl=options.kl,
            mean_head=direction,
        )
        local = others.lse
        parts = gather_parts(sharding, tuple(others))
        others = others if parts is None else merge_parts(Others(*parts))
        target_ref = None if row.hidden_ref is None else target_logit(row.hidden_ref, head_ref)
        out = keep_own_rows(sharding, finish_rows(others, target_logit(row.hidden, head), target_ref))
        if mean is None:
            return out, None
        weight = jnp.where(jnp.isneginf(local), 0, jnp.exp(local - others.lse))[:, None]
        pull = sum_parts_of_own_rows(sharding, row_of(head) - weight * mean) * (jnp.exp(out.log_rest) * scale)[:, None]
        return out, pull.astype(row.hidden.dtype)

    return _scan_chunks(lambda carry, own: (carry, step(own)), None, rows, _chunk_rows(options, head, holds_logits=direction))[1]


def _backward_part(rows: RowInputs, heads: Heads, out: Rows, grads: Rows, options: Options) -> tuple[jax.Array, jax.Array]:
    """(d hidden, d head): logits are computed again, chunk by chunk. The compiler leaves d head out where nobody asks for it."""
    part, sharding = _implementation(options), options.sharding
    head, head_ref = heads.policy, heads.policy if heads.reference is None else heads.reference
    first = first_token(sharding, head.shape[0])

    def step(d_head: jax.Array, own: tuple[RowInputs, Rows, Rows]) -> tuple[jax.Array, jax.Array]:
        row, out, grads = gather_rows(sharding, own)
        d_logits = part.compute_logit_gradient(
            row.hidden, row.hidden_ref, head, head_ref, row.target - first, out, grads, temperature=options.temperature
        )
        d_hidden = sum_parts_of_own_rows(sharding, jnp.dot(d_logits, head, preferred_element_type=jnp.float32))
        d_head += jax.lax.dot_general(d_logits, row.hidden, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return d_head, d_hidden.astype(row.hidden.dtype)

    zeros = jnp.zeros(head.shape, jnp.float32)
    d_head, d_hidden = _scan_chunks(step, zeros, (rows, out, grads), _chunk_rows(options, head, holds_logits=True))
    return d_hidden, sum_rows(sharding, d_head).astype(head.dtype)


def _chunk_rows(options: Options, head: jax.Array, *, holds_logits: bool) -> int:
    """Rows of this device a chunk; what is gathered from others counts."""
    rows = _implementation(options).chunk_rows(options.chunk_tokens, head.shape[0], head.dtype.itemsize, holds_logits=holds_logits)
    return rows if options.sharding is None else max(1, rows // count_devices(options.sharding, options.sharding.shared_axes))


def _implementation(options: Options) -> Any:
    """The module with this implementation's functions of one chunk."""
    if options.implementation == "xla_chunked":
        return xla_chunked
    from mllmrec_kernels.logprob_kl import triton_chunk  # Triton is installed beside GPUs only

    return triton_chunk


def _on_mesh(function: Callable[..., Any], options: Options, rows: RowInputs, heads: Heads, *more: Rows, **static: Any) -> Any:
    """`function` on this device, or by shard_map on every device of the mesh."""
    function = functools.partial(function, options=options, **static)
    if options.sharding is None:
        return function(rows, heads, *more)
    mesh, row_axes, vocab_axes = options.sharding
    by_row, by_vocab = PartitionSpec(row_axes or None), PartitionSpec(vocab_axes or None)
    # The gradient is taken outside: what is summed over which axis is written in the functions, not derived.
    outputs = (by_row, by_vocab) if more else (by_row, by_row)
    specs = (by_row, by_vocab, *(by_row for _ in more))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=outputs, check_vma=False)(rows, heads, *more)


def _scan_chunks(function: Callable[..., Any], carry: Any, rows: Any, chunk: int) -> tuple[Any, Any]:
    """Scans `function` over row chunks of `rows` (leading axis N) and joins the results; the last chunk is padded with zeros."""
    count = jax.tree.leaves(rows)[0].shape[0]
    if count <= chunk:
        return function(carry, rows)
    chunks = -(-count // chunk)
    padded = jax.tree.map(lambda a: jnp.pad(a, [(0, chunks * chunk - count)] + [(0, 0)] * (a.ndim - 1)), rows)
    split = jax.tree.map(lambda a: a.reshape(chunks, chunk, *a.shape[1:]), padded)
    carry, out = jax.lax.scan(function, carry, split)
    return carry, jax.tree.map(lambda a: a.reshape(chunks * chunk, *a.shape[2:])[:count], out)
