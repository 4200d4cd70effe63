"""Raw interactions to verified shards, content-addressed: each artefact's folder is named by everything that shaped it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mllmrec_jax.config import RunConfig, fingerprint
from mllmrec_jax.data.candidates import CandidateSet, draw_candidates, load_candidates, save_candidates
from mllmrec_jax.data.examples import (
    ItemTable,
    audit_prompts,
    describe_provenance,
    list_training_texts,
    tokenise_items,
    tokenise_windows,
)
from mllmrec_jax.data.load import load_dataset
from mllmrec_jax.data.records import Dataset, Part
from mllmrec_jax.data.shards import Shards, open_shards, write_shards
from mllmrec_jax.data.splits import Splits, Window, cut_windows, split_windows
from mllmrec_jax.data.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class TestLists:
    """Test windows with one frozen candidate list each, and the same tokenised."""

    windows: tuple[Window, ...]
    candidates: np.ndarray
    """[N, K] item ids."""
    shards: Shards


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything training and evaluation read."""

    dataset: Dataset
    splits: Splits
    tokenizer: Tokenizer
    sft: Shards
    grpo: Shards
    test: TestLists
    """With negatives as `data.negative_sampling` says."""
    test_popularity: TestLists
    """The same users with popularity-matched negatives."""
    notes: tuple[str, ...]
    """What a reader of results should know: rows skipped, users left out, history dropped."""


def _freeze_candidates(windows: Sequence[Window], dataset: Dataset, config: RunConfig, *, sampling: str, resample: int = 0) -> CandidateSet:
    """Draws candidate lists once; later runs read the same file, checked against its hash."""
    data = config.data
    provenance = {
        "data": dataset.content_hash,
        "negatives": data.negatives,
        "sampling": sampling,
        "seed": data.candidate_seed,
        "resample": resample,
    }
    key = fingerprint(provenance, [(w.user, w.position) for w in windows])
    path = config.cache / "candidates" / f"{key}.npz"
    if path.is_file():
        return load_candidates(path, windows, provenance=provenance)
    drawn = draw_candidates(
        windows,
        dataset,
        negatives=data.negatives,
        sampling=sampling,  # type: ignore[arg-type]
        seed=data.candidate_seed,
        resample=resample,
    )
    save_candidates(path, drawn, windows, provenance=provenance)
    return drawn


def _make_shards(
    windows: Sequence[Window],
    candidates: CandidateSet,
    dataset: Dataset,
    tokenizer: Tokenizer,
    config: RunConfig,
    *,
    make_items: Callable[[], ItemTable],
    part: Part,
    traces: Mapping[int, str | None] | None = None,
) -> Shards:
    """Opens the shards of these windows, writing them first where they are not there; a leak audit reads what was written.

    `traces` (user to trace) are shown where `config.prompt.reasoning` asks for them; `make_items` is called where there is something to
    write.
    """
    reasoning = {user: trace for user, trace in (traces or {}).items() if trace} if config.prompt.reasoning else None
    provenance = describe_provenance(windows, candidates, dataset, tokenizer, config.prompt, part=part, reasoning=reasoning)
    folder = config.cache / "shards" / f"{part}-{fingerprint(provenance)}"
    if not folder.is_dir():
        items = make_items()
        examples = tokenise_windows(windows, candidates, dataset, tokenizer, config.prompt, part=part, reasoning=reasoning, items=items)
        # Training windows without traces hold ids alone; all that could leak is in traces and in what is held out.
        if reasoning or part != "train":
            audit_prompts(examples, dataset, tokenizer, config.prompt, part=part)
        write_shards(folder, examples, provenance=provenance)
    return open_shards(folder, expected=provenance)


def _join(sets: Sequence[CandidateSet]) -> CandidateSet:
    return CandidateSet(np.concatenate([s.candidates for s in sets]), fingerprint([s.content_hash for s in sets]))


def _prepare_test(
    dataset: Dataset, splits: Splits, tokenizer: Tokenizer, config: RunConfig, *, make_items: Callable[[], ItemTable], sampling: str
) -> TestLists:
    candidates = _freeze_candidates(splits.test, dataset, config, sampling=sampling)
    shards = _make_shards(splits.test, candidates, dataset, tokenizer, config, make_items=make_items, part="test")
    return TestLists(splits.test, candidates.candidates, shards)


def prepare_data(config: RunConfig) -> Prepared:
    """Reads or generates the data, splits it, freezes candidates, trains or loads the tokenizer, writes or opens the shards.

    Raises:
      DataError, TokenizerError, PromptError, LeakError, ShardError: with file, what was expected, and what was there.
    """
    data = config.data
    dataset = load_dataset(data, config.cache)
    splits = split_windows(dataset, data)
    texts = list_training_texts(dataset, config.prompt, item_tokens=config.tokenizer.item_tokens)
    tokenizer = load_tokenizer(config.tokenizer, item_ids=dataset.items, texts=texts, cache=config.cache / "tokenizers")
    make_items = functools.cache(functools.partial(tokenise_items, dataset, tokenizer, config.prompt))

    users = splits.train_histories
    sft_count = round(data.sft_user_share * len(users))
    sft_users, grpo_users = users[:sft_count], users if sft_count == len(users) else users[sft_count:]
    sft_windows: list[Window] = []
    sft_candidates = []
    for resample in range(data.sft_resamples):
        windows = cut_windows(
            sft_users,
            kind=data.sft_windows,
            history_len=data.sft_history_len or data.history_len,
            seed=[data.split_seed, resample],
        )
        sft_windows += windows
        sft_candidates.append(_freeze_candidates(windows, dataset, config, sampling=data.negative_sampling, resample=resample))
    traces = {history.user: history.sft_reasoning for history in dataset.histories}
    sft = _make_shards(sft_windows, _join(sft_candidates), dataset, tokenizer, config, make_items=make_items, part="train", traces=traces)
    grpo_windows = cut_windows(grpo_users, kind=data.grpo_windows, history_len=data.history_len, seed=[data.split_seed])
    grpo_candidates = _freeze_candidates(grpo_windows, dataset, config, sampling=data.negative_sampling)
    traces = {history.user: history.grpo_reasoning for history in dataset.histories}
    grpo = _make_shards(grpo_windows, grpo_candidates, dataset, tokenizer, config, make_items=make_items, part="train", traces=traces)
    test = _prepare_test(dataset, splits, tokenizer, config, make_items=make_items, sampling=data.negative_sampling)
    test_popularity = _prepare_test(dataset, splits, tokenizer, config, make_items=make_items, sampling="popularity")

    dropped = sft.manifest["dropped_history"] + grpo.manifest["dropped_history"] + test.shards.manifest["dropped_history"]
    notes = [
        f"{len(dataset.histories):,} users, {len(dataset.items):,} items; {len(splits.test):,} test users; "
        f"{sft.rows:,} SFT and {grpo.rows:,} GRPO training windows",
        f"negatives: {data.negatives}, {data.negative_sampling}; history: at most {data.history_len} items",
    ]
    if dataset.bad_rows:
        notes.append(f"{dataset.bad_rows} malformed rows were skipped (data.max_bad_rows = {data.max_bad_rows})")
    if splits.left_out_users:
        notes.append(f"{splits.left_out_users} users with too few interactions were left out")
    if dropped:
        notes.append(f"{dropped} history items were dropped from prompts over prompt.max_prompt_tokens = {config.prompt.max_prompt_tokens}")
    return Prepared(dataset, splits, tokenizer, sft, grpo, test, test_popularity, tuple(notes))
