"""profiling/visual_tokens.py: counts against the tokenizer, FLOPs against XLA, and a small run from end to end."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import pytest

from mllmrec_jax.bench.executed import count_executed
from mllmrec_jax.bench.flops import Sizes
from mllmrec_jax.bench.grpo_work import GrpoWork

SCRIPT = Path(__file__).resolve().parents[1] / "profiling" / "visual_tokens.py"
spec = importlib.util.spec_from_file_location("visual_tokens", SCRIPT)
assert spec is not None and spec.loader is not None
visual = importlib.util.module_from_spec(spec)
sys.modules["visual_tokens"] = visual  # where dataclasses look for their module
spec.loader.exec_module(visual)


@pytest.fixture(scope="module")
def catalogue():
    return visual.make_catalogue(80)


@pytest.fixture(scope="module")
def tokenizer(catalogue, tmp_path_factory):
    return visual.open_tokenizer(None, catalogue, tmp_path_factory.mktemp("bpe"))


def test_captions_are_short_and_go_behind_the_titles(catalogue):
    for plain, captioned in zip(catalogue.titles, catalogue.captions, strict=True):
        assert captioned.title == plain.title and not plain.detail
        assert 10 < len(captioned.detail.split()) <= 50


def test_a_picture_is_196_tokens_on_top_of_the_titles(catalogue, tokenizer):
    for history, candidates in ((1, 5), (8, 10), (8, 40)):
        counts = visual.count_tokens(tokenizer, catalogue, history, candidates)
        assert counts["pictures"] == counts["titles"] + 196 * (history + candidates)
        assert counts["titles"] < counts["captions"] < counts["pictures"]
    # Beside the wording, each item adds as much as the one before.
    at = [visual.count_tokens(tokenizer, catalogue, n, 10)["captions"] for n in (10, 20, 30)]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0], rel=0.1)


def test_real_tokens(catalogue, shared_data):
    tokenizer = visual.open_tokenizer(shared_data / "tokenizers" / "qwen3", catalogue, Path())
    counts = visual.count_tokens(tokenizer, catalogue, 8, 10)
    assert 200 < counts["titles"] < 700 < counts["captions"] < 1600


def test_flops_are_those_xla_counts():
    config = visual.make_config()
    sizes = Sizes(1, 200, config.grpo.group_size, config.grpo.max_new_tokens, config.tokenizer.vocab_size)
    work = GrpoWork(config, sizes, steps=2)
    prompts = work.draw_prompts(0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), work.update_arguments(prompts, work.draw_completions()))
    assert count_executed(work._update, *shapes).flops == pytest.approx(visual.count_flops(config, 200)["update"], rel=0.15)


def test_costs_end_to_end(catalogue, tokenizer, monkeypatch):
    timed = {"prefill": {"p50": 0.1}, "update": {"p50": 0.5}}
    monkeypatch.setattr(visual, "time_work", lambda config, tokens, repeats: timed)
    rows = visual.measure_costs(tokenizer, catalogue, histories=(1, 4), candidates=(5, 20), max_tokens=1500, repeats=1)
    assert len(rows) == 4 * 3
    for row in rows:
        assert (row["seconds"] is None) == (row["prompt_tokens"] > 1500)
        assert row["flops_qwen3_4b"]["update"] > row["flops_qwen3_4b"]["prefill"] > row["flops"]["prefill"]
    assert json.loads(json.dumps(rows)) == rows
    texts = {text.text for text in ElementTree.fromstring(visual.draw_costs(rows)).iter("{http://www.w3.org/2000/svg}text")}
    assert {"titles", "captions", "pictures", "items in the history", "items in the candidates"} <= texts
    assert "captions" in visual.format_costs(rows)


def test_time_is_measured_on_a_real_program():
    small = dataclasses.replace(visual.make_config(), model=dataclasses.replace(visual.MODEL, num_layers=1, hidden_size=32))
    found = visual.time_work(small, 24, repeats=2)
    assert min(found["prefill"]["p50"], found["update"]["p50"]) > 0
