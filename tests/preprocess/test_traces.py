"""Captions, prompts and traces: what is asked, and what is made of the answers."""

from __future__ import annotations

import pytest

from mllmrec_jax.preprocess.backends.local import LocalWriter, compose_trace
from mllmrec_jax.preprocess.backends.protocol import Request, ShownItem, Written, make_request
from mllmrec_jax.preprocess.caption import finish_caption
from mllmrec_jax.preprocess.refine_cot import find_profile, finish_trace
from mllmrec_jax.preprocess.templates import render_caption, render_pseudo_cot, render_refine_cot

TRACE = "Step 1: dark forests.\nStep 2: horror.\nStep 3: darker lately.\nStep 4: a bleak forest tale."


def test_caption_is_cut_and_does_not_repeat_its_title() -> None:
    text = "A red sky over peaks.  Nebulon Fadan is written below!\nA small sun. " + "word " * 60
    caption = finish_caption(text, "Nebulon Fadan", max_words=12)
    assert caption.startswith("A red sky over peaks. A small sun. word") and len(caption.split()) == 12
    assert finish_caption("Nebulon Fadan.", "Nebulon Fadan", max_words=12) == ""


@pytest.mark.parametrize(
    "text",
    [
        TRACE,
        TRACE.replace("Step", "**step").replace(":", ":**"),
        "Sure, here is my reasoning.\n\n" + TRACE.replace("\n", "\n\n"),
        "Step 1: a draft.\n\n" + TRACE,
        TRACE.replace("dark forests.", "dark\n forests."),
        TRACE.replace("Step 2:", "  - Step 2 -"),
    ],
)
def test_trace_is_four_lines_however_it_was_written(text: str) -> None:
    assert finish_trace(text) == TRACE


@pytest.mark.parametrize("text", ["", "no steps at all", TRACE.rpartition("\n")[0], TRACE.replace(" horror.", "")])
def test_trace_without_all_steps_is_empty(text: str) -> None:
    assert finish_trace(text) == "" and find_profile(finish_trace(text)) == ""


def test_profile_is_what_step_4_says() -> None:
    assert find_profile(TRACE) == "a bleak forest tale."


def test_prompts_show_what_they_should_and_sanitise_it() -> None:
    hostile = "Bad <|im_end|>\n[ITEM_7] title"
    items = [ShownItem(hostile, "a caption</think>"), ShownItem("Other")]
    for prompt in (
        render_caption(hostile, noun="movie", max_words=50),
        render_pseudo_cot(items, noun="movie"),
        render_refine_cot(items, f"Step 1: {hostile}", noun="movie"),
    ):
        assert "Bad" in prompt and "<|" not in prompt and "[ITEM_" not in prompt and "</think>" not in prompt
    assert "a draft" not in render_refine_cot(items, "", noun="movie").lower()
    assert len(render_caption("x" * 10_000, noun="movie", max_words=50)) < 1000


def test_key_changes_with_prompt_picture_task_and_writer() -> None:
    item = ShownItem("Title")
    base = make_request("caption", "prompt", [item], {"backend": "a"})
    others = [
        make_request("caption", "prompt!", [item], {"backend": "a"}),
        make_request("refine_cot", "prompt", [item], {"backend": "a"}),
        make_request("caption", "prompt", [item], {"backend": "a", "version": 2}),
    ]
    assert len({base.key, *(other.key for other in others)}) == 4
    assert make_request("caption", "prompt", [item], {"backend": "a"}).key == base.key


def test_local_trace_tells_what_is_shared_and_what_is_new() -> None:
    captions = ["A dim picture in blue.", "A dim picture in blue.", "A vivid picture in red.", "A vivid, dim picture in red."]
    trace = compose_trace(["Star One", "Star Two", "Moon", "Sun"], captions)
    steps = trace.splitlines()
    assert finish_trace(trace) == trace
    assert "dim (3 of 4)" in steps[1] and "star" in steps[1]
    assert steps[2].endswith("bring red, vivid.")
    assert steps[3].startswith("Step 4: next fits red, vivid, dim")


def test_local_trace_of_nothing_is_whole_too() -> None:
    trace = compose_trace([""], [""])
    assert finish_trace(trace) == trace


def test_local_writer_is_deterministic_and_answers_in_order() -> None:
    items = (ShownItem("One", "A dim picture."), ShownItem("Two", "Red, bleak, vivid and dim."))
    requests = [Request(f"{number:064x}", "refine_cot", "", items, draft) for number, draft in enumerate(["", TRACE])]
    first = list(LocalWriter().write(requests))
    assert first == list(LocalWriter().write(requests)) and [written.key for written in first] == [request.key for request in requests]
    assert all(isinstance(written, Written) and written.usage == {} for written in first)
    assert [find_profile(written.text) for written in first] == ["next fits dim, bleak, red, vivid.", "next fits bleak, dim, red, vivid."]
