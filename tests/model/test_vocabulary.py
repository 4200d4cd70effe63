"""Rows for added item tokens, and the copying start of random weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllmrec_jax.config import ModelConfig
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.model.vocabulary import set_item_rows


@pytest.mark.parametrize("tied", [True, False])
def test_item_rows_are_the_means_of_their_texts(tied):
    model = Decoder(ModelConfig(tie_embeddings=tied), vocab_size=20, rngs=nnx.Rngs(0))
    before = np.array(model.embedding[...].astype(jnp.float32))
    set_item_rows(model, 17, [[1, 3], [5]])
    after = np.array(model.embedding[...].astype(jnp.float32))
    np.testing.assert_array_equal(after[:17], before[:17])
    np.testing.assert_allclose(after[17], (before[1] + before[3]) / 2, atol=4e-3)  # stored in bfloat16
    np.testing.assert_array_equal(after[18], before[5])
    np.testing.assert_array_equal(after[19], before[19])


def test_too_few_rows_are_named():
    model = Decoder(ModelConfig(), vocab_size=20, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rows"):
        set_item_rows(model, 19, [[1], [2]])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_random_values_start_by_passing_through(kv_heads):
    """W_V W_O of each head is positive semi-definite: what attention averages comes out with a positive share of itself."""
    model = Decoder(ModelConfig(num_kv_heads=kv_heads, param_dtype="float32"), vocab_size=20, rngs=nnx.Rngs(0))
    v = np.asarray(model.layers.attention.v_proj.kernel[...])[0].reshape(128, kv_heads, 32)
    o = np.asarray(model.layers.attention.o_proj.kernel[...])[0].reshape(4, 32, 128)
    for head in range(4):
        product = v[:, head // (4 // kv_heads)] @ o[head]
        assert np.linalg.eigvalsh((product + product.T) / 2).min() > -1e-4
        assert np.trace(product) > 10
