import numpy as np
import pytest

from mllmrec_jax.config import RewardConfig
from mllmrec_jax.rewards import RewardTask, score_completions

TITLES = {7: "Heat (1995)", 9: "Big", 11: "Antz"}
TASKS = [RewardTask(target=7, candidates=[9, 7])]


def score(texts, **options):
    return score_completions([texts], TASKS, RewardConfig(**options), TITLES)


@pytest.mark.parametrize(("preset", "values"), [("paper", [-1.0, 0.3, 1.3]), ("code", [-1.0, 0.3, 1.0])])
def test_presets(preset, values):
    rewards = score(["no idea", "[ITEM_9] Big", "[ITEM_7] Heat (1995)"], preset=preset)
    np.testing.assert_allclose(rewards.reward, [values])
    np.testing.assert_array_equal(rewards.well_formed, [[False, True, True]])
    np.testing.assert_array_equal(rewards.hit, [[False, False, True]])


def test_membership_flag():
    outside = "[ITEM_11] Antz"
    assert score([outside]).well_formed.all()
    assert not score([outside], require_membership=True).well_formed.any()


def test_title_flag():
    texts = ["[ITEM_7] Heat (1995)", "[ITEM_7] Cold", "[ITEM_7]"]
    np.testing.assert_array_equal(score(texts).hit, [[True, True, True]])
    strict = score(texts, require_title=True)
    np.testing.assert_array_equal(strict.hit, [[True, False, False]])
    np.testing.assert_allclose(strict.reward, [[1.3, -1.0, -1.0]])


def test_reasoning_after_the_answer_is_allowed_before_it_is_not():
    rewards = score(
        ["[ITEM_7] Heat (1995)\n<think>crime</think>", "<think>crime</think> [ITEM_7] Heat (1995)", "[ITEM_7] Heat [ITEM_9] Big"]
    )
    np.testing.assert_array_equal(rewards.hit, [[True, False, False]])
