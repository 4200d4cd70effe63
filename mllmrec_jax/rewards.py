"""(completion, target) -> score: pure functions of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from mllmrec_jax.config import RewardConfig
from mllmrec_jax.prompts import Answer, parse_answer, sanitise_text

# Wrong format, right format, right format and hit (MLLMRec-R1, paper and public code).
PRESETS: dict[str, tuple[float, float, float]] = {"paper": (-1.0, 0.3, 1.3), "code": (-1.0, 0.3, 1.0)}


class RewardTask(NamedTuple):
    """What the completions of one group are judged against."""

    target: int
    """Item id."""
    candidates: Sequence[int]
    """Item ids listed in the prompt."""


class Rewards(NamedTuple):
    """Of B groups of G completions."""

    reward: Float[np.ndarray, "B G"]
    well_formed: Bool[np.ndarray, "B G"]
    hit: Bool[np.ndarray, "B G"]


def is_well_formed(answer: Answer | None, task: RewardTask, config: RewardConfig, titles: Mapping[int, str]) -> bool:
    """Whether an answer follows the grammar and, under the strict flags, names a candidate and gives that item's title."""
    if answer is None:
        return False
    if config.require_membership and answer.item_id not in task.candidates:
        return False
    return not config.require_title or answer.title == sanitise_text(titles.get(answer.item_id, "")).strip() != ""


def score_completions(
    texts: Sequence[Sequence[str]], tasks: Sequence[RewardTask], config: RewardConfig, titles: Mapping[int, str]
) -> Rewards:
    """Scores G completions for each of B tasks.

    Args:
      texts: decoded completions, B x G, cut at the stop token.
      titles: item id -> title as prompts show it; read under `require_title` only.
    """
    wrong, right, both = PRESETS[config.preset]
    answers = [[parse_answer(text) for text in group] for group in texts]
    pairs = list(zip(answers, tasks, strict=True))
    well_formed = np.array([[is_well_formed(answer, task, config, titles) for answer in group] for group, task in pairs])
    named = np.array([[answer is not None and answer.item_id == task.target for answer in group] for group, task in pairs])
    hit = well_formed & named
    return Rewards(np.where(hit, both, np.where(well_formed, right, wrong)).astype(np.float32), well_formed, hit)
