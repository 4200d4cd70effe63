"""Log-probs of a group batch: one trunk pass a prompt, then the fused log-prob operation on predicting states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mllmrec_jax.config import ConfigError, LogprobConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.qwen3 import Decoder, predicting_states
from mllmrec_jax.sharding import vocab_sharding
from mllmrec_kernels.logprob_kl import LogprobOutput, check_implementation, compute_logprobs


def check_logprob(config: LogprobConfig) -> None:
    """Raises ConfigError where the implementation asked for cannot run here."""
    try:
        check_implementation(config.implementation)
    except ValueError as error:
        raise ConfigError(f"logprob.implementation: {error}") from error


def completion_mask(batch: GroupBatch) -> jax.Array:
    """[B, G, C] bool: the completion's real tokens."""
    return jnp.arange(batch.completion.shape[-1]) < batch.completion_length[..., None]


def encode_predicting(model: Decoder, batch: GroupBatch, *, adapters: bool) -> jax.Array:
    """[B, G, C, D]: the state that predicts each completion token."""
    prompt_hidden, completion_hidden = model.encode_group(batch, adapters=adapters)
    return predicting_states(prompt_hidden, completion_hidden, batch.prompt_length)


def encode_predicting_pair(model: Decoder, batch: GroupBatch) -> tuple[jax.Array, jax.Array]:
    """[B, G, C, D] of the policy and of the reference, its adapters off, which is a constant."""
    policy, reference = (predicting_states(*hidden, batch.prompt_length) for hidden in model.encode_with_reference(batch))
    return policy, jax.lax.stop_gradient(reference)


def completion_logprobs(
    hidden: jax.Array, head: jax.Array, batch: GroupBatch, config: LogprobConfig, *, hidden_ref: jax.Array | None = None, **options: Any
) -> LogprobOutput:
    """Per-token outputs [B, G, C] (0 past each completion's end) from predicting states [B, G, C, D]; options as `compute_logprobs`."""
    shape = batch.completion.shape

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[3:])

    with jax.named_scope("logprob"):
        out = compute_logprobs(
            flat(hidden),
            head,
            flat(batch.completion),
            mask=flat(completion_mask(batch)),
            hidden_ref=None if hidden_ref is None else flat(hidden_ref),
            implementation=config.implementation,
            chunk_tokens=config.chunk_tokens,
            sharding=vocab_sharding(),
            **options,
        )
    return jax.tree.map(lambda x: x.reshape(shape), out)
