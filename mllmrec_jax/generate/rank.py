"""Ranking: the K candidates of a user are a group of K continuations under one prompt."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from mllmrec_jax.config import LogprobConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.objectives.logprobs import completion_logprobs, encode_predicting


def score_candidates(model: Decoder, batch: GroupBatch, config: LogprobConfig, *, adapters: bool = True) -> Float[Array, "B K"]:
    """log pi(answer_k | prompt) of each candidate's whole answer, stop token included; `batch.completion` is [B, K, C]."""
    hidden = encode_predicting(model, batch, adapters=adapters)
    return jnp.sum(completion_logprobs(hidden, model.head_weight, batch, config).logp, axis=-1)
