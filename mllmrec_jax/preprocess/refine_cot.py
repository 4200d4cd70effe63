"""Stage 3: the refined trace from titles, captions and the pseudo-CoT; `Step 4:` is the predicted profile."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mllmrec_jax.preprocess.backends.protocol import Request, ShownItem, Writer, make_request
from mllmrec_jax.preprocess.caption import Captions
from mllmrec_jax.preprocess.samples import Samples
from mllmrec_jax.preprocess.templates import render_refine_cot

_STEP = re.compile(r"^\W*step\s*([1-4])\b\W*", re.IGNORECASE | re.MULTILINE)


def make_refine_request(history: Sequence[int], draft: str, samples: Samples, captions: Captions, writer: Writer, *, noun: str) -> Request:
    """The request for one history (item ids, oldest first) and its pseudo-CoT, empty where that stage is left out."""
    items = [ShownItem(samples.dataset.items[item].title, captions.find(item)) for item in history]
    return make_request("refine_cot", render_refine_cot(items, draft, noun=noun), items, writer.describe(), draft=draft)


def finish_trace(text: str) -> str:
    """The four lines `Step 1:` to `Step 4:` out of what a model wrote, each on one line; empty where one of them is missing.

    Where a model wrote the steps twice, the last of each counts; what it wrote before the first step does not.
    """
    marks = list(_STEP.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    steps = {mark[1]: " ".join(text[mark.end() : end].split()) for mark, end in zip(marks, ends, strict=False)}
    return "\n".join(f"Step {number}: {steps[number]}" for number in "1234") if all(steps.get(number) for number in "1234") else ""


def find_profile(trace: str) -> str:
    """The predicted profile: what `Step 4:` of a finished trace says; empty for an empty trace."""
    return trace.rpartition("\nStep 4: ")[2]
