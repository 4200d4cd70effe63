"""Embedding rows for tokens that were added to a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mllmrec_jax.model.qwen3 import Decoder


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
            values = table[...]
            sums = jax.ops.segment_sum(values[tokens].astype(jnp.float32), owner, len(texts))
            table[...] = values.at[first_row:last].set((sums / lengths[:, None]).astype(values.dtype))
