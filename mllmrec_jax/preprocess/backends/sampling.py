"""Drawn tokens that depend on a request alone, not on which others are in the batch or how many steps they took."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LogitsProcessor


def draw_uniforms(keys: list[str], count: int) -> torch.Tensor:
    """float32 [len(keys), count] in [0, 1), each row a function of its key (hex digits)."""
    return torch.from_numpy(np.stack([np.random.default_rng(int(key[:32], 16)).random(count, np.float32) for key in keys]))


class SeededSampler(LogitsProcessor):
    """Leaves one token of a row possible: the one at a given uniform number in the distribution at `temperature`, cut to `top_p`."""

    def __init__(self, uniforms: torch.Tensor, *, prompt_length: int, temperature: float, top_p: float):
        """`uniforms`: [rows, steps], one number a new token."""
        self._uniforms, self._start, self._temperature, self._top_p = uniforms, prompt_length, temperature, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = self._uniforms[:, input_ids.shape[1] - self._start, None]
        ordered, tokens = torch.softmax(scores.float() / self._temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
        below = ordered.cumsum(dim=-1) - ordered
        kept = below < self._top_p
        mass = (ordered * kept).sum(dim=-1, keepdim=True)
        place = (kept & (below <= drawn * mass)).sum(dim=-1, keepdim=True) - 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens.gather(-1, place), 0.0)
