"""Stage 2: a first reasoning trace r from the history's titles and pictures, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from mllmrec_jax.preprocess.backends.protocol import Request, ShownItem, Writer, make_request
from mllmrec_jax.preprocess.samples import Samples
from mllmrec_jax.preprocess.templates import render_pseudo_cot


def make_pseudo_request(history: Sequence[int], samples: Samples, writer: Writer, *, noun: str) -> Request:
    """The request for one history (item ids, oldest first)."""
    items = [ShownItem(samples.dataset.items[item].title, picture=samples.find_picture(item)) for item in history]
    return make_request("pseudo_cot", render_pseudo_cot(items, noun=noun), items, writer.describe())
