"""The report: strict JSON, and a page that loads nothing, escapes everything and renders whatever part is missing."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import html.parser
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw

from mllmrec_jax.evaluate.metrics import ImpossibleResultError, Ranks, compare_paired, compute_metrics, expected_random, rank_targets
from mllmrec_jax.evaluate.report import (
    CandidateView,
    ExampleView,
    ItemView,
    ReportError,
    build_report,
    find_comparison,
    write_report,
    write_verdict,
)

HOSTILE = "<script>alert(1)</script>\u202egnp\"'<img src=http://evil.example/x.png> & {{ 7 * 7 }}"
ADJECTIVES = ["Silent", "Crimson", "Hollow", "Paper", "Distant", "Electric", "Winter", "Golden", "Borrowed", "Last"]
NOUNS = ["Harbour", "Orchard", "Signal", "Parade", "Labyrinth", "Meridian", "Lantern", "Republic", "Cartographer's Daughter", "Tide"]
STRENGTH = {"popularity": 0.45, "covisitation": 0.7, "sft": 1.25, "grpo": 1.55, "oracle": 2.2}


def draw_poster(path: Path, rng: np.random.Generator) -> None:
    background, ink = (tuple(int(value) for value in rng.integers(20, 235, 3)) for _ in range(2))
    picture = Image.new("RGB", (200, 300), background)
    pen = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y, size = (int(value) for value in rng.integers((0, 0, 30), (160, 260, 110)))
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)((x, y, x + size, y + size), fill=ink)
    picture.save(path)


def make_scores(strength: float, target: np.ndarray, noise: np.ndarray) -> np.ndarray:
    scores = noise.copy()
    scores[np.arange(len(target)), target] += strength
    return scores


def make_ranks(users: int = 600, candidates: int = 10, seed: int = 0, scale: float = 1.0) -> dict[str, Ranks]:
    """Ranks of users whose targets every row sees with the same noise and its own strength."""
    rng = np.random.default_rng(seed)
    target = rng.integers(candidates, size=users)
    noise = rng.normal(size=(users, candidates))
    own = {row: 0.55 * rng.normal(size=noise.shape) for row in STRENGTH}
    return {row: rank_targets(make_scores(strength * scale, target, noise + own[row]), target) for row, strength in STRENGTH.items()}


@functools.cache
def make_results(seed: int = 0, scale: float = 1.0) -> tuple[dict[str, dict], list[dict]]:
    ranks = make_ranks(seed=seed, scale=scale)
    return make_metrics(ranks), make_comparisons(ranks)


def make_metrics(ranks: dict[str, Ranks]) -> dict[str, dict]:
    rows = {row: compute_metrics(one, bootstrap=200) for row, one in ranks.items()}
    return {"random": expected_random(10, users=len(ranks["sft"]))} | rows


def make_comparisons(ranks: dict[str, Ranks]) -> list[dict]:
    entries = []
    for a, b in (("grpo", "sft"), ("grpo", "covisitation"), ("sft", "covisitation"), ("sft", "popularity")):
        for metric in ("HR@1", "NDCG@3"):
            paired = compare_paired(ranks[b], ranks[a], metric=metric, bootstrap=200, permutations=500)
            p = paired["p_value"]
            entries.append(
                {
                    "a": a,
                    "b": b,
                    "metric": metric,
                    "difference": paired["difference"],
                    "ci95": paired["ci95"],
                    "p": p,
                    "p_holm": min(1.0, 6 * p),
                }
            )
    return entries


def make_curves(seed: int = 0, sft_steps: int = 900, grpo_steps: int = 200) -> dict[str, list[dict]]:
    rng = np.random.default_rng(seed)
    sft = [
        {"step": s, "loss": 0.9 + 5 * math.exp(-s / 90) + 0.12 * rng.normal(), "grad_norm": 1 + abs(rng.normal())} for s in range(sft_steps)
    ]
    grpo = []
    for s in range(grpo_steps):
        done = 1 - math.exp(-s / 60)
        hit, form = 0.40 + 0.09 * done + 0.05 * rng.normal(), min(1.0, 0.93 + 0.065 * done + 0.01 * rng.normal())
        grpo.append(
            {
                "step": s,
                "reward_mean": -1 + 1.3 * form + hit,
                "format_rate": form,
                "hit_rate": hit,
                "kl": 0.004 * done * (1 + 0.3 * rng.normal()),
                "entropy": 1.4 - 0.5 * done + 0.05 * rng.normal(),
                "clip_fraction": 0.0,
                "no_signal_share": 0.2 + 0.2 * done + 0.04 * rng.normal(),
                "completion_length": 6.2 - 0.5 * done + 0.1 * rng.normal(),
                "truncated_share": max(0.0, 0.03 * (1 - done) + 0.005 * rng.normal()),
                "logprob_mismatch": 2e-6 * (1 + 0.2 * abs(rng.normal())),
                "tokens_per_second": (9000 if s else 600) * (1 + 0.05 * rng.normal()),
                "generate_s": 21.4 if s == 0 else 0.31 + 0.02 * rng.normal(),
                "update_s": 17.9 if s == 0 else 0.44 + 0.02 * rng.normal(),
                "learning_rate": 1e-5 * min(1.0, (s + 1) / 20),
                "loss": 1e-3 * rng.normal(),
            }
        )
    return {"sft": sft, "grpo": grpo}


def make_examples(folder: Path, count: int = 12, seed: int = 0) -> list[ExampleView]:
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    items = []
    for index in range(100 if count else 0):
        path = folder / "images" / f"{index}.png"
        title = f"The {ADJECTIVES[index // 10]} {NOUNS[index % 10]} ({1960 + index % 60})"
        items.append(ItemView(index, title, Path("images") / path.name, f"A poster for {title}."))
    examples = []
    for user in range(count):
        chosen = [items[index] for index in rng.permutation(100)[:18]]
        for item in chosen:
            draw_poster(folder / "images" / f"{item.id}.png", np.random.default_rng([seed, item.id]))
        target = int(rng.integers(10))
        noise = rng.normal(size=10) * 1.2
        scores = {
            row: make_scores(STRENGTH[row], np.array([target]), noise[None] + 0.4 * rng.normal(size=(1, 10)))[0] - 4
            for row in ("sft", "grpo")
        }
        answers = {}
        for row, values in scores.items():
            share = np.exp(values) / np.exp(values).sum()
            answers[row] = tuple(f"[ITEM_{chosen[8 + pick].id}] {chosen[8 + pick].title}" for pick in rng.choice(10, size=8, p=share))
        answers["sft"] = (
            *answers["sft"][:6],
            "[ITEM_7007] A Film Nobody Made",
            "I would recommend something like The Silent Harbour, because",
        )
        candidates = tuple(
            CandidateView(item, float(scores["sft"][place]), float(scores["grpo"][place]), place == target)
            for place, item in enumerate(chosen[8:])
        )
        rank = {row: float((values > values[target]).sum() + 1) for row, values in scores.items()}
        prompt = "\n".join(f"{place + 1}. [ITEM_{item.id}] {item.title}" for place, item in enumerate(chosen[:8]))
        examples.append(
            ExampleView(4000 + 37 * user, tuple(chosen[:8]), candidates, prompt, answers["sft"], answers["grpo"], rank["sft"], rank["grpo"])
        )
    return examples


def make_inputs(folder: Path, *, examples: int = 2) -> dict[str, Any]:
    """Synthetic but plausible inputs of `build_report`."""
    metrics, comparisons = copy.deepcopy(make_results())
    return {
        "name": "posterworld quickstart",
        "metrics": metrics,
        "metrics_popularity_negatives": copy.deepcopy(make_results(1, 0.85)[0]),
        "comparisons": comparisons,
        "curves": make_curves(),
        "examples": make_examples(folder, examples),
        "provenance": {
            "command": "mllmrec run quickstart",
            "started": "2025-01-01 12:00:00 UTC",
            "seconds": 402.3,
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "device": {"platform": "cpu", "kind": "cpu", "count": 1},
            "versions": {"mllmrec-jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.0", "python": "3.13.1"},
            "config": {"name": "quickstart", "data": {"source": "posterworld", "negatives": 9}, "grpo": {"beta": 0.1, "group_size": 8}},
        },
        "notes": ["3 malformed rows were skipped (data.max_bad_rows = 5)."],
    }


def write_page(folder: Path, inputs: dict[str, Any]) -> str:
    return write_report(folder, build_report(**inputs))[1].read_text(encoding="utf-8")


def read_strict(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


class Outline(html.parser.HTMLParser):
    """Tags, text, and everything a browser would load."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})
    LOADING = frozenset({"src", "srcset", "href", "xlink:href", "data", "poster", "action", "background", "ping"})

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.loads, self.open, self.ids = [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{name} would run a script"
            if name in self.LOADING:
                self.loads.append(value)
            if name == "style":
                self.loads += re.findall(r"url\((.*?)\)", value or "")
            if name == "id":
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.loads += re.findall(r"url\((.*?)\)", data) + re.findall(r"@import\s+(\S+)", data)
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    inputs = make_inputs(folder)
    report = build_report(**inputs)
    return folder, inputs, report, write_report(folder, report)


def test_json_is_strict_and_holds_every_metric_of_every_row(written):
    _, inputs, report, (json_path, _) = written
    content = read_strict(json_path.read_text(encoding="utf-8"))
    assert content == report
    for rows in ("metrics", "metrics_popularity_negatives"):
        assert set(content[rows]) == {"random", "popularity", "covisitation", "oracle", "sft", "grpo"}
        for row, metrics in content[rows].items():
            assert metrics["users"] == 600
            for name in [f"{kind}@{cutoff}" for kind in ("HR", "NDCG") for cutoff in (1, 3, 5, 10)] + ["MRR"]:
                low, high = metrics[name]["ci95"]
                assert low - 1e-12 <= metrics[name]["mean"] <= high + 1e-12 and metrics[name] == inputs[rows][row][name]


def test_the_page_shows_every_row_column_comparison_and_example(written):
    _, inputs, report, (_, html_path) = written
    page = html_path.read_text(encoding="utf-8")
    outline = Outline(page)
    text = " ".join(outline.text)
    for word in (
        "Random",
        "Popularity",
        "Co-visitation",
        "Oracle",
        "SFT",
        "GRPO",
        "NDCG@10",
        "MRR",
        "posterworld quickstart",
        report["verdict"],
        *report["notes"],
    ):
        assert word in text, word
    for metric in ("HR@1", "NDCG@5"):
        assert f"{inputs['metrics']['grpo'][metric]['mean']:.3f}" in text
    assert outline.tags.count("article") == len(inputs["examples"])
    assert all(f"User {example.user}" in text for example in inputs["examples"])
    assert not outline.open and len(outline.ids) == len(set(outline.ids))


def test_the_page_loads_nothing_but_its_own_data(written):
    outline = Outline(written[3][1].read_text(encoding="utf-8"))
    assert outline.loads and all(target.startswith(("data:image/jpeg;base64,", "#")) for target in outline.loads)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(outline.tags)
    assert all(f"#{name}" in outline.loads for name in ("results", "training", "examples", "provenance"))


def test_each_picture_is_embedded_once_and_small(written):
    _, inputs, _, (_, html_path) = written
    page = html_path.read_text(encoding="utf-8")
    shown = {item.image for example in inputs["examples"] for item in (*example.history, *(one.item for one in example.candidates))}
    uris = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)
    assert len(uris) == len(set(uris)) == len(shown)
    assert max(map(len, uris)) < 20_000


def test_hostile_text_is_escaped_wherever_it_comes_from(tmp_path):
    inputs = make_inputs(tmp_path, examples=1)
    item = ItemView(3, HOSTILE, None, HOSTILE)
    inputs["examples"] = [
        ExampleView(1, (item,), (CandidateView(item, -1.0, -2.0, True),), HOSTILE, (HOSTILE,), ("\ud800 half",), 1.0, 1.0)
    ]
    inputs["name"] = HOSTILE
    inputs["notes"] = [HOSTILE]
    inputs["provenance"] = {HOSTILE: HOSTILE, "versions": {HOSTILE: HOSTILE}, "config": HOSTILE}
    inputs["metrics"][HOSTILE] = inputs["metrics"]["sft"]
    inputs["comparisons"].append({"a": HOSTILE, "b": "sft", "metric": HOSTILE, "difference": 0.0, "ci95": [-0.1, 0.1]})
    inputs["curves"] = {"grpo": [{"step": 0, HOSTILE: 1.0}, {"step": 1, HOSTILE: 2.0}], HOSTILE: [{"step": 0, HOSTILE: 1.0}]}
    page = write_page(tmp_path, inputs)
    outline = Outline(page)
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert not outline.open and all(target.startswith("#") for target in outline.loads)
    assert "{{ 7 * 7 }}" in "".join(outline.text)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"examples": []}, id="no examples"),
        pytest.param({"notes": []}, id="no notes"),
        pytest.param({"curves": {}}, id="no curves"),
        pytest.param({"curves": {"grpo": make_curves(grpo_steps=3)["grpo"]}}, id="no sft curve"),
        pytest.param({"curves": {"sft": [], "grpo": [{"step": 0, "kl": None}, {"reward_mean": 0.3}]}}, id="hardly a curve"),
        pytest.param({"provenance": {}}, id="no provenance"),
        pytest.param({"metrics_popularity_negatives": None}, id="one protocol"),
        pytest.param({"comparisons": []}, id="no comparisons"),
        pytest.param({"metrics": {}, "comparisons": []}, id="no metrics"),
    ],
)
def test_missing_parts_still_render(tmp_path, change):
    page = write_page(tmp_path, make_inputs(tmp_path, examples=1) | change)
    outline = Outline(page)
    assert not outline.open and "None" not in re.sub(r"base64,[\w+/=]+", "", page)
    targets = {target.removeprefix("#") for target in outline.loads if target.startswith("#")}
    assert targets <= set(outline.ids), "the navigation names sections that are not there"


@pytest.mark.parametrize("kept", [("sft",), ("grpo",), ("popularity",), ("sft", "grpo"), ("random", "covisitation", "mine")])
def test_any_subset_of_rows_renders(tmp_path, kept):
    inputs = make_inputs(tmp_path, examples=0)
    every = inputs["metrics"] | {"mine": inputs["metrics"]["sft"]}
    page = write_page(
        tmp_path, inputs | {"metrics": {row: every[row] for row in kept}, "comparisons": [], "metrics_popularity_negatives": None}
    )
    assert not Outline(page).open and 'class="bound"' not in page


def test_examples_without_pictures_scores_or_answers_render(tmp_path):
    inputs = make_inputs(tmp_path, examples=1)
    items = [ItemView(0, ""), ItemView(1, "Gone", Path("images/absent.jpg")), ItemView(2, "Broken", Path("broken.jpg"))]
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    scored = tuple(CandidateView(item, -1.0, None, item.id == 1) for item in items)
    inputs["examples"] = [
        ExampleView(1, tuple(items), scored, sft_rank=2.0),
        ExampleView(2, tuple(items), (), grpo_answers=("[ITEM_1] Gone",)),
    ]
    page = write_page(tmp_path, inputs)
    outline = Outline(page)
    assert "2 pictures could not be read, the first images/absent.jpg." in " ".join(outline.text)
    assert not outline.open and "data:image" not in page


def test_answers_are_counted_and_read_by_the_grammar(tmp_path):
    inputs = make_inputs(tmp_path, examples=0)
    items = [ItemView(index, f"Film {index}") for index in range(3)]
    candidates = tuple(CandidateView(item, -1.0 - item.id, -1.0, item.id == 1) for item in items)
    answers = ("[ITEM_1] Film 1", "[ITEM_2] Film 2", "[ITEM_1] Film 1", "[ITEM_9] Film 9", "Film 1", "")
    inputs["examples"] = [ExampleView(1, (items[0],), candidates, sft_answers=answers, sft_rank=2.0, grpo_rank=2.0)]
    page = write_page(tmp_path, inputs)
    found = re.findall(r'<span class="count">(\d+)×</span><code>(.*?)</code><span class="finding \w+">(.*?)</span>', page)
    assert found == [
        ("2", "[ITEM_1] Film 1", "hit"),
        ("1", "[ITEM_2] Film 2", "miss"),
        ("1", "[ITEM_9] Film 9", "not a candidate"),
        ("1", "Film 1", "unreadable"),
        ("1", "(empty)", "unreadable"),
    ]


def test_a_long_candidate_list_shows_the_best_and_the_target(tmp_path):
    inputs = make_inputs(tmp_path, examples=0)
    candidates = tuple(CandidateView(ItemView(index, f"Film {index}"), -float(index), None, index == 70) for index in range(100))
    inputs["examples"] = [ExampleView(1, (ItemView(5, "Seen"),), candidates, sft_rank=71.0)]
    page = write_page(tmp_path, inputs)
    places = [int(place) for place in re.findall(r'<span class="place">(\d+)</span>', page)]
    assert places == [*range(1, 11), 71] and "89 more candidates" in page


def test_verdict_says_what_the_interval_says():
    metrics = copy.deepcopy(make_results()[0])
    metrics["sft"]["HR@1"]["mean"], metrics["grpo"]["HR@1"]["mean"], metrics["popularity"]["HR@1"]["mean"] = 0.41, 0.47, 0.22
    metrics["covisitation"]["HR@1"]["mean"], metrics["oracle"]["HR@1"]["mean"] = 0.25, 0.66
    entry = {"a": "grpo", "b": "sft", "metric": "HR@1", "difference": 0.06, "ci95": [0.03, 0.09]}
    floors = "popularity 0.220; co-visitation 0.250; oracle 0.660."
    assert write_verdict(metrics, [entry]) == f"GRPO raises HR@1 from 0.410 to 0.470 (+0.060 [+0.030, +0.090]); {floors}"
    turned = entry | {"a": "sft", "b": "grpo", "difference": -0.06, "ci95": [-0.09, -0.03]}
    assert write_verdict(metrics, [turned]) == write_verdict(metrics, [entry])
    assert "does not measurably change" in write_verdict(metrics, [entry | {"ci95": [-0.01, 0.13]}])
    assert "lowers" in write_verdict(metrics, [entry | {"difference": -0.06, "ci95": [-0.09, -0.03]}])
    assert "not compared in pairs" in write_verdict(metrics, [])
    assert write_verdict({"sft": metrics["sft"]}, []).startswith("SFT reaches HR@1 0.410 [")
    assert write_verdict({}, []) == "No trained model was evaluated."
    metrics["covisitation"]["HR@1"]["mean"] = 0.5
    assert write_verdict(metrics, [entry]).endswith("It does not beat the best floor, co-visitation.")


def test_find_comparison_turns_the_interval_round():
    entry = {"a": "x", "b": "y", "metric": "MRR", "difference": 0.2, "ci95": [0.1, 0.4]}
    turned = find_comparison([entry], "y", "x", "MRR")
    assert turned is not None and turned["difference"] == -0.2 and turned["ci95"] == [-0.4, -0.1]
    assert find_comparison([entry], "y", "x", "HR@1") is None


def test_numbers_of_numpy_and_jax_become_plain_and_non_finite_ones_none_with_a_note(tmp_path):
    inputs = make_inputs(tmp_path, examples=0)
    rows = [{"step": np.int64(0), "kl": jnp.float32(0.5)}, {"step": 1, "kl": jnp.float32(jnp.inf)}, {"step": 2, "kl": float("nan")}]
    report = build_report(**inputs | {"curves": {"grpo": rows}, "provenance": {"output": Path("runs") / "a"}})
    assert report["curves"]["grpo"] == [{"step": 0, "kl": 0.5}, {"step": 1, "kl": None}, {"step": 2, "kl": None}]
    assert report["notes"][-1] == "2 values were not finite and left out, the first at curves.grpo[1].kl."
    json_path, _ = write_report(tmp_path, report)
    assert read_strict(json_path.read_text(encoding="utf-8"))["provenance"] == {"output": os.path.join("runs", "a")}


def edit(inputs: dict[str, Any], path: tuple, value: object) -> dict[str, Any]:
    place: Any = inputs
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return inputs


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("metrics", "grpo", "HR@1", "mean"), float("nan"), r"metrics\.grpo\.HR@1\.mean: expected a finite number, got nan"),
        (("metrics", "sft", "MRR"), 0.4, r"metrics\.sft\.MRR: expected \{'mean': number"),
        (("metrics", "sft", "MRR", "ci95"), [0.5, 0.4], r"metrics\.sft\.MRR\.ci95: expected \[low, high\]"),
        (("metrics", "sft", "users"), None, r"metrics\.sft\.users: expected the number of users"),
        (("comparisons", 0), {"a": "grpo", "b": "sft"}, r"comparisons\[0\]: expected the keys ci95, difference, metric too"),
        (
            ("comparisons", 0, "difference"),
            -0.05,
            r"comparisons\[0\]\.difference: expected HR@1 of grpo minus that of sft = \+0\.\d+, got -0\.05",
        ),
        (("provenance", "device"), object(), r"provenance\.device: expected numbers, strings, lists and tables, got object"),
    ],
)
def test_malformed_input_is_refused_by_its_place(tmp_path, path, value, message):
    inputs = edit(make_inputs(tmp_path, examples=0), path, value)
    with pytest.raises(ReportError, match=message):
        build_report(**inputs)


def test_an_impossible_row_stops_the_report(tmp_path):
    inputs = edit(make_inputs(tmp_path, examples=0), ("metrics", "grpo", "NDCG@3", "mean"), 0.99)
    with pytest.raises(ImpossibleResultError, match=r"metrics\.grpo: NDCG@3"):
        build_report(**inputs)


@pytest.mark.parametrize("failing", ["report.html", "report.json"])
def test_a_failed_write_leaves_the_old_files_whole_and_nothing_else(tmp_path, monkeypatch, failing):
    inputs = make_inputs(tmp_path, examples=0)
    old = [path.read_bytes() for path in write_report(tmp_path, build_report(**inputs))]
    before = sorted(path.name for path in tmp_path.iterdir())
    replace = os.replace

    def fail(source, target):
        if Path(target).name == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    inputs["name"] = "newer"
    newer = build_report(**inputs)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ReportError, match=rf"{failing}: cannot be written: No space left on device"):
        write_report(tmp_path, newer)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "report.json").read_bytes() == old[0], "the JSON is written last"


def test_the_same_report_read_back_gives_the_same_page(written, tmp_path):
    folder, _, _, (json_path, html_path) = written
    report = json.loads(json_path.read_text(encoding="utf-8"))
    for example in report["examples"]:
        for item in [*example["history"], *(one["item"] for one in example["candidates"])]:
            item["image"] = str(folder / item["image"])
    assert write_report(tmp_path, report)[1].read_bytes() == html_path.read_bytes()


def test_views_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ItemView(1, "a").title = "b"  # type: ignore[misc]
