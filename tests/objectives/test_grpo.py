"""The loss family against a plain double loop, and the properties that make it GRPO."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllmrec_jax.config import GrpoConfig
from mllmrec_jax.objectives.grpo import GroupTokens, compute_grpo_terms

B, G, C = 3, 4, 5
CONFIG = GrpoConfig(beta=0.1, eps_low=0.2, eps_high=0.3, max_new_tokens=7)
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "gspo"]


def make_tokens(seed: int = 0, *, spread: float = 0.3) -> tuple[GroupTokens, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 5)
    length = jax.random.randint(keys[0], (B, G), 1, C + 1)
    mask = jnp.arange(C) < length[..., None]
    logp = jnp.where(mask, -jax.random.exponential(keys[1], (B, G, C)), 0)
    old = jnp.where(mask, logp + spread * jax.random.normal(keys[2], (B, G, C)), 0)
    ref = jnp.where(mask, logp + 0.3 * jax.random.normal(keys[3], (B, G, C)), 0)
    return GroupTokens(logp, old, ref, None, mask), jax.random.normal(keys[4], (B, G))


def loop_loss(tokens: GroupTokens, advantage, config: GrpoConfig) -> float:
    """The formulas of the papers, one token after another, in float64."""
    logp, old, ref = (np.asarray(x, np.float64) for x in (tokens.logp, tokens.logp_old, tokens.logp_ref))
    mask, a = np.asarray(tokens.mask), np.asarray(advantage, np.float64)
    per_member, total, count = [], 0.0, 0
    for b in range(B):
        for g in range(G):
            steps = np.flatnonzero(mask[b, g])
            losses = []
            sequence_ratio = np.exp(np.mean([logp[b, g, t] - old[b, g, t] for t in steps]))
            for t in steps:
                rho = sequence_ratio if config.loss_type == "gspo" else np.exp(logp[b, g, t] - old[b, g, t])
                clipped = min(max(rho, 1 - config.eps_low), 1 + config.eps_high)
                gap = ref[b, g, t] - logp[b, g, t]
                losses.append(-min(rho * a[b, g], clipped * a[b, g]) + config.beta * (np.exp(gap) - 1 - gap))
            per_member.append(np.mean(losses))
            total, count = total + sum(losses), count + len(losses)
    if config.loss_type in ("grpo", "gspo"):
        return float(np.mean(per_member))
    return total / (B * G * config.max_new_tokens) if config.loss_type == "dr_grpo" else total / count


@pytest.mark.parametrize("loss_type", LOSSES)
def test_value_is_the_papers(loss_type):
    config = dataclasses.replace(CONFIG, loss_type=loss_type)
    tokens, advantage = make_tokens()
    terms = compute_grpo_terms(tokens, advantage, config)
    np.testing.assert_allclose(terms.total / terms.weight, loop_loss(tokens, advantage, config), rtol=1e-5)


def loss_of(logp, tokens, advantage, config):
    terms = compute_grpo_terms(tokens._replace(logp=logp), advantage, config)
    return terms.total / terms.weight


@pytest.mark.parametrize("loss_type", LOSSES)
def test_zero_advantage_and_no_kl_give_no_gradient(loss_type):
    config = dataclasses.replace(CONFIG, loss_type=loss_type, beta=0.0)
    tokens, advantage = make_tokens()
    tokens = tokens._replace(logp_ref=None)
    assert not np.any(jax.grad(loss_of)(tokens.logp, tokens, jnp.zeros_like(advantage), config))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_on_policy_gradient_is_the_policy_gradient(loss_type):
    """With old = new, d loss / d logp_t = -A x (weight of token t): the REINFORCE gradient with the loss type's weights."""
    config = dataclasses.replace(CONFIG, loss_type=loss_type, beta=0.0)
    tokens, advantage = make_tokens(spread=0.0)
    tokens = tokens._replace(logp_ref=None, logp_old=tokens.logp)
    gradient = jax.grad(loss_of)(tokens.logp, tokens, advantage, config)
    mask = np.asarray(tokens.mask, np.float64)
    length = mask.sum(axis=-1, keepdims=True)
    weight = {
        "grpo": mask / length / (B * G),
        "gspo": mask / length / (B * G),
        "dr_grpo": mask / (B * G * config.max_new_tokens),
    }.get(loss_type, mask / mask.sum())
    np.testing.assert_allclose(gradient, -np.asarray(advantage)[..., None] * weight, rtol=1e-5, atol=1e-8)


def test_clip_higher_lets_good_tokens_rise_further():
    """A ratio between 1 + 0.2 and 1 + 0.4 with A > 0 still learns under eps_high = 0.4, and no longer under 0.2; A < 0 always does."""
    tokens, _ = make_tokens(spread=0.0)
    tokens = tokens._replace(logp_ref=None, logp_old=jnp.where(tokens.mask, tokens.logp - jnp.log(1.3), 0))
    for eps_high, sign, learns in [(0.2, 1.0, False), (0.4, 1.0, True), (0.2, -1.0, True)]:
        config = dataclasses.replace(CONFIG, beta=0.0, eps_high=eps_high)
        gradient = jax.grad(loss_of)(tokens.logp, tokens, jnp.full((B, G), sign), config)
        assert bool(np.any(gradient)) is learns


def test_clip_fraction_counts_what_the_clip_holds_back():
    tokens, _ = make_tokens(spread=0.0)
    up = tokens._replace(logp_old=jnp.where(tokens.mask, tokens.logp - 1.0, 0))
    assert float(compute_grpo_terms(up, jnp.ones((B, G)), CONFIG).sums["clip_fraction"] / jnp.sum(tokens.mask)) == pytest.approx(1.0)
    assert float(compute_grpo_terms(up, -jnp.ones((B, G)), CONFIG).sums["clip_fraction"]) == 0.0


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_cutting_a_batch_changes_nothing(loss_type):
    """Sums and weights of parts add up to the whole: what accumulation and devices rely on (bnpo means each part by itself, by name)."""
    config = dataclasses.replace(CONFIG, loss_type=loss_type)
    tokens, advantage = make_tokens()
    whole = compute_grpo_terms(tokens, advantage, config)
    parts = [compute_grpo_terms(jax.tree.map(lambda x, i=i: x[i : i + 1], tokens), advantage[i : i + 1], config) for i in range(B)]
    np.testing.assert_allclose(sum(p.total for p in parts) / sum(p.weight for p in parts), whole.total / whole.weight, rtol=1e-6)
    np.testing.assert_allclose(sum(p.sums["kl"] for p in parts), whole.sums["kl"], rtol=1e-5)


def test_padding_does_not_count():
    tokens, advantage = make_tokens()
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 3))), tokens)
    for loss_type in LOSSES:
        config = dataclasses.replace(CONFIG, loss_type=loss_type)
        a, b = compute_grpo_terms(tokens, advantage, config), compute_grpo_terms(wider, advantage, config)
        np.testing.assert_allclose(a.total / a.weight, b.total / b.weight, rtol=1e-6)
