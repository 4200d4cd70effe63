"""Rollout: the compiled loop against full recomputation, stops, and independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllmrec_jax.config import ConfigError, LogprobConfig, LoraConfig, ModelConfig
from mllmrec_jax.data.group_batch import GroupBatch
from mllmrec_jax.generate.rank import score_candidates
from mllmrec_jax.generate.rollout import make_keys, rollout_group
from mllmrec_jax.model.lora import add_adapters
from mllmrec_jax.model.qwen3 import Decoder
from mllmrec_jax.objectives.logprobs import completion_logprobs, encode_predicting

V, P, G, C = 41, 9, 4, 6
CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, max_position=64,
    dtype="float32", param_dtype="float32", tie_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(CONFIG, vocab_size=V, rngs=nnx.Rngs(0))
    add_adapters(model, LoraConfig(rank=4), rngs=nnx.Rngs(1))
    assert model.head is not None  # tied, a random model repeats its last token for ever
    model.head[...] = model.head[...] * 3
    return model


PROMPT = jax.random.randint(jax.random.key(5), (3, P), 0, V)
LENGTH = jnp.array([9, 4, 1])
ROWS = jnp.array([10, 11, 12])


def sample(model, rows=slice(None), **options):
    settings = {"max_new_tokens": C, "temperature": 0.9, "top_p": 0.9, "stop_ids": (3, 7), "pad_id": 1, **options}
    keys = make_keys(jnp.int32(0), jnp.int32(2), ROWS[rows], G)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, p, n, k: rollout_group(nnx.merge(graphdef, state), p, n, k, **settings))
    return run(state, PROMPT[rows], LENGTH[rows], keys)


encode = nnx.jit(encode_predicting, static_argnames="adapters")
score = nnx.jit(score_candidates, static_argnums=2)


def test_logps_are_what_training_recomputes(model):
    out = sample(model)
    batch = GroupBatch(PROMPT, LENGTH, out.completion, out.completion_length)
    hidden = encode(model, batch, adapters=True)
    expected = completion_logprobs(hidden, model.head_weight, batch, LogprobConfig(), temperature=0.9).logp
    np.testing.assert_allclose(out.logp_raw, expected, atol=2e-5)
    assert np.all(np.asarray(out.logp_sampled) >= np.asarray(out.logp_raw) - 1e-5)


def test_a_completion_does_not_depend_on_its_place_in_the_batch(model):
    together = sample(model)
    for row in range(3):
        alone = sample(model, rows=slice(row, row + 1))
        np.testing.assert_array_equal(alone.completion[0], together.completion[row])


def test_members_and_steps_differ(model):
    out = sample(model, stop_ids=())
    assert len({tuple(c) for c in np.asarray(out.completion).reshape(-1, C).tolist()}) > G


def test_stop_token_ends_a_row_and_counts(model):
    out = sample(model, max_new_tokens=12)
    completion, length, stopped = (np.asarray(x) for x in (out.completion, out.completion_length, out.stopped))
    assert stopped.any()
    for row, n, stop in zip(completion.reshape(-1, 12), length.reshape(-1), stopped.reshape(-1), strict=True):
        stops = np.flatnonzero(np.isin(row[:n], (3, 7)))
        assert (list(stops) == [n - 1]) if stop else (len(stops) == 0 and n == 12)
        assert np.all(row[n:] == 1)


def test_greedy_is_the_argmax_of_full_recomputation(model):
    out = sample(model, temperature=0.0, stop_ids=())
    batch = GroupBatch(PROMPT, LENGTH, out.completion, out.completion_length)
    logits = encode(model, batch, adapters=True) @ model.head_weight.T
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), out.completion)


def test_too_long_for_the_model_is_said_before_any_work(model):
    with pytest.raises(ConfigError, match="64"):
        sample(model, max_new_tokens=60)


def test_rank_scores_are_sums_of_answer_logps(model):
    """K candidates as one group score like K batches of one, answers of different lengths."""
    answers = jax.random.randint(jax.random.key(3), (3, 5, 4), 0, V)
    lengths = jnp.array([[4, 3, 2, 1, 4]] * 3)
    together = score(model, GroupBatch(PROMPT, LENGTH, answers, lengths), LogprobConfig())
    for k in range(5):
        alone = score(model, GroupBatch(PROMPT, LENGTH, answers[:, k : k + 1], lengths[:, k : k + 1]), LogprobConfig())
        np.testing.assert_allclose(together[:, k], alone[:, 0], rtol=1e-5, atol=1e-5)
