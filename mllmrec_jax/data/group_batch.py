"""The one layout of everything that costs time: a prompt and its G continuations."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Int


class GroupBatch(NamedTuple):
    """B prompts, each with G completions; both right-padded, so that a prompt is stored and computed once a group.

    Completion token t of row b sits at position `prompt_length[b] + t`; it attends to the prompt and to its own group member's earlier
    tokens; the last prompt token predicts the first token of all G completions.
    """

    prompt: Int[Array, "B P"]
    prompt_length: Int[Array, " B"]
    completion: Int[Array, "B G C"]
    completion_length: Int[Array, "B G"]
