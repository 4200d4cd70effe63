import jax.numpy as jnp
import numpy as np
import pytest

from mllmrec_jax.objectives.advantages import compute_advantages, find_no_signal

REWARD = jnp.array([[1.3, 0.3, -1.0, 0.3], [0.3, 0.3, 0.3, 0.3], [1.3, 1.3, 1.3, -1.0]])


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_mean_of_each_group_is_zero(scale):
    np.testing.assert_allclose(jnp.mean(compute_advantages(REWARD, scale=scale), axis=1), 0, atol=1e-6)


def test_known_values():
    r = np.asarray(REWARD, np.float64)
    centred = r - r.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(compute_advantages(REWARD), centred, atol=1e-6)
    np.testing.assert_allclose(
        compute_advantages(REWARD, scale="group"), centred / (r.std(axis=1, keepdims=True, ddof=1) + 1e-4), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(compute_advantages(REWARD, scale="batch"), centred / (r.std(ddof=1) + 1e-4), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_equal_rewards_give_exactly_nothing(scale):
    assert not np.any(compute_advantages(REWARD, scale=scale)[1])


def test_groups_without_signal_are_found():
    np.testing.assert_array_equal(find_no_signal(np.asarray(REWARD)), [False, True, False])


def test_unknown_scale_is_named():
    with pytest.raises((ValueError, TypeError), match="scale"):
        compute_advantages(REWARD, scale="std")  # pyright: ignore[reportArgumentType]: wrong on purpose
