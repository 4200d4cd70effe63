"""The picture of `bench scaling`: time and memory of a step over one size, in both layouts."""

from __future__ import annotations

from typing import Any

from mllmrec_jax.pages.loglog import COLOURS, Line, draw_loglog_panel, join_panels

NAMES = {
    "group_size": "completions a prompt, G",
    "prompt_tokens": "prompt tokens, P",
    "new_tokens": "completion tokens, C",
    "batch_size": "prompts a micro-batch, B",
    "layers": "layers",
    "vocabulary": "vocabulary, V",
}
PANELS = (
    ("p50", "step_s", 1.0, "time of a GRPO step", "seconds, p50"),
    ("peak_bytes", "peak_bytes", 1e6, "memory", "MB, XLA's peak of one device"),
)


def draw_curves(document: dict[str, Any]) -> str:
    """The step's p50 and peak memory of a `bench scaling` document side by side, with the fitted exponents."""
    over = document["over"]
    steps = [row for row in document["rows"] if row["name"] == "step"]
    panels = []
    for key, exponent, unit, title, y_label in PANELS:
        if any(row[key] is None for row in steps):
            continue
        lines = []
        for (layout, found), colour in zip(document["exponents"].items(), COLOURS, strict=False):
            points = [(row[over], row[key] / unit) for row in steps if row["layout"] == layout]
            lines.append(Line(f"{layout} ~ x^{found[exponent]:.2f}", points, colour))
        panels.append(draw_loglog_panel(lines, title=title, x_label=NAMES[over], y_label=y_label))
    return join_panels(panels, label=f"GRPO step over {NAMES[over]}, prompts shared and repeated")
