"""Embedding rows for tokens that were added to a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.sharding import constrain


def set_item_rows(model: Decoder, first_row: int, texts: Sequence[Sequence[int]]) -> None:
    """Sets row `first_row + i` of the embedding (and of a separate head) to the mean of the rows of `texts[i]`, in place.

    An item token starts where its own text already lies, so that a pretrained model reads it from the first step (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models", with the item's tokens in place of the whole vocabulary).

    Raises:
      ValueError: the embedding has too few rows.
    """
    last = first_row + len(texts)
    if last > model.vocab_size:
        raise ValueError(f"texts: must fit into the {model.vocab_size} rows of the embedding, needed rows {first_row} to {last - 1}")
    lengths = np.array([len(ids) for ids in texts])
    tokens, owner = np.concatenate([np.asarray(ids) for ids in texts]), np.repeat(np.arange(len(texts)), lengths)
    for table in (model.embedding, model.head):
        if table is not None:
            table[...] = _set_means(table[...], tokens, owner, lengths, first_row)


@jax.jit
def _set_means(table: jax.Array, tokens: jax.Array, owner: jax.Array, lengths: jax.Array, first_row: jax.Array) -> jax.Array:
    """`table` [V, D], its row `first_row + i` the mean of rows `tokens[owner == i]`.

    Each device chooses, for every row it holds, the old or the new one: a scatter into a cut table would gather it.
    """
    sums = jax.ops.segment_sum(table[tokens].astype(jnp.float32), owner, len(lengths))
    means = (sums / lengths[:, None]).astype(table.dtype)
    place = jnp.arange(len(table)) - first_row
    new = (place >= 0) & (place < len(lengths))
    return constrain(jnp.where(new[:, None], means[jnp.clip(place, 0, len(lengths) - 1)], table), "vocab", None)
