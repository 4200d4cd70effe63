"""Group-relative advantages (Shao et al. 2024, arXiv:2402.03300, section 4.1)."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Keeps a group of equal rewards at advantage 0 instead of 0 / 0.
_EPS = 1e-4


def compute_advantages(reward: Float[Array, "B G"], *, scale: Literal["none", "group", "batch"] = "none") -> Float[Array, "B G"]:
    """A_i = (r_i - mean_j r_j) / s over each group's G members.

    Args:
      reward: float32 [B, G].
      scale: "none": s = 1 (Dr. GRPO, arXiv:2503.20783, and the MLLMRec-R1 paper); "group": s = std of the group + 1e-4 (GRPO);
        "batch": s = std of all B * G rewards + 1e-4 (arXiv:2508.08221).
    """
    centred = reward - jnp.mean(reward, axis=1, keepdims=True)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / (jnp.std(reward, axis=1, keepdims=True, ddof=1) + _EPS)
    if scale == "batch":
        return centred / (jnp.std(reward, ddof=1) + _EPS)
    raise ValueError(f"scale: must be 'none', 'group' or 'batch', was {scale!r}")


def find_no_signal(reward: Float[np.ndarray, "B G"]) -> Bool[np.ndarray, " B"]:
    """Groups whose members all got the same reward: their advantages are 0 and they teach nothing. NumPy."""
    return np.all(reward == reward[:, :1], axis=1)
