"""A preprocessing report in a few lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mllmrec_jax.progress import format_seconds


def _list_usage(usage: dict[str, float]) -> str:
    return "".join(f", {amount:,.4f} {what}" if isinstance(amount, float) else f", {amount:,} {what}" for what, amount in usage.items())


def list_summary(report: dict[str, Any]) -> Iterator[str]:
    """Lines about what each stage did, of a report of `run.run_preprocess`."""
    stages = report["stages"]
    yield "pictures: " + ", ".join(f"{count:,} {outcome}" for outcome, count in report["pictures"].items())
    for name in ("caption", "pseudo_cot", "refine_cot", "sanitize"):
        if name in stages:
            tally = stages[name]
            yield f"{name}: {tally['wanted']:,} distinct, {tally['found']:,} found, {tally['done']:,} done{_list_usage(tally['usage'])}"
            if tally["usage_before"]:
                yield f"{name}: those found had cost{_list_usage(tally['usage_before']).removeprefix(',')}"
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
    if "quality" in stages and (means := stages["quality"]["means"]):
        said = ", ".join(f"{kind} {values['all']['mean']:.2f}" for kind, values in means.items() if values)
        yield f"quality of {stages['quality']['windows']:,} windows by {', '.join(r['name'] for r in stages['quality']['raters'])}: {said}"
    yield "time: " + ", ".join(f"{name} {format_seconds(value)}" for name, value in report["seconds"].items())
    yield f"report: {report['page']} and report.json"
