"""How the rows of a results table are named, grouped and ordered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class RowStyle:
    """`ink` is the colour class; a `floor` needs no model, a `bound` cannot be beaten."""

    key: str
    label: str
    kind: Literal["floor", "model", "bound"]
    ink: str
    about: str = ""


_KNOWN = (
    RowStyle("random", "Random", "floor", "floor", "the exact expectation of a shuffled list"),
    RowStyle("popularity", "Popularity", "floor", "floor", "training interactions of each candidate"),
    RowStyle("covisitation", "Co-visitation", "floor", "floor", "candidates seen beside the history in training"),
    RowStyle("sft", "SFT", "model", "sft", "supervised fine-tuning"),
    RowStyle("grpo", "GRPO", "model", "grpo", "SFT, then GRPO"),
    RowStyle("oracle", "Oracle", "bound", "oracle", "Bayes filter that knows how the data were generated"),
)


def describe_row(key: str) -> RowStyle:
    """The style of a row; an unknown name is a model called by its name."""
    return next((style for style in _KNOWN if style.key == key), RowStyle(key, key, "model", "other"))


def order_rows(keys: Iterable[str]) -> list[RowStyle]:
    """Floors first, then models (unknown ones before SFT and GRPO), then bounds."""
    place = {style.key: index for index, style in enumerate(_KNOWN)}
    before_sft = place["sft"] - 0.5
    return [describe_row(key) for key in sorted(keys, key=lambda key: place.get(key, before_sft))]
