"""The report of a run: `report.json`, and one self-contained `report.html` made from it.

docs/report-format.md describes the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllmrec_jax.data.atomic import write_file
from mllmrec_jax.evaluate.metrics import ImpossibleResultError, check_possible
from mllmrec_jax.evaluate.page import render_page
from mllmrec_jax.evaluate.rows import describe_row

SCHEMA_VERSION = 1
HEADLINE = "HR@1"


class ReportError(ValueError):
    """What a report was given cannot be reported, or the report cannot be written; the message names the entry and the reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class ItemView:
    """An item as shown; `image` is a picture file, absolute or relative to the report's folder."""

    id: int
    title: str
    image: Path | None = None
    caption: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class CandidateView:
    """A candidate with its answer's log-likelihood (nats) before and after GRPO; None where that model was not run."""

    item: ItemView
    sft_score: float | None = None
    grpo_score: float | None = None
    is_target: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ExampleView:
    """One test user: what the model saw, how it ranked the candidates and what it wrote.

    History is oldest first; ranks are those of the target, 1 best, averaged over ties.
    """

    user: int
    history: tuple[ItemView, ...]
    candidates: tuple[CandidateView, ...]
    prompt: str = ""
    sft_answers: tuple[str, ...] = ()
    grpo_answers: tuple[str, ...] = ()
    sft_rank: float | None = None
    grpo_rank: float | None = None


def _to_plain(value: Any, where: str, lost: list[str] | None) -> Any:
    """`value` as JSON values; a non-finite number becomes None and its place joins `lost`, or is an error where `lost` is None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif convert := getattr(value, "tolist", None):  # numpy and JAX scalars and arrays
        value = convert()
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item, f"{where}.{key}" if where else str(key), lost) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item, f"{where}[{index}]", lost) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if lost is None:
            raise ReportError(f"{where}: expected a finite number, got {value}")
        lost.append(where)
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ReportError(f"{where}: expected numbers, strings, lists and tables, got {type(value).__name__}")


def _check_metrics(rows: dict[str, Any], where: str) -> None:
    for row, metrics in rows.items():
        users = metrics.get("users")
        if not isinstance(users, int) or users < 1:
            raise ReportError(f"{where}.{row}.users: expected the number of users, got {users!r}")
        for name, entry in metrics.items():
            if name == "users":
                continue
            place = f"{where}.{row}.{name}"
            mean, interval = (entry.get("mean"), entry.get("ci95")) if isinstance(entry, dict) else (None, None)
            if not isinstance(mean, int | float) or not isinstance(interval, list) or len(interval) != 2:
                raise ReportError(f"{place}: expected {{'mean': number, 'ci95': [low, high]}}, got {entry!r}")
            if not interval[0] <= interval[1]:
                raise ReportError(f"{place}.ci95: expected [low, high], got {interval}")
        try:
            check_possible(metrics)
        except ImpossibleResultError as error:
            raise ImpossibleResultError(f"{where}.{row}: {error}") from None


def _check_comparisons(comparisons: list[Any], metrics: dict[str, Any]) -> None:
    for index, entry in enumerate(comparisons):
        where = f"comparisons[{index}]"
        missing = {"a", "b", "metric", "difference", "ci95"} - set(entry)
        if missing:
            raise ReportError(f"{where}: expected the keys {', '.join(sorted(missing))} too, got {', '.join(entry)}")
        rows = [metrics.get(entry[side], {}) for side in "ab"]
        if all(entry["metric"] in row for row in rows) and rows[0]["users"] == rows[1]["users"]:
            # On the same users the mean of differences is the difference of means, sign included.
            expected = rows[0][entry["metric"]]["mean"] - rows[1][entry["metric"]]["mean"]
            if abs(entry["difference"] - expected) > 1e-6:
                raise ReportError(
                    f"{where}.difference: expected {entry['metric']} of {entry['a']} minus that of {entry['b']} = {expected:+.6f}, "
                    f"got {entry['difference']:+.6f}; are the users the same and a and b the right way round?"
                )


def find_comparison(comparisons: Sequence[Mapping[str, Any]], a: str, b: str, metric: str) -> dict[str, Any] | None:
    """The paired comparison a minus b on `metric`, turned round where it is stored as b minus a; None where there is none."""
    for entry in comparisons:
        if entry["metric"] != metric:
            continue
        if (entry["a"], entry["b"]) == (a, b):
            return dict(entry)
        if (entry["a"], entry["b"]) == (b, a):
            low, high = entry["ci95"]
            return {**entry, "a": a, "b": b, "difference": -entry["difference"], "ci95": [-high, -low]}
    return None


def write_verdict(metrics: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on HR@1: what GRPO did to it, beside the floors and the oracle; it says so when a floor is not beaten."""
    means = {row: entries[HEADLINE]["mean"] for row, entries in metrics.items() if HEADLINE in entries}
    trained = [row for row in ("sft", "grpo") if row in means]
    floors = [row for row in ("random", "popularity", "covisitation") if row in means]
    if len(trained) == 2:
        before, after = means["sft"], means["grpo"]
        paired = find_comparison(comparisons, "grpo", "sft", HEADLINE)
        if paired is None:
            sentence = f"{HEADLINE} is {before:.3f} after SFT and {after:.3f} after GRPO (not compared in pairs)"
        else:
            low, high = paired["ci95"]
            change = f"{paired['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            if low > 0:
                sentence = f"GRPO raises {HEADLINE} from {before:.3f} to {after:.3f} ({change})"
            elif high < 0:
                sentence = f"GRPO lowers {HEADLINE} from {before:.3f} to {after:.3f} ({change})"
            else:
                sentence = f"GRPO does not measurably change {HEADLINE}: {before:.3f} before, {after:.3f} after ({change})"
    elif trained:
        low, high = metrics[trained[0]][HEADLINE]["ci95"]
        sentence = f"{describe_row(trained[0]).label} reaches {HEADLINE} {means[trained[0]]:.3f} [{low:.3f}, {high:.3f}]"
    else:
        sentence = "No trained model was evaluated"
    shown = [row for row in ("popularity", "covisitation", "oracle") if row in means]
    beside = "; ".join([sentence, *(f"{describe_row(row).label.lower()} {means[row]:.3f}" for row in shown)]) + "."
    if trained and floors:
        best = max(floors, key=lambda row: means[row])
        if means[trained[-1]] <= means[best]:
            beside += f" It does not beat the best floor, {describe_row(best).label.lower()}."
    return beside


def build_report(
    *,
    metrics: Mapping[str, Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    examples: Sequence[ExampleView],
    provenance: Mapping[str, Any],
    notes: Sequence[str],
    name: str = "run",
    metrics_popularity_negatives: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Gathers a run's results into the content of `report.json`.

    Args:
      metrics: by row (`random`, `popularity`, `covisitation`, `oracle`, `sft`, `grpo`, or any other name), then by metric
        (`HR@1`, ..., `MRR`): {"mean", "ci95": [low, high]}, and "users".
      comparisons: paired tests, each {"a", "b", "metric", "difference" (a minus b), "ci95", "p", "p_holm"}.
      curves: by stage (`sft`, `grpo`), one table of numbers a logged step, each with "step".
      examples: test users to show.
      provenance: versions, commit, device, "config" and whatever else shaped the run.
      notes: sentences for the reader (rows skipped, warnings).
      name: of the run.
      metrics_popularity_negatives: as `metrics`, on candidate lists with popularity-matched negatives.

    Returns: JSON values only. Non-finite numbers in curves and examples (a KL that overflowed) are None, and a note counts them.

    Raises:
      ReportError: a metric or a comparison is malformed or not finite, a difference is not that of the two means, or a value is no JSON
        value; the message names its place.
      ImpossibleResultError: no ranking can have a row's metrics.
    """
    lost: list[str] = []
    report: dict[str, Any] = {"schema": SCHEMA_VERSION, "name": name, "verdict": ""}
    report["metrics"] = _to_plain(metrics, "metrics", None)
    _check_metrics(report["metrics"], "metrics")
    if metrics_popularity_negatives:
        report["metrics_popularity_negatives"] = _to_plain(metrics_popularity_negatives, "metrics_popularity_negatives", None)
        _check_metrics(report["metrics_popularity_negatives"], "metrics_popularity_negatives")
    report["comparisons"] = _to_plain(comparisons, "comparisons", None)
    _check_comparisons(report["comparisons"], report["metrics"])
    report["verdict"] = write_verdict(report["metrics"], report["comparisons"])
    report["curves"] = _to_plain(curves, "curves", lost)
    report["examples"] = _to_plain(examples, "examples", lost)
    report["provenance"] = _to_plain(provenance, "provenance", lost)
    report["notes"] = list(notes)
    if lost:
        noun = "value was" if len(lost) == 1 else "values were"
        report["notes"].append(f"{len(lost)} {noun} not finite and left out, the first at {lost[0]}.")
    return report


def write_report(folder: Path, report: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes `report.html` and `report.json` into `folder`, each whole or not at all, the JSON last.

    Args:
      folder: made when absent; relative picture paths of the examples start here.
      report: what `build_report` returned, or a `report.json` read back.

    Returns: the paths of the JSON and the HTML file.

    Raises:
      ReportError: a file cannot be written (disk full, no permission); what was there before is still whole.
    """
    content = json.dumps(report, indent=1, allow_nan=False) + "\n"
    page = render_page(report, folder=folder)
    json_path, html_path = folder / "report.json", folder / "report.html"
    # Model output may hold half a surrogate pair, which has no UTF-8.
    for path, data in ((html_path, page.encode("utf-8", errors="replace")), (json_path, content.encode("ascii"))):
        try:
            write_file(path, data)
        except OSError as error:
            raise ReportError(f"{path}: cannot be written: {error.strerror or error}") from error
    return json_path, html_path
