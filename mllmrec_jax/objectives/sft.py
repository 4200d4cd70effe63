"""The SFT loss: next-token cross-entropy on the answer, and optionally on the history's item tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllmrec_jax.config import LogprobConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.qwen3 import Decoder, predicting_states
from mllmrec_jax.objectives.logprobs import completion_logprobs
from mllmrec_jax.sharding import vocab_sharding
from mllmrec_kernels.logprob_kl import compute_logprobs


def _history_targets(group: GroupBatch, history_mask: Array) -> Array:
    """[..., P - 1] bool: prompt tokens 1.. that carry a loss (the first token has nothing before it to predict it)."""
    inside = jnp.arange(1, group.prompt.shape[-1]) < group.prompt_length[..., None]
    return history_mask[..., 1:].astype(bool) & inside


def count_sft_tokens(group: GroupBatch, history_mask: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(answer tokens, history tokens) that carry a loss, over any leading axes."""
    answer = jnp.sum(group.completion_length)
    return answer.astype(jnp.float32), jnp.sum(_history_targets(group, history_mask)).astype(jnp.float32)


def compute_sft_sums(
    model: Decoder,
    batch: GroupBatch,
    history_mask: Array | None,
    config: LogprobConfig,
    *,
    dropout_key: Array | None = None,
    head_trainable: bool,
) -> dict[str, Float[Array, ""]]:
    """{"answer": sum of -log p over answer tokens, "history": over marked prompt tokens}; the answer is a group of G = 1 completions.

    `history_mask` [B, P] marks prompt tokens that carry a loss too; None leaves that part out.
    """
    head = model.head_weight
    backward = "recompute" if head_trainable else "accumulate"
    prompt_hidden, completion_hidden = model.encode_group(batch, dropout_key=dropout_key)
    hidden = predicting_states(prompt_hidden, completion_hidden, batch.prompt_length)
    sums = {"answer": -jnp.sum(completion_logprobs(hidden, head, batch, config, backward=backward).logp)}
    if history_mask is not None:
        with jax.named_scope("logprob"):
            history = compute_logprobs(
                prompt_hidden[:, :-1].reshape(-1, prompt_hidden.shape[-1]),
                head,
                batch.prompt[:, 1:].reshape(-1),
                mask=_history_targets(batch, history_mask).reshape(-1),
                backward=backward,
                implementation=config.implementation,
                chunk_tokens=config.chunk_tokens,
                sharding=vocab_sharding(),
            )
        sums["history"] = -jnp.sum(history.logp)
    return sums
