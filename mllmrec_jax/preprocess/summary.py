"""A preprocessing report in a few lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mllmrec_jax.progress import format_seconds


def list_summary(report: dict[str, Any]) -> Iterator[str]:
    """Lines about what each stage did, of a report of `run.run_preprocess`."""
    stages = report["stages"]
    yield "pictures: " + ", ".join(f"{count:,} {outcome}" for outcome, count in report["pictures"].items())
    for name in ("caption", "pseudo_cot", "refine_cot", "sanitize"):
        if name in stages:
            tally = stages[name]
            cost = "".join(f", {amount:,} {what}" for what, amount in tally["usage"].items())
            yield f"{name}: {tally['wanted']:,} distinct, {tally['found']:,} found, {tally['done']:,} done{cost}"
    if "leak_audit" in stages:
        audit = stages["leak_audit"]
        yield f"leak audit: {audit['leaking']:,} of {audit['traces']:,} traces tell their target; {audit['left_out']:,} left out"
    if "score" in stages and (agreement := stages["score"]["held_out_agreement"]):
        interval = f"95% interval {agreement['low']:.3f} to {agreement['high']:.3f}, {agreement['pairs']:,} held-out pairs"
        yield f"title-picture agreement: AUC {agreement['auc']:.3f} ({interval})"
    if "mix" in stages:
        for name in ("sft", "grpo"):
            part = stages["mix"][name]
            threshold = "" if part["threshold"] is None else f", threshold {part['threshold']:.4f}"
            yield f"mix: {part['kept']:,} of {part['windows']:,} {name} windows with a trace{threshold}"
    if "emit" in stages:
        folder = stages["emit"]["folder"]
        yield f"shards: {folder}/shards; to train: --data.source mllmrec --data.path {folder}/dataset"
    yield "time: " + ", ".join(f"{name} {format_seconds(value)}" for name, value in report["seconds"].items())
