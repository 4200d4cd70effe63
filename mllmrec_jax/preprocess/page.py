"""The page of a preprocessing run: one HTML file that loads nothing, made from the content of `report.json` and the pictures it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mllmrec_jax.data.atomic import write_file
from mllmrec_jax.pages.charts import Mark, draw_difference, draw_histogram, draw_radar, format_number
from mllmrec_jax.pages.posters import Posters
from mllmrec_jax.pages.render import render_template
from mllmrec_jax.preprocess_config import STAGES
from mllmrec_jax.progress import format_seconds

MAX_PICTURES = 2_000_000
"""Characters that thumbnails may take together."""
_USAGE_ORDER = ("prompt tokens", "answer tokens", "reasoning tokens", "cost")
_ABOUT = {
    "load": "data, split, pictures",
    "caption": "distinct pictures described",
    "pseudo_cot": "first traces, from titles and pictures",
    "refine_cot": "traces, from captions and first traces",
    "sanitize": "traces cut down, names masked; leak audit",
    "embed": "pictures, titles",
    "score": "consistency of each window",
    "mix": "which windows keep their trace",
    "emit": "data set, shards",
    "quality": "ratings of a sample",
}
_OUTCOMES = {
    "read": "decoded as they are",
    "converted": "decoded from CMYK, 16 bits, a palette, grey or with transparency",
    "first_frame": "animated: the first frame",
    "missing": "no such file",
    "outside": "a name or a link that leaves the folder",
    "not_a_file": "a folder, a pipe, a device",
    "too_many_bytes": "above images.max_bytes",
    "not_an_image": "no picture of a known format",
    "too_many_pixels": "above images.max_pixels",
    "damaged": "truncated, or a decoder's error",
}
_USED = ("read", "converted", "first_frame")
_SCORES = (
    ("consistency", "s' consistency", "mean over the history of cos(title, picture)", "second"),
    ("relevance", "s'' relevance", "cos(next item, profile of step 4)", "sft"),
    ("score", "s score", "sigmoid(s' + s'')", "grpo"),
)
_KINDS = {"pseudo_cot": ("pseudo-CoT", "second"), "refine_cot": ("refined CoT", "grpo")}
_TRAININGS = {"sft": "SFT", "grpo": "GRPO"}
_TEXTS = {"refine_cot": "Trace", "pseudo_cot": "First trace"}


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _view_stages(report: Mapping[str, Any]) -> dict[str, Any]:
    """A line a stage that ran, and a column for each kind of cost."""
    stages = report["stages"]
    spent = [stages[name].get(part) or {} for name in stages for part in ("usage", "usage_before")]
    found = {kind for usage in spent for kind in usage}
    kinds = [kind for kind in _USAGE_ORDER if kind in found] + sorted(found - set(_USAGE_ORDER))
    lines, totals = [], dict.fromkeys(kinds, 0.0)
    stopped = report.get("stopped") or {}
    for name in ("load", *STAGES):
        seconds = report["seconds"].get(name)
        if seconds is None and name not in stages and stopped.get("stage") != name:
            continue
        stage = stages.get(name, {})
        costs = {kind: (stage.get("usage") or {}).get(kind, 0) + (stage.get("usage_before") or {}).get(kind, 0) for kind in kinds}
        totals = {kind: totals[kind] + costs[kind] for kind in kinds}
        lines.append(
            {
                "name": name.replace("_", " "),
                "about": _ABOUT[name],
                "counts": [f"{stage[part]:,}" if part in stage else "" for part in ("wanted", "found", "done")],
                "unanswered": sum((stage.get("unanswered") or {}).values()),
                "seconds": "" if seconds is None else format_seconds(seconds),
                "costs": [format_number(costs[kind]) if costs[kind] else "" for kind in kinds],
                "stopped": stopped.get("stage") == name,
            }
        )
    return {
        "lines": lines,
        "kinds": kinds,
        "totals": [format_number(totals[kind]) for kind in kinds],
        "seconds": format_seconds(sum(report["seconds"].values())),
        "cost": totals.get("cost"),
        "tokens": sum(totals.get(kind, 0) for kind in ("prompt tokens", "answer tokens")),
        "unanswered": any(line["unanswered"] for line in lines),
    }


def _view_tiles(report: Mapping[str, Any], work: Mapping[str, Any]) -> list[dict[str, Any]]:
    stages = report["stages"]
    tiles: list[dict[str, Any]] = []
    if "mix" in stages:
        for training, label in _TRAININGS.items():
            part = stages["mix"][training]
            share = part["kept"] / part["windows"] if part["windows"] else 0.0
            below = f"of {part['windows']:,} windows, {part['usable']:,} usable"
            tiles.append({"label": f"Traces in {label}", "value": f"{part['kept']:,}", "below": below, "share": share})
    if "leak_audit" in stages:
        audit = stages["leak_audit"]
        below = f"of {_plural(audit['traces'], 'trace')}; {audit['left_out']:,} left out"
        tiles.append({"label": "Traces that tell their target", "value": f"{audit['leaking']:,}", "below": below})
    if agreement := stages.get("score", {}).get("held_out_agreement"):
        below = f"95% interval {agreement['low']:.3f} to {agreement['high']:.3f}, {agreement['pairs']:,} held-out pairs"
        tiles.append({"label": "Titles find their pictures, AUC", "value": f"{agreement['auc']:.3f}", "below": below})
    if work["cost"]:
        value, below = format_number(work["cost"]), f"{format_number(work['tokens'])} tokens, in the currency of the prices set"
        tiles.append({"label": "Cost", "value": value, "below": below})
    elif work["tokens"]:
        tiles.append({"label": "Tokens", "value": format_number(work["tokens"]), "below": "prompts and answers; no price was set"})
    below = f"{_plural(report['windows'], 'training window')}, {_plural(sum(report['pictures'].values()), 'item')}"
    tiles.append({"label": "This run took", "value": work["seconds"], "below": below})
    return tiles


def _write_verdict(report: Mapping[str, Any]) -> str:
    stages = report["stages"]
    if stopped := report.get("stopped"):
        return f"Stopped in {stopped['stage'].replace('_', ' ')}: {stopped['message']}"
    if "mix" not in stages:
        last = [name for name in STAGES if name in report["seconds"]]
        return f"Ran up to {last[-1].replace('_', ' ')}." if last else "Nothing ran."
    kept = " and ".join(f"{stages['mix'][name]['kept']:,} {label}" for name, label in _TRAININGS.items())
    audit = stages["leak_audit"]
    leaks = f"{audit['leaking']:,} of them told their target and are left out" if audit["leaking"] else "none tells its target"
    return f"{kept} prompts carry a trace, out of {_plural(audit['traces'], 'trace')}; {leaks}."


def _view_histograms(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    score = report["stages"].get("score", {})
    charts = []
    for name, title, about, ink in _SCORES:
        histogram = score.get("histograms", {}).get(name)
        if histogram is None:
            continue
        parts = report["stages"].get("mix", {}) if name == "score" else {}
        marks = [
            Mark(f"{label} from", key if key == "sft" else "oracle", parts[key]["threshold"])
            for key, label in _TRAININGS.items()
            if key in parts and parts[key]["threshold"] is not None
        ]
        picture = draw_histogram(histogram["edges"], histogram["counts"], title=title, ink=ink, marks=marks)
        if picture:
            charts.append({"title": title, "about": about, "svg": picture})
    return charts


def _view_item(item: Mapping[str, Any], posters: Posters) -> dict[str, Any]:
    title = item["title"].strip() or f"item {item['id']}"
    initials = "".join(word[0] for word in title.split() if word[0].isalnum())[:2].upper() or "?"
    return {**item, "title": title, "poster": posters.add(str(item["id"]) if item["picture"] else None), "initials": initials}


def _view_texts(texts: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(name, remark, text) of a window's traces; once where the refined one says what the first one said."""
    if len(texts) == 2 and texts["refine_cot"] == texts["pseudo_cot"]:
        return [(_TEXTS["refine_cot"], "the first trace was the same", texts["refine_cot"])]
    return [(_TEXTS[name], "", text) for name, text in texts.items()]


def _view_window(window: Mapping[str, Any], posters: Posters) -> dict[str, Any]:
    scores = window["scores"]
    return {
        "user": window["user"],
        "history": [_view_item(item, posters) for item in window["history"]],
        "target": _view_item(window["target"], posters),
        "texts": _view_texts(window["texts"]),
        "scores": [] if scores is None else [(title.split()[0], f"{scores[name]:.4f}".replace("-", "−")) for name, title, _, _ in _SCORES],
        "kept": [_TRAININGS[name] for name in window["kept"]],
    }


def _view_gallery(report: Mapping[str, Any], posters: Posters) -> list[dict[str, Any]]:
    groups = report.get("gallery") or []
    return [{**group, "windows": [_view_window(window, posters) for window in group["windows"]]} for group in groups]


def _view_quality(quality: Mapping[str, Any]) -> dict[str, Any] | None:
    """The radar and the tables; None where nothing was rated."""
    means = {kind: values for kind, values in quality["means"].items() if values}
    if not means:
        return None
    names = [name for name in next(iter(means.values())) if name != "all"]
    labels = [name.replace("_", " ") for name in names]
    series = [(_KINDS[kind][0], _KINDS[kind][1], [values[name]["mean"] for name in names]) for kind, values in means.items()]
    difference = quality["difference"]
    ends = [0.0, *(entry[end] for entry in (difference or {}).values() for end in ("low", "high"))]
    lines = []
    for name in (*names, "all"):
        entry = difference[name] if difference else None
        line: dict[str, Any] = {"name": "mean of the five" if name == "all" else name.replace("_", " ")}
        line["cells"] = [
            (_show(values[name]["mean"]), f"{_show(values[name]['low'])}–{_show(values[name]['high'])}") for values in means.values()
        ]
        if entry:
            ink = "grpo" if entry["low"] > 0 else "second" if entry["high"] < 0 else "floor"
            line["svg"] = draw_difference(entry["mean"], entry["low"], entry["high"], least=min(ends), most=max(ends), ink=ink)
            line["difference"] = f"{entry['mean']:+.2f}".replace("-", "−")
            line["interval"] = f"{entry['low']:+.2f} to {entry['high']:+.2f}".replace("-", "−")
        lines.append(line)
    raters = [
        {
            **rater,
            "means": [_show(rater["means"][kind]["all"]["mean"]) if rater["means"][kind] else "–" for kind in means],
            "rejected": ", ".join(f"{count:,} {reason}" for reason, count in rater["rejected"].items()) or "none",
        }
        for rater in quality["raters"]
    ]
    return {
        "windows": quality["windows"],
        "passed": quality["passed"],
        "scale": ", ".join(map(str, quality["scale"])),
        "kinds": [_KINDS[kind] for kind in means],
        "radar": draw_radar(labels, series, title="Mean rating by dimension", rings=quality["scale"]),
        "lines": lines,
        "paired": difference is not None,
        "agreement": [
            (name.replace("_", " "), _show(between["difference"]), _show(between["alpha"]))
            for name, between in (quality["agreement"] or {}).items()
        ],
        "raters": raters,
        "form_only": any(rater["name"].startswith("local ") for rater in raters),
        "only_form": all(rater["name"].startswith("local ") for rater in raters),
    }


def _view_masks(sanitize: Mapping[str, Any]) -> dict[str, Any]:
    counts: Mapping[str, int] = sanitize["changes"]
    found = {name.removeprefix("rule: "): count for name, count in counts.items() if name.startswith("rule: ")}
    rules = sorted(found.items(), key=lambda rule: -rule[1])
    most = max((count for _, count in rules), default=1)
    return {
        "traces": f"{counts['traces']:,}",
        "changed": f"{counts['changed']:,}",
        "unusable": f"{counts['unusable']:,}",
        "rules": [
            {
                "name": name,
                "count": f"{count:,}",
                "share": count / most,
                "examples": [example for example in sanitize["examples"] if example["rule"] == name],
            }
            for name, count in rules
        ],
    }


def _view_catalogue(report: Mapping[str, Any], posters: Posters) -> list[dict[str, Any]]:
    groups = []
    for group in report.get("catalogue") or ():
        items = [{**_view_item(item, posters), "cosine": _show(item.get("cosine")) if "cosine" in item else ""} for item in group["items"]]
        groups.append({**group, "items": items})
    return groups


def _list_notes(report: Mapping[str, Any], posters: Posters) -> list[str]:
    notes, stages = [], report["stages"]
    if (agreement := stages.get("score", {}).get("held_out_agreement")) and agreement["low"] < 0.75:
        notes.append(
            f"Titles hardly find their pictures (AUC {agreement['auc']:.3f}, 0.5 is chance): s' and s'' mean little here. More pairs or "
            "a pretrained encoder (preprocess.embed.backend) would help."
        )
    for name, stage in stages.items():
        for kind, count in (stage.get("unanswered") or {}).items():
            notes.append(f"{name}: {_plural(count, 'request')} unanswered, {kind}: {(stage.get('reasons') or {}).get(kind, '')}")
    cut = stages.get("embed", {}).get("truncated_texts", 0) + stages.get("score", {}).get("truncated_profiles", 0)
    if cut:
        notes.append(f"{_plural(cut, 'text')} longer than the encoder takes: embedded by their beginnings.")
    for name, count in (report.get("damaged_lines") or {}).items():
        notes.append(f"{_plural(count, 'line')} of the store {name} could not be read; that work was done again.")
    if posters.unreadable:
        unread = _plural(len(posters.unreadable), "picture")
        notes.append(f"{unread} could not be read for this page, the first of item {posters.unreadable[0]}.")
    if posters.left_out:
        notes.append(f"{_plural(posters.left_out, 'picture')} left out here, so that this page stays small.")
    return notes


def render_page(report: Mapping[str, Any], open_picture: Callable[[int], Image.Image]) -> str:
    """The HTML page.

    Args:
      report: the content of `report.json`; stages that did not run are left out of the page.
      open_picture: the picture of an item, small; may raise OSError or ValueError.

    All text from data and models passes through the template's escaping (`pages.render`).
    """
    posters = Posters(lambda name: open_picture(int(name)), max_bytes=MAX_PICTURES)
    stages, work = report["stages"], _view_stages(report)
    gallery, catalogue = _view_gallery(report, posters), _view_catalogue(report, posters)
    pictures: Sequence[tuple[str, int]] = sorted(report["pictures"].items(), key=lambda outcome: -outcome[1])
    return render_template(
        "mllmrec_jax.preprocess",
        "page.html.jinja",
        styles=("page.css",),
        name=report["name"],
        verdict=_write_verdict(report),
        failed="stopped" in report,
        tiles=_view_tiles(report, work),
        work=work,
        pictures=[{"name": n.replace("_", " "), "count": f"{c:,}", "about": _OUTCOMES.get(n, ""), "used": n in _USED} for n, c in pictures],
        catalogue=catalogue,
        histograms=_view_histograms(report),
        without_trace=stages.get("score", {}).get("without_trace", 0),
        mix=[{"name": label, **stages["mix"][key]} for key, label in _TRAININGS.items()] if "mix" in stages else [],
        selection=stages.get("mix", {}).get("selection", ""),
        gallery=gallery,
        masks=_view_masks(stages["sanitize"]) if "sanitize" in stages else None,
        audit=stages.get("leak_audit"),
        quality=_view_quality(stages["quality"]) if "quality" in stages else None,
        chain=list(report["chain"].items()),
        settings=report["settings"],
        notes=_list_notes(report, posters),
        posters=posters.uris,
    )


def write_page(path: Path, report: Mapping[str, Any], open_picture: Callable[[int], Image.Image]) -> None:
    """Writes the page to `path`, whole or not at all."""
    write_file(path, render_page(report, open_picture).encode())
