"""The report's page: one HTML file that loads nothing, made from the content of `report.json` and the pictures it names."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllmrec_jax.evaluate.rows import describe_row, order_rows
from mllmrec_jax.pages.charts import Interval, Series, draw_difference, draw_intervals, draw_lines, format_number
from mllmrec_jax.pages.posters import Posters
from mllmrec_jax.pages.render import render_template
from mllmrec_jax.prompts import parse_answer

SHOWN_CANDIDATES = 10
"""Candidates listed in an example; longer lists show the best, and the target wherever it is."""
CHARTS_A_ROW = 3
DOT_METRICS = ("HR@1", "HR@3", "NDCG@3")


@dataclasses.dataclass(frozen=True)
class ChartPlan:
    """One chart of the training section: which curves of which stage."""

    stage: str
    title: str
    about: str
    lines: tuple[tuple[str, str, str], ...]
    """(key in the curves, label, ink)."""
    share: bool = False
    smooth: bool = True


CHART_PLANS = (
    ChartPlan("sft", "Loss", "nats a token of the answer", (("loss", "loss", "sft"),)),
    ChartPlan("grpo", "Reward", "mean over sampled answers", (("reward_mean", "reward", "grpo"),)),
    ChartPlan(
        "grpo", "Format and hit", "share of sampled answers", (("format_rate", "format right", "second"), ("hit_rate", "hit", "grpo")), True
    ),
    ChartPlan("grpo", "KL", "to the SFT policy, nats a token", (("kl", "KL", "grpo"),)),
    ChartPlan("grpo", "Entropy", "of the next token, nats", (("entropy", "entropy", "grpo"),)),
    ChartPlan("grpo", "Answer length", "mean, tokens", (("completion_length", "length", "grpo"),)),
    ChartPlan(
        "grpo",
        "Wasted samples",
        "share of groups without signal, of answers cut short",
        (("no_signal_share", "no signal", "grpo"), ("truncated_share", "truncated", "second")),
        True,
    ),
    ChartPlan("grpo", "Clipped tokens", "share", (("clip_fraction", "clipped", "grpo"),), True),
    ChartPlan("grpo", "Rollout/train mismatch", "mean |difference| of log-probs, nats", (("logprob_mismatch", "mismatch", "grpo"),)),
    ChartPlan("grpo", "Time a step", "seconds", (("generate_s", "generate", "second"), ("update_s", "update", "grpo"))),
    ChartPlan("grpo", "Throughput", "tokens a second", (("tokens_per_second", "tokens/s", "grpo"),)),
    ChartPlan("grpo", "Learning rate", "", (("learning_rate", "learning rate", "grpo"),), smooth=False),
)
_NOT_CURVES = {"step", "epoch", "tokens"}


def _view_table(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Rows and columns of a results table; the best trained model of each column is marked."""
    columns: list[str] = []
    for entries in rows.values():
        columns += [name for name in entries if name != "users" and name not in columns]
    styles = order_rows(rows)
    best = {}
    for column in columns:
        means = [rows[style.key][column]["mean"] for style in styles if style.kind == "model" and column in rows[style.key]]
        best[column] = max(means) if len(set(means)) > 1 else None
    lines = []
    for style in styles:
        cells = []
        for column in columns:
            entry = rows[style.key].get(column)
            if entry is None:
                cells.append(None)
                continue
            low, high = entry["ci95"]
            cells.append(
                {
                    "mean": f"{entry['mean']:.3f}",
                    "interval": f"{low:.3f}–{high:.3f}" if high > low else "exact",
                    "best": style.kind == "model" and best[column] == entry["mean"],
                }
            )
        lines.append({"style": style, "users": f"{rows[style.key]['users']:,}", "cells": cells})
    groups = [(title, [line for line in lines if line["style"].kind == kind]) for title, kind in _GROUPS]
    users = {line["users"] for line in lines}
    return {"columns": columns, "groups": [group for group in groups if group[1]], "users": users.pop() if len(users) == 1 else None}


_GROUPS = (("Floors: no model", "floor"), ("Models", "model"), ("Best achievable", "bound"))


def _view_dots(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    charts = []
    for metric in DOT_METRICS:
        intervals, bound = [], None
        for style in order_rows(rows):
            entry = rows[style.key].get(metric)
            if entry is None:
                continue
            if style.kind == "bound":
                bound = entry["mean"]
            else:
                intervals.append(Interval(style.label, style.ink, entry["mean"], *entry["ci95"], hollow=style.kind == "floor"))
        picture = draw_intervals(intervals, title=metric, bound=bound)
        if picture:
            charts.append({"title": metric, "svg": picture})
    return charts


def _view_tiles(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The few numbers of the header; only those the run has."""
    rows = {key: entries for key, entries in report["metrics"].items() if "HR@1" in entries}
    trained = [key for key in ("grpo", "sft") if key in rows]
    tiles: list[dict[str, Any]] = []
    if not trained:
        return tiles
    main = trained[0]
    entry = rows[main]["HR@1"]
    low, high = entry["ci95"]
    tiles.append(
        {"label": f"HR@1, {describe_row(main).label}", "value": f"{entry['mean']:.3f}", "below": f"95% interval {low:.3f} to {high:.3f}"}
    )
    for other in report["comparisons"]:
        if (other["a"], other["b"], other["metric"]) == ("grpo", "sft", "HR@1"):
            low, high = other["ci95"]
            below = f"95% interval {_signed(low)} to {_signed(high)}, paired"
            tiles.append({"label": "GRPO over SFT", "value": _signed(other["difference"]), "below": below})
    floors = [key for key in rows if describe_row(key).kind == "floor"]
    if floors:
        best = max(floors, key=lambda key: rows[key]["HR@1"]["mean"])
        floor = rows[best]["HR@1"]["mean"]
        if "oracle" in rows and (reach := rows["oracle"]["HR@1"]["mean"] - floor) > 0:
            share = (entry["mean"] - floor) / reach
            below = f"from {describe_row(best).label.lower()} {floor:.3f} to oracle {rows['oracle']['HR@1']['mean']:.3f}"
            tiles.append(
                {"label": "Way from best floor to oracle", "value": f"{share:.0%}".replace("-", "−"), "below": below, "share": share}
            )
        else:
            below = f"{describe_row(best).label} {floor:.3f}"
            tiles.append({"label": "Over the best floor", "value": _signed(entry["mean"] - floor), "below": below})
    tiles.append({"label": "Test users", "value": f"{rows[main]['users']:,}", "below": "candidate lists frozen, shared by all rows"})
    return tiles


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _view_comparisons(comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    ends = [0.0, *(value for entry in comparisons for value in entry["ci95"])]
    lines = []
    for entry in comparisons:
        low, high = entry["ci95"]
        a, b = describe_row(entry["a"]), describe_row(entry["b"])
        ink = a.ink if low > 0 else b.ink if high < 0 else "floor"
        finding = f"{a.label} better" if low > 0 else f"{b.label} better" if high < 0 else "undecided"
        lines.append(
            {
                "a": a,
                "b": b,
                "metric": entry["metric"],
                "difference": _signed(entry["difference"]),
                "interval": f"{_signed(low)} to {_signed(high)}",
                "p": _format_p(entry.get("p")),
                "p_holm": _format_p(entry.get("p_holm")),
                "finding": finding,
                "svg": draw_difference(entry["difference"], low, high, least=min(ends), most=max(ends), ink=ink),
            }
        )
    return lines


def _format_p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _view_charts(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """By stage: the planned charts, then one for every other number that was logged."""
    stages = []
    for stage, rows in curves.items():
        if not rows:
            continue
        steps = [row.get("step", index) for index, row in enumerate(rows)]

        def series(key: str, label: str, ink: str, rows: Sequence[Mapping[str, Any]] = rows, steps: list[float] = steps) -> Series:
            values = [row.get(key) for row in rows]
            return Series(label, ink, steps, [value if isinstance(value, int | float) else None for value in values])

        used, main, more = set(_NOT_CURVES), [], []
        for plan in CHART_PLANS:
            if plan.stage != stage:
                continue
            used |= {key for key, _, _ in plan.lines}
            lines = [one for one in (series(*line) for line in plan.lines) if one.points()]
            picture = draw_lines(lines, title=f"{plan.title}, {plan.about}", share=plan.share, smooth=plan.smooth)
            if picture:
                main.append({"title": plan.title, "about": plan.about, "svg": picture, "legend": lines if len(plan.lines) > 1 else []})
        ink = describe_row(stage).ink
        for key in dict.fromkeys(key for row in rows for key in row):
            picture = "" if key in used else draw_lines([series(key, key, ink)], title=key)
            if picture:
                more.append({"title": key.replace("_", " "), "about": "", "svg": picture, "legend": []})
        fill = max(0, CHARTS_A_ROW - len(main))  # a row with one chart on it looks unfinished
        main, more = main + more[:fill], more[fill:]
        count = f"{len(rows):,} logged step{'' if len(rows) == 1 else 's'}"
        stages.append({"style": describe_row(stage), "count": count, "main": main, "more": more})
    return stages


def _view_item(item: Mapping[str, Any], posters: Posters) -> dict[str, Any]:
    title = str(item["title"]) or f"item {item['id']}"
    initials = "".join(word[0] for word in title.split() if word[0].isalnum())[:2].upper() or "?"
    return {**item, "title": title, "poster": posters.add(item.get("image")), "initials": initials}


def _view_ranking(candidates: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any] | None:
    """Candidates by score, each with its probability among the candidates; None where this model gave no scores."""
    if not candidates or any(candidate.get(key) is None for candidate in candidates):
        return None
    ordered = sorted(candidates, key=lambda candidate: -candidate[key])
    weights = [math.exp(candidate[key] - ordered[0][key]) for candidate in ordered]
    lines = []
    for place, (candidate, weight) in enumerate(zip(ordered, weights, strict=True), start=1):
        share = weight / sum(weights)
        if place <= SHOWN_CANDIDATES or candidate["is_target"]:
            lines.append(
                {
                    **candidate,
                    "place": place,
                    "share": share,
                    "percent": f"{share:.0%}" if share >= 0.005 else "<1%",
                    "score": candidate[key],
                }
            )
    return {"lines": lines, "hidden": len(ordered) - len(lines)}


def _view_answers(answers: Sequence[str], target: int | None, candidates: set[int]) -> list[dict[str, Any]]:
    """Distinct answers, most frequent first, each read by the answer grammar."""
    lines = []
    for text, count in Counter(answers).most_common():
        answer = parse_answer(text)
        if answer is None:
            kind, finding = "bad", "unreadable"
        elif answer.item_id == target:
            kind, finding = "hit", "hit"
        elif answer.item_id in candidates:
            kind, finding = "miss", "miss"
        else:
            kind, finding = "bad", "not a candidate"
        lines.append({"text": text or "(empty)", "count": count, "kind": kind, "finding": finding})
    return lines


def _format_rank(rank: float | None) -> str:
    return "" if rank is None else f"{rank:g}"


def _view_example(example: Mapping[str, Any], posters: Posters) -> dict[str, Any]:
    candidates = [{**candidate, "item": _view_item(candidate["item"], posters)} for candidate in example["candidates"]]
    target = next((candidate["item"] for candidate in candidates if candidate["is_target"]), None)
    target_id = target["id"] if target else None
    ids = {candidate["item"]["id"] for candidate in candidates}
    before, after = example.get("sft_rank"), example.get("grpo_rank")
    change = ""
    if before is not None and after is not None:
        change = "up" if after < before else "down" if after > before else "same"
    models = []
    for key in ("sft", "grpo"):
        ranking = _view_ranking(candidates, f"{key}_score")
        answers = _view_answers(example.get(f"{key}_answers") or (), target_id, ids)
        if ranking or answers:
            rank = _format_rank(example.get(f"{key}_rank"))
            models.append({"style": describe_row(key), "ranking": ranking, "answers": answers, "rank": rank})
    return {
        "user": example["user"],
        "history": [_view_item(item, posters) for item in example["history"]],
        "target": target,
        "models": models,
        "prompt": example.get("prompt") or "",
        "before": _format_rank(before),
        "after": _format_rank(after),
        "change": change,
    }


def _view_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values as one list, tables of plain values as a list each, and anything deeper (the config) as text to unfold."""
    facts, tables, blocks = [], [], []
    for key, value in provenance.items():
        title = key.replace("_", " ")
        if isinstance(value, str) and "\n" in value:
            blocks.append((title, value))
        elif key == "config" or (isinstance(value, dict | list) and _is_deep(value)):
            blocks.append((title, value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)))
        elif isinstance(value, dict):
            tables.append((title, [(name, _format_fact(fact)) for name, fact in value.items()]))
        else:
            facts.append((title, _format_fact(value)))
    return {"facts": facts, "tables": tables, "blocks": blocks}


def _is_deep(value: Mapping[str, Any] | Sequence[Any]) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value
    return any(isinstance(item, dict | list) for item in inner)


def _format_fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_format_fact(item) for item in value)
    if isinstance(value, float):
        return format_number(value)
    return "" if value is None else str(value)


def render_page(report: Mapping[str, Any], *, folder: Path) -> str:
    """The HTML page.

    Args:
      report: the content of `report.json`.
      folder: where relative picture paths start.

    All text from data and models passes through the template's escaping (`pages.render`).
    """
    from PIL import Image  # here: only reports need it

    posters = Posters(lambda name: Image.open(folder / name))
    examples = [_view_example(example, posters) for example in report["examples"]]
    notes = list(report["notes"])
    if posters.unreadable:
        noun = "picture" if len(posters.unreadable) == 1 else "pictures"
        notes.append(f"{len(posters.unreadable)} {noun} could not be read, the first {posters.unreadable[0]}.")
    negatives = report.get("metrics_popularity_negatives")
    return render_template(
        "mllmrec_jax.evaluate",
        "report.html.jinja",
        name=report["name"],
        verdict=report["verdict"],
        tiles=_view_tiles(report),
        table=_view_table(report["metrics"]),
        dots=_view_dots(report["metrics"]),
        negatives_table=_view_table(negatives) if negatives else None,
        negatives_dots=_view_dots(negatives) if negatives else [],
        comparisons=_view_comparisons(report["comparisons"]),
        stages=_view_charts(report["curves"]),
        examples=examples,
        posters=posters.uris,
        provenance=_view_provenance(report["provenance"]),
        notes=notes,
    )
