"""The page of a preprocessing run: whole for every part of a run, self-contained, small, and deaf to what titles say."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllmrec_jax import cli
from mllmrec_jax.config import RunConfig
from mllmrec_jax.data.examples import LeakError
from mllmrec_jax.data.load import load_dataset
from mllmrec_jax.data.mllmrec_layout import write_mllmrec
from mllmrec_jax.data.records import Item, make_dataset
from mllmrec_jax.preprocess import page
from mllmrec_jax.preprocess.backends import local
from mllmrec_jax.preprocess.gallery import Training, choose_groups, choose_items, cut_text, show_masks, show_place
from mllmrec_jax.preprocess.page import render_page
from mllmrec_jax.preprocess.rating import DIMENSIONS
from mllmrec_jax.preprocess.run import run_preprocess
from mllmrec_jax.preprocess.sanitize import sanitize_trace
from mllmrec_jax.preprocess.title_index import TitleIndex
from mllmrec_jax.preprocess_config import STAGES, QualityConfig

HOSTILE = (
    "<script>alert(1)</script>",
    "</script></style><img src=x onerror=y>",
    "\u202eevil\u202c \u2066mark",
    "{{ 7 * 7 }}",
    "\" onload='x'",
    "<!--",
)


class Outline(HTMLParser):
    """Elements, attributes, text and ids of a page; fails on an element that is not closed."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.text = ""
        self.around_bidi: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append((name, value or ""))
            if name == "id":
                self.ids.add(value or "")
            if name == "href":
                self.links.add(value or "")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "\u202e" in data:
            self.around_bidi.add(self._open[-1])


def folder_of(config: RunConfig) -> Path:
    return config.output / config.name / "preprocess"


def read_page(config: RunConfig) -> Outline:
    return Outline((folder_of(config) / "report.html").read_text(encoding="utf-8"))


def rendered(report: dict[str, Any], picture: Any = lambda item: Image.new("RGB", (20, 30))) -> Outline:
    return Outline(render_page(report, picture))


@pytest.fixture(scope="module")
def report(whole_run: RunConfig) -> dict[str, Any]:
    return json.loads((folder_of(whole_run) / "report.json").read_text())


def test_a_whole_run_shows_every_part(report: dict[str, Any]) -> None:
    outline = rendered(report)
    assert outline.ids >= {"stages", "scores", "traces", "quality", "masks", "leaks", "pictures", "provenance"}
    assert {link.removeprefix("#") for link in outline.links} <= outline.ids
    for said in ("14 SFT and 7 GRPO prompts carry a trace", "Highest scores", "At the threshold of SFT", "At the threshold of GRPO"):
        assert said in outline.text
    for said in ("Lowest scores", "local (form only)", "Titles and pictures that agree most", "decoded as they are"):
        assert said in outline.text
    assert outline.tags.count("svg") >= 4


@pytest.mark.parametrize("until", STAGES[:-1])
def test_a_run_that_ended_early_has_a_page_of_what_there_is(config: RunConfig, until: str) -> None:
    if until == "emit":
        config = dataclasses.replace(config, preprocess=dataclasses.replace(config.preprocess, quality=QualityConfig(samples=0)))
    run_preprocess(config, until=until)  # type: ignore[arg-type]
    outline = read_page(config)
    assert {link.removeprefix("#") for link in outline.links} <= outline.ids and "quality" not in outline.ids
    assert ("traces" in outline.ids) == (STAGES.index(until) >= STAGES.index("sanitize"))  # type: ignore[arg-type]
    assert "A half-lit" in outline.text or "A dim" in outline.text or "A bright" in outline.text


def test_the_page_loads_nothing_and_is_small(report: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (512, 350, 3), np.uint8))  # as large as a thumbnail gets
    text = render_page(report, lambda item: noise)
    assert len(text.encode()) < 3_000_000
    outline = Outline(text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "base"} & set(outline.tags)
    assert not [name for name, _ in outline.attributes if name in {"src", "srcset", "action", "data"} or name.startswith("on")]
    assert all(link.startswith("#") for link in outline.links)
    assert all(url.startswith("data:image/jpeg;base64,") for url in re.findall(r"url\(([^)]*)\)", text))
    assert "default-src 'none'" in text and "@import" not in text


def test_several_raters_and_their_agreement_are_shown(report: dict[str, Any]) -> None:
    quality = report["stages"]["quality"]
    one = quality["raters"][0]
    other = {**one, "name": "openai <b>judge</b>", "rejected": {"not JSON": 12, "keys": 1}, "given_up": 2}
    agreement = {name: {"difference": 0.25, "alpha": None} for name in DIMENSIONS}
    quality = {**quality, "raters": [one, other], "agreement": agreement, "passed": 3}
    outline = rendered({**report, "stages": {**report["stages"], "quality": quality}})
    assert "b" not in outline.tags and "openai <b>judge</b>" in outline.text and "12 not JSON, 1 keys" in outline.text
    assert "0.25" in outline.text and "3 without usable traces" in outline.text and "it is part of the means" in outline.text
    nothing = {**quality, "means": dict.fromkeys(quality["means"])}
    assert "quality" not in rendered({**report, "stages": {**report["stages"], "quality": nothing}}).ids


def test_cost_and_what_was_left_unanswered_are_shown(report: dict[str, Any]) -> None:
    spent = {"usage": {"prompt tokens": 1_000_000, "cost": 0.5}, "usage_before": {"prompt tokens": 200_000, "cost": 0.1}}
    caption = {**report["stages"]["caption"], **spent, "unanswered": {"truncated": 3}, "reasons": {"truncated": "cut <off>"}}
    outline = rendered({**report, "stages": {**report["stages"], "caption": caption}})
    for said in ("Prompt tokens", "1.2M", "0.6", "3 requests unanswered, truncated: cut <off>"):
        assert said in outline.text


def test_pictures_beyond_the_room_are_left_blank_and_counted(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_PICTURES", 3_000)
    outline = rendered(report)
    assert re.search(r"\d+ pictures left out here", outline.text)


def test_a_picture_that_is_gone_is_blank_and_said(report: dict[str, Any]) -> None:
    def gone(item: int) -> Image.Image:
        raise ValueError("gone")

    assert "pictures could not be read for this page" in rendered(report, gone).text


def test_no_title_becomes_markup(config: RunConfig, tmp_path: Path) -> None:
    dataset = load_dataset(config.data, config.cache)
    titles = [HOSTILE[row] if row < len(HOSTILE) else f"{HOSTILE[row % len(HOSTILE)]} {row}" for row in range(len(dataset.items))]
    items = [dataclasses.replace(item, title=title) for item, title in zip(dataset.items.values(), titles, strict=True)]
    write_mllmrec(make_dataset("posterworld", items, dataset.histories), tmp_path / "files")
    data = dataclasses.replace(config.data, source="mllmrec", path=tmp_path / "files")
    config = dataclasses.replace(config, data=data, name="a<b>&")
    run_preprocess(config)
    text = (folder_of(config) / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    assert "script" not in outline.tags and "img" not in outline.tags and text.count("<style>") == text.count("</style>") == 1
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in outline.text and "{{ 7 * 7 }}" in outline.text and "\u202eevil" in outline.text
    # What turns the direction of text stays in an element that keeps it to itself.
    assert outline.around_bidi and outline.around_bidi <= {"bdi", "p", "pre"}


def test_a_leak_stops_the_run_with_a_page_that_shows_where(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import mllmrec_jax.preprocess.traces as traces

    dataset = load_dataset(config.data, config.cache)
    title = max((item.title for item in dataset.items.values()), key=len)
    monkeypatch.setattr(traces.sanitize, "sanitize_trace", lambda text, index: traces.sanitize.Sanitised(text, ()))
    honest = local.compose_trace
    monkeypatch.setattr(local, "compose_trace", lambda *words: honest(*words) + f" Surely {title}!")
    with pytest.raises(LeakError, match=r"report\.html"):
        run_preprocess(config)
    outline = read_page(config)
    assert "Stopped in sanitize" in outline.text and "stopped here" in outline.text
    assert (
        "Surely" in outline.text
        and outline.tags.count("mark") > 0
        and "emit" not in outline.text.split("Provenance")[0].split("Stages")[1][:400]
    )


def test_the_summary_names_the_page(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tomli_w

    from mllmrec_jax.config import to_dict

    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(to_dict(config)))
    cli.main(["preprocess", str(path), "--stage", "caption"])
    assert f"report: {folder_of(config) / 'report.html'}" in capsys.readouterr().out


def test_groups_are_best_beside_each_threshold_and_worst() -> None:
    scores = np.linspace(0, 1, 101)
    usable = np.ones(101, bool)
    usable[100] = False  # the best has no usable trace
    sft, grpo = Training(np.arange(101), np.arange(90, 100), 0.9), Training(np.arange(0, 101, 2), np.array([96, 98]), 0.96)
    groups = choose_groups(scores, usable, {"sft": sft, "grpo": grpo})
    assert [group.rows for group in groups] == [[99, 98, 97], [91, 90, 89, 88], [98, 96, 94, 92], [0, 1, 2]]
    assert [group.rows for group in choose_groups(None, usable, {})] == [[0, 1, 2, 3]]
    assert choose_groups(scores, np.zeros(101, bool), {"sft": sft}) == []
    drawn = choose_groups(scores, usable, {"sft": sft._replace(threshold=None)})
    assert [group.title for group in drawn] == ["Highest scores", "Lowest scores"]
    assert [group.rows for group in choose_groups(scores[:2], usable[:2], {})] == [[1, 0]]  # no window twice


def test_items_at_both_ends_have_pictures_and_are_shown_once() -> None:
    ends = choose_items(np.arange(5), np.array([0.3, 0.9, -0.2, 0.0, 0.5]), np.array([True, True, True, False, True]))
    assert [item for item, _ in ends["most"]] == [1, 4, 0, 2] and ends["least"] == []


def test_a_mask_is_shown_where_it_stands() -> None:
    index = TitleIndex([Item(7, "Toy Story (1995)"), Item(8, "Heat (1995)")])
    cleaned = sanitize_trace('He saw item 7, "Toy Story" (1995) and "Heat", then slept.', index)
    shown = show_masks(cleaned.text, [change._asdict() for change in cleaned.changes])
    assert len(shown) == len(cleaned.changes) >= 2
    for one in shown:
        assert one["before"] + one["mask"] + one["after"] in cleaned.text and one["was"]
    assert show_place("It is HEAT again", "heat") == {"before": "It is ", "after": " again"}
    assert cut_text("abc", 3) == "abc" and cut_text("abcd", 3) == "ab…"
