"""Chunked XLA version: at most `chunk_tokens` rows of logits exist at a time, forward and backward.

With z = h W^T / T, p = softmax(z), the gradients with respect to the logits are

    d logp_t  = onehot(t) - p
    d entropy = -p (log p + H)
    d KL(p|q) =  p (log p - log q - KL)          (q is a constant)

`backward="accumulate"` needs no second look at the vocabulary: for a frozen head, d logp_t / d h = (W_t - sum_v p_v W_v) / T, and the
forward pass already holds p, so it stores that direction ([N, D]) and the backward pass is elementwise. Two passes over the head's
2NDV FLOPs in all, where recomputing takes three. It gives the gradient of logp alone. `backward="recompute"` gives every gradient,
the head's too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _map_chunks(function: Callable[..., Any], arrays: tuple[Any, ...], chunk: int) -> Any:
    """Applies `function` to row chunks of `arrays` (leading axis N) one after another and joins the results."""
    rows = jax.tree.leaves(arrays)[0].shape[0]
    if rows <= chunk:
        return function(*arrays)
    count = -(-rows // chunk)
    padded = jax.tree.map(lambda a: jnp.pad(a, [(0, count * chunk - rows)] + [(0, 0)] * (a.ndim - 1)), arrays)
    split = jax.tree.map(lambda a: a.reshape(count, chunk, *a.shape[1:]), padded)
    out = jax.lax.map(lambda args: function(*args), split)
    return jax.tree.map(lambda a: a.reshape(count * chunk, *a.shape[2:])[:rows], out)


def _logits(hidden: jax.Array, head: jax.Array, temperature: float) -> jax.Array:
    logits = jax.lax.dot_general(hidden, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return logits * (1.0 / temperature)


def _pick(values: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, target[:, None], axis=1)[:, 0]


def _is_target(target: jax.Array, head: jax.Array) -> jax.Array:
    """[N, V] bool."""
    return jnp.arange(head.shape[0])[None, :] == target[:, None]


def _forward_chunk(
    hidden: jax.Array,
    hidden_ref: jax.Array | None,
    target: jax.Array,
    *,
    head: jax.Array,
    head_ref: jax.Array,
    temperature: float,
    entropy: bool,
    kl: bool,
    direction: bool,
) -> dict[str, jax.Array]:
    logits = _logits(hidden, head, temperature)
    lse = jax.nn.logsumexp(logits, axis=-1)
    out = {"logp": _pick(logits, target) - lse}
    p = jnp.exp(logits - lse[:, None])  # the compiler drops it where nothing reads it
    if entropy:
        out["entropy"] = jnp.sum(p * (lse[:, None] - logits), axis=-1)  # lse outside the sum would cancel against it where p is near 1
    if hidden_ref is not None:
        logits_ref = _logits(hidden_ref, head_ref, temperature)
        lse_ref = jax.nn.logsumexp(logits_ref, axis=-1)
        out["logp_ref"] = _pick(logits_ref, target) - lse_ref
        if kl:
            out["kl"] = jnp.sum(p * ((logits - lse[:, None]) - (logits_ref - lse_ref[:, None])), axis=-1)
    if direction:
        # d logp / d h = (1 - p_t) W_t - sum_{v != t} p_v W_v: with the target apart nothing cancels when p_t is near 1.
        others = jnp.where(_is_target(target, head), 0, p)
        mean_others = jnp.dot(others.astype(head.dtype), head, preferred_element_type=jnp.float32)
        out["direction"] = jnp.sum(others, axis=-1, keepdims=True) * head[target].astype(jnp.float32) - mean_others
    return out


def _map_forward(hidden, hidden_ref, head, head_ref, target, temperature, entropy, kl, direction, chunk):
    """The forward pass over row chunks; with `direction`, also what the accumulate backward needs."""
    forward = functools.partial(
        _forward_chunk,
        head=head,
        head_ref=head if head_ref is None else head_ref,
        temperature=temperature,
        entropy=entropy,
        kl=kl,
        direction=direction,
    )
    return _map_chunks(forward, (hidden, hidden_ref, target), chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def logprobs_chunked(
    hidden: jax.Array,
    hidden_ref: jax.Array | None,
    head: jax.Array,
    head_ref: jax.Array | None,
    target: jax.Array,
    temperature: float,
    entropy: bool,
    kl: bool,
    backward: str,
    chunk: int,
) -> dict[str, jax.Array]:
    """See `api.compute_logprobs`; `target` is in range and rows are already masked."""
    del backward  # chosen when a gradient is taken
    return _map_forward(hidden, hidden_ref, head, head_ref, target, temperature, entropy, kl, False, chunk)


def _forward(hidden, hidden_ref, head, head_ref, target, temperature, entropy, kl, backward, chunk):
    out = _map_forward(hidden, hidden_ref, head, head_ref, target, temperature, entropy, kl, backward == "accumulate", chunk)
    direction = out.pop("direction", None)
    return out, (hidden, hidden_ref, head, head_ref, target, direction)


def _backward(temperature, entropy, kl, backward, chunk, saved, grads):
    hidden, hidden_ref, head, head_ref, target, direction = saved
    zero_ref, zero_head_ref = (None if x is None else jnp.zeros_like(x) for x in (hidden_ref, head_ref))
    head_ref = head if head_ref is None else head_ref
    if backward == "accumulate":
        d_hidden = grads["logp"][:, None] * direction * (1.0 / temperature)
        return d_hidden.astype(hidden.dtype), zero_ref, jnp.zeros_like(head), zero_head_ref, None

    def logit_gradient(hidden, hidden_ref, target, grads):
        logits = _logits(hidden, head, temperature)
        log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        p = jnp.exp(log_p)
        onehot = _is_target(target, head)
        others = jnp.where(onehot, 0, p)
        d_logits = grads["logp"][:, None] * jnp.where(onehot, jnp.sum(others, axis=-1, keepdims=True), -others)
        if entropy:
            d_logits -= grads["entropy"][:, None] * p * (log_p - jnp.sum(p * log_p, axis=-1, keepdims=True))
        if kl:
            logits_ref = _logits(hidden_ref, head_ref, temperature)
            ratio = log_p - (logits_ref - jax.nn.logsumexp(logits_ref, axis=-1, keepdims=True))
            d_logits += grads["kl"][:, None] * p * (ratio - jnp.sum(p * ratio, axis=-1, keepdims=True))
        return (d_logits * (1.0 / temperature)).astype(head.dtype)

    def step(d_head, rows):
        d_logits = logit_gradient(*rows)
        d_hidden = jnp.dot(d_logits, head, preferred_element_type=jnp.float32)
        d_head += jax.lax.dot_general(d_logits, rows[0], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return d_head, d_hidden.astype(hidden.dtype)

    rows = (hidden, hidden_ref, target, {name: grads[name] for name in ("logp", "entropy", "kl") if name in grads})
    d_head = jnp.zeros(head.shape, jnp.float32)
    count = -(-hidden.shape[0] // chunk)
    if count == 1:
        d_head, d_hidden = step(d_head, rows)
    else:
        total = count * chunk
        rows = jax.tree.map(lambda a: jnp.pad(a, [(0, total - a.shape[0])] + [(0, 0)] * (a.ndim - 1)), rows)
        rows = jax.tree.map(lambda a: a.reshape(count, chunk, *a.shape[1:]), rows)
        d_head, d_hidden = jax.lax.scan(step, d_head, rows)
        d_hidden = d_hidden.reshape(total, -1)[: hidden.shape[0]]
    return d_hidden, zero_ref, d_head.astype(head.dtype), zero_head_ref, None


logprobs_chunked.defvjp(_forward, _backward)
