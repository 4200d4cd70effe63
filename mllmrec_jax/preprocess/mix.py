"""Stage 7: which training windows get their trace: the top fraction by score, or as many at random for comparison."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np


class Mixture(NamedTuple):
    """`kept` rows, ascending; `threshold` is the lowest score kept (None where none is kept)."""

    kept: np.ndarray
    threshold: float | None


def choose_rows(
    scores: np.ndarray, eligible: np.ndarray, fraction: float, *, selection: Literal["top", "random"] = "top", seed: int = 0
) -> Mixture:
    """Keeps round(`fraction` * N) of N windows, or all eligible ones where there are fewer.

    Args:
      scores: float [N].
      eligible: bool [N]; False where a window has no usable trace.
      fraction: of all N windows, eligible or not: p = 0.1 keeps 10%.
      selection: "top" by score, of equal scores the earlier row; "random" by `seed`.
    """
    count = min(round(fraction * len(scores)), int(eligible.sum()))
    order = (
        np.random.default_rng(seed & 0xFFFFFFFF).permutation(len(scores)) if selection == "random" else np.argsort(-scores, kind="stable")
    )
    kept = np.sort(order[eligible[order]][:count])
    return Mixture(kept, float(scores[kept].min()) if count else None)
