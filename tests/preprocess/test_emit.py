"""The enriched data set: equal to one that is held whole, and not held."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mllmrec_jax.data.mllmrec_layout import write_mllmrec
from mllmrec_jax.data.records import Dataset, History, Item, keep_chosen, make_dataset
from mllmrec_jax.preprocess.caption import Captions
from mllmrec_jax.preprocess.emit import enrich_dataset


class _Written(Captions):
    """A caption of about a thousand characters for every item whose id is no multiple of three."""

    def __init__(self) -> None:
        pass

    def find(self, item: int) -> str:
        return f"picture {item}. " + "red and blue " * 80 if item % 3 else ""


def make_source(items: int, *, part: bool) -> Dataset:
    """Every fifth item is nobody's; captions that the files have; users of all parts, not in their order."""
    catalogue = [Item(7 * row, f"T{row}", ("Drama",) * (row % 2), "old" * (row % 4), Path("x.jpg")) for row in range(items, 0, -1)]
    chosen = [item.id for item in catalogue if item.id % 5]
    parts = ("test", "train", "valid") if part else (None, None, None)
    histories = [History(user, tuple(chosen[user::9]), part=parts[user % 3]) for user in range(9)]
    return make_dataset("made", catalogue, histories, bad_rows=2, origin={"reader": "test"})


def enrich(source: Dataset) -> Dataset:
    samples: Any = SimpleNamespace(dataset=source)
    return enrich_dataset(samples, _Written(), {0: "because", 4: "so"}, {4: "so"})


@pytest.mark.parametrize("part", [True, False])
def test_enriched_data_set_is_what_one_held_whole_is(part: bool, tmp_path: Path) -> None:
    source, captions = make_source(50, part=part), _Written()
    items = [
        dataclasses.replace(item, caption=captions.find(item.id) or item.caption, image=None)
        for item in keep_chosen(source.items, source.histories)
    ]
    enriched = enrich(source)
    whole = make_dataset("made", items, enriched.histories, origin={"reader": "test"})
    assert dict(enriched.items) == whole.items and list(enriched.items) == list(whole.items)
    assert dataclasses.replace(enriched, items=whole.items) == whole
    assert len(enriched.items) == 40 and 35 not in enriched.items and enriched.items.get(4) is None
    for name, dataset in (("enriched", enriched), ("whole", whole)):
        write_mllmrec(dataset, tmp_path / name)
    written = {path.name: path.read_bytes() for path in (tmp_path / "enriched").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(written) == (7 if part else 5)


def test_captions_are_not_held(tmp_path: Path) -> None:
    source = make_source(4000, part=False)
    tracemalloc.start()
    try:
        enriched = enrich(source)
        write_mllmrec(enriched, tmp_path / "dataset")
        assert tracemalloc.get_traced_memory()[1] < 1_500_000  # the captions are 2.7 million characters
    finally:
        tracemalloc.stop()
    assert (tmp_path / "dataset" / "made_captions.json").stat().st_size > 2_000_000
