"""Stage 8: the enriched data set and the tokenised shards, in one folder that is whole or absent, under a manifest that chains all stages.

    dataset/                 the data set in the MLLMRec-R1 layout, with captions and the traces kept, each for the training it was kept
                             for; pictures are not copied
    shards/sft, grpo, test   see docs/shard-format.md; each training set with the traces kept for it, the test set without any
    manifest.json            the hash of each stage, of each stage before it, and of every file here

Nothing in it depends on when, where or in how many attempts it was made.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllmrec_jax.config import RunConfig, fingerprint
from mllmrec_jax.data.candidates import CandidateSet, draw_candidates
from mllmrec_jax.data.examples import audit_prompts, describe_provenance, list_training_texts, tokenise_items, tokenise_windows
from mllmrec_jax.data.mllmrec_layout import write_mllmrec
from mllmrec_jax.data.records import Dataset, History, Item, Part, find_rows, hash_records
from mllmrec_jax.data.shards import write_shards
from mllmrec_jax.data.splits import Window
from mllmrec_jax.data.tokenizer import load_tokenizer
from mllmrec_jax.preprocess.caption import Captions
from mllmrec_jax.preprocess.folders import fill_folder, is_current
from mllmrec_jax.preprocess.samples import Samples


class _EnrichedItems(Mapping[int, Item]):
    """The items that some user chose, with captions and without pictures: each is made when it is asked for, from the caption's store."""

    def __init__(self, source: Dataset, captions: Captions):
        self._items, self._captions = source.items, captions
        chosen = np.unique(np.fromiter((item for history in source.histories for item in history.items), np.int64))
        item_id = np.fromiter(source.items, np.int64, len(source.items))
        self._left_out = frozenset(item_id[find_rows(chosen, item_id) < 0].tolist())

    def __getitem__(self, item_id: int) -> Item:
        if item_id in self._left_out:
            raise KeyError(item_id)
        item = self._items[item_id]
        return dataclasses.replace(item, caption=self._captions.find(item_id) or item.caption, image=None)

    def __iter__(self) -> Iterator[int]:
        return (item_id for item_id in self._items if item_id not in self._left_out)

    def __len__(self) -> int:
        return len(self._items) - len(self._left_out)


def enrich_dataset(samples: Samples, captions: Captions, sft_traces: Mapping[int, str], grpo_traces: Mapping[int, str]) -> Dataset:
    """The data set as `read_mllmrec` will read it back: captions in, times and pictures left out, traces (user to text) attached."""
    source = samples.dataset
    items = _EnrichedItems(source, captions)
    histories = [
        History(h.user, h.items, sft_reasoning=sft_traces.get(h.user), grpo_reasoning=grpo_traces.get(h.user), part=h.part)
        for h in source.histories
    ]
    if all(history.part for history in histories):  # one file a part
        order = {"train": 0, "valid": 1, "test": 2}
        histories.sort(key=lambda history: order[history.part or "train"])
    content_hash = hash_records(items.values(), histories)
    return dataclasses.replace(source, items=items, histories=tuple(histories), bad_rows=0, content_hash=content_hash)


def _draw(windows: Sequence[Window], dataset: Dataset, config: RunConfig, *, resample: int = 0) -> CandidateSet:
    data = config.data
    return draw_candidates(
        windows, dataset, negatives=data.negatives, sampling=data.negative_sampling, seed=data.candidate_seed, resample=resample
    )


def emit_all(
    folder: Path,
    samples: Samples,
    captions: Captions,
    sft_traces: Mapping[int, str],
    grpo_traces: Mapping[int, str],
    content: Mapping[str, Any],
    config: RunConfig,
) -> None:
    """Writes everything at the top of this page to `folder`, unless it is there already, in place of what an earlier run left there.

    Args:
      folder: renamed into place when whole.
      samples: data set, split, windows.
      captions: finished captions.
      sft_traces: user to trace, of the windows kept for SFT.
      grpo_traces: the same for GRPO.
      content: goes into the manifest: the hashes of the stages before, among others.
      config: data, prompt and tokenizer settings, as training will have them.

    Raises:
      LeakError: a written prompt tells its target.
    """
    dataset = enrich_dataset(samples, captions, sft_traces, grpo_traces)
    texts = list_training_texts(dataset, config.prompt, item_tokens=config.tokenizer.item_tokens)
    tokenizer = load_tokenizer(config.tokenizer, item_ids=dataset.items, texts=texts, cache=config.cache / "tokenizers")
    template = hashlib.sha256(tokenizer.template.encode()).hexdigest()
    content = {**content, "tokenizer": tokenizer.fingerprint, "template": template}
    if is_current(folder, content):
        return
    drawn = [_draw(samples.sft, dataset, config, resample=resample) for resample in range(config.data.sft_resamples)]
    sft_candidates = CandidateSet(np.concatenate([one.candidates for one in drawn]), fingerprint([one.content_hash for one in drawn]))
    with fill_folder(folder, content) as scratch:
        write_mllmrec(dataset, scratch / "dataset")
        shards = scratch / "shards"
        shards.mkdir()
        items = tokenise_items(dataset, tokenizer, config.prompt)

        def write(name: str, windows: Sequence[Window], drawn: CandidateSet, part: Part, traces: Mapping[int, str] | None = None) -> None:
            reasoning = dict(traces) if traces else None
            examples = tokenise_windows(windows, drawn, dataset, tokenizer, config.prompt, part=part, reasoning=reasoning, items=items)
            audit_prompts(examples, dataset, tokenizer, config.prompt, part=part)
            provenance = describe_provenance(windows, drawn, dataset, tokenizer, config.prompt, part=part, reasoning=reasoning)
            write_shards(shards / name, examples, provenance=provenance)

        write("sft", samples.sft * config.data.sft_resamples, sft_candidates, "train", sft_traces)
        write("grpo", samples.grpo, _draw(samples.grpo, dataset, config), "train", grpo_traces)
        write("test", samples.splits.test, _draw(samples.splits.test, dataset, config), "test")
