"""One function for per-token log-prob, entropy and KL; the implementation is chosen by name and never falls back."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mllmrec_kernels.logprob_kl.logprobs import Heads, Options, RowInputs, map_logprobs
from mllmrec_kernels.logprob_kl.moments import Rows
from mllmrec_kernels.logprob_kl.reference import compute_logprobs_reference
from mllmrec_kernels.logprob_kl.vocab_sharding import VocabSharding, count_devices
from mllmrec_kernels.triton_launch import find_device, is_interpreted

Implementation = Literal["triton", "xla_chunked", "reference"]
Backward = Literal["accumulate", "recompute"]


class LogprobOutput(NamedTuple):
    """Float32 [N] each, 0 where masked; None where not asked for."""

    logp: Array
    logp_ref: Array | None
    entropy: Array | None
    kl: Array | None


def compute_logprobs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    target: Int[Array, " N"],
    *,
    mask: Bool[Array, " N"] | None = None,
    hidden_ref: Float[Array, "N D"] | None = None,
    head_ref: Float[Array, "V D"] | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    kl: bool = False,
    backward: Backward = "recompute",
    implementation: Implementation = "xla_chunked",
    chunk_tokens: int = 1024,
    sharding: VocabSharding | None = None,
) -> LogprobOutput:
    """log softmax(hidden head^T / temperature) at `target`, and what GRPO needs beside it.

    Args:
      hidden: policy hidden states, any float dtype.
      head: output head; serves policy and reference where `head_ref` is None (the reference is the policy without adapters).
      target: token ids in [0, V); ids of masked rows may be anything.
      mask: rows that count; others give 0 and no gradient, whatever they hold (NaN included).
      hidden_ref: reference hidden states; taken as constants.
      head_ref: the reference's own head, a constant, where every weight is trained and the reference is a copy.
      temperature: divides the logits of policy and reference.
      entropy: also return -sum_v p_v log p_v.
      kl: also return the exact sum_v p_v (log p_v - log q_v); needs `hidden_ref`.
      backward: "accumulate": gradient of logp to `hidden` only (frozen head; entropy and kl are constants), two passes over the head's
        FLOPs in all; "recompute": every gradient, head included, at one pass more (two with the head's).
      implementation: "triton" (NVIDIA GPU) holds no logits in the forward pass and a bounded chunk in the backward pass, "xla_chunked"
        holds [chunk_tokens, V] of them at a time, "reference" holds [N, V]. Never replaced by another.
      chunk_tokens: rows of logits that "xla_chunked" holds at a time.
      sharding: where rows and vocabulary lie on a mesh; None is one device (or, for "reference", whatever the compiler derives).

    Raises:
      ValueError: shapes, options or the implementation's name do not fit, or there is no device for "triton".
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"hidden and head: must be [N, D] and [V, D], were {hidden.shape} and {head.shape}")
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target: must be [N] = {hidden.shape[:1]}, was {target.shape}")
    if mask is not None and mask.shape != target.shape:
        raise ValueError(f"mask: must be [N] = {target.shape}, was {mask.shape}")
    if hidden_ref is not None and hidden_ref.shape != hidden.shape:
        raise ValueError(f"hidden_ref: must be {hidden.shape} like hidden, was {hidden_ref.shape}")
    if head_ref is not None and head_ref.shape != head.shape:
        raise ValueError(f"head_ref: must be {head.shape} like head, was {head_ref.shape}")
    if kl and hidden_ref is None:
        raise ValueError("kl: the exact KL needs hidden_ref, was None")
    if not temperature > 0:
        raise ValueError(f"temperature: must be positive, was {temperature}")
    if backward not in ("accumulate", "recompute"):
        raise ValueError(f"backward: must be 'accumulate' or 'recompute', was {backward!r}")

    if sharding is not None:
        _check_sharding(sharding, hidden.shape[0], head.shape[0])

    if mask is not None:
        hidden = jnp.where(mask[:, None], hidden, 0)
        hidden_ref = None if hidden_ref is None else jnp.where(mask[:, None], hidden_ref, 0)
        target = jnp.where(mask, target, 0)
    if hidden_ref is not None:
        hidden_ref, head_ref = jax.lax.stop_gradient((hidden_ref, head_ref))

    if implementation == "reference":
        logp, logp_ref, entropy_N, kl_N = compute_logprobs_reference(hidden, hidden_ref, head, head_ref, target, temperature=temperature)
    elif implementation in ("triton", "xla_chunked"):
        options = Options(temperature, entropy, kl, backward, implementation, chunk_tokens, sharding)
        out: Rows = map_logprobs(RowInputs(hidden, hidden_ref, target.astype(jnp.int32)), Heads(head, head_ref), options)
        logp, logp_ref, entropy_N, kl_N = out.logp, out.logp_ref, out.entropy, out.kl
    else:
        raise ValueError(f"implementation: must be 'triton', 'xla_chunked' or 'reference', was {implementation!r}")

    def finish(values: jax.Array | None, *, wanted: bool, constant: bool) -> jax.Array | None:
        if values is None or not wanted:
            return None
        values = jax.lax.stop_gradient(values) if constant else values
        return values if mask is None else jnp.where(mask, values, 0)

    accumulate = backward == "accumulate"
    return LogprobOutput(
        logp=finish(logp, wanted=True, constant=False),  # type: ignore[arg-type]
        logp_ref=finish(logp_ref, wanted=True, constant=True),
        entropy=finish(entropy_N, wanted=entropy, constant=accumulate),
        kl=finish(kl_N, wanted=kl, constant=accumulate),
    )


def check_implementation(implementation: str) -> None:
    """Raises before anything is computed where `implementation` cannot run here.

    Raises:
      ValueError: "triton" without an NVIDIA GPU or without its packages.
    """
    if implementation == "triton":
        find_device()
        missing = [name for name in ("triton", "jax_triton") if find_spec(name) is None and not (is_interpreted() and name == "jax_triton")]
        if missing:
            raise ValueError(f"implementation 'triton': {' and '.join(missing)} not installed; pip install 'mllmrec-jax[gpu]'")


def _check_sharding(sharding: VocabSharding, tokens: int, vocabulary: int) -> None:
    rows, parts = (count_devices(sharding, axes) for axes in (sharding.row_axes, sharding.vocab_axes))
    if tokens % rows:
        raise ValueError(f"sharding: N = {tokens} rows do not divide over {rows} devices of the axes {sharding.row_axes}")
    if vocabulary % parts:
        raise ValueError(f"sharding: a vocabulary of {vocabulary} does not divide over {parts} devices of the axes {sharding.vocab_axes}")
