"""Windows and candidates to token ids: the arrays that shards hold and batches are cut from, and the audit that reads them back."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mllmrec_jax.config import ItemField, PromptConfig, to_dict
from mllmrec_jax.data.candidates import CandidateSet
from mllmrec_jax.data.records import DataError, Dataset, Item, Part, find_rows
from mllmrec_jax.data.splits import Window
from mllmrec_jax.data.tokenizer import Tokenizer
from mllmrec_jax.progress import track
from mllmrec_jax.prompts import (
    ItemText,
    PromptError,
    PromptInput,
    describe_item,
    list_wording,
    mentions_title,
    render_answer,
    render_prompt,
    split_prompt,
    write_item_id,
)

_FORMAT = 1  # counts changes of what the arrays mean
_KEPT = 1 << 14  # items whose text is kept while prompts are written: the same are shown again and again


class LeakError(ValueError):
    """A written prompt tells its target; the message names the user, the target and where it stands."""


@dataclass(frozen=True)
class TokenisedExamples:
    """N examples of one split, and the table of the I items that `candidates` and `target` point into. All NumPy.

    Padding is on the right, with `pad_id`; lengths say what is there.
    """

    prompt: np.ndarray
    """[N, P] int32: the chat template around the user's message, up to where the answer starts."""
    prompt_length: np.ndarray
    """[N] int32."""
    history_mask: np.ndarray
    """[N, P] uint8: 1 at the history's item tokens; all 0 where items are not one token."""
    answer: np.ndarray
    """[N, C] int32: the target's answer, stop token included."""
    answer_length: np.ndarray
    """[N] int32."""
    candidates: np.ndarray
    """[N, K] int32: rows of the item table, in the order shown."""
    target: np.ndarray
    """[N] int32: row of the item table."""
    user: np.ndarray
    """[N] int64."""
    provenance: np.ndarray
    """[N] uint64: hash of all that shaped the example."""
    item_id: np.ndarray
    """[I] int64, ascending."""
    item_answer: np.ndarray
    """[I, Ca] int32: every item's answer, stop token included."""
    item_answer_length: np.ndarray
    """[I] int32."""
    pad_id: int
    dropped_history: int
    """How many history items were left out, over all prompts, to keep within `max_prompt_tokens`."""


def _hash_windows(windows: Sequence[Window]) -> str:
    numbers = array("q")
    for window in windows:
        numbers.extend((window.user, window.target, window.position, len(window.history)))
        numbers.extend(window.history)
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


def describe_provenance(
    windows: Sequence[Window],
    candidate_set: CandidateSet,
    dataset: Dataset,
    tokenizer: Tokenizer,
    config: PromptConfig,
    *,
    part: Part,
    reasoning: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """Everything that shapes the examples, as plain JSON values; equal descriptions mean equal arrays."""
    traces = json.dumps(sorted((reasoning or {}).items()))
    return {
        "examples": _FORMAT,
        "part": part,
        "dataset": dataset.content_hash,
        "windows": _hash_windows(windows),
        "candidates": candidate_set.content_hash,
        "tokenizer": tokenizer.fingerprint,
        "template": hashlib.sha256(tokenizer.template.encode()).hexdigest()[:16],
        "prompt": to_dict(config),
        "reasoning": hashlib.sha256(traces.encode()).hexdigest()[:16] if reasoning else None,
    }


def _describe(item: Item, fields: Sequence[ItemField], config: PromptConfig) -> ItemText:
    return describe_item(item.id, title=item.title, genres=item.genres, caption=item.caption, fields=fields, config=config)


@dataclass(frozen=True)
class _TrainingTexts:
    """Written anew each time they are gone through: those of a large catalogue are not held in memory."""

    dataset: Dataset
    config: PromptConfig
    item_tokens: bool

    def __iter__(self) -> Iterator[str]:
        config = self.config
        wording = [*list_wording(config), "user\n", "assistant\n"]
        titled = config.answer_title or "title" in (*config.history_fields, *config.candidate_fields)
        for item in self.dataset.items.values():
            yield from wording
            if not self.item_tokens:
                yield write_item_id(item.id)
            text = _describe(item, (*config.history_fields, *config.candidate_fields, *(("title",) if titled else ())), config)
            yield from (f" {part}\n" for part in (text.title, text.detail) if part)


def list_training_texts(dataset: Dataset, config: PromptConfig, *, item_tokens: bool) -> Iterable[str]:
    """What a tokenizer should be trained on: each item as prompts and answers write it, and, as often, the prompts' own wording."""
    return _TrainingTexts(dataset, config, item_tokens)


def _pad_rows(flat: array, lengths: np.ndarray, pad_id: int) -> np.ndarray:
    """[N, max length] int32 out of rows laid end to end."""
    rows = np.full((len(lengths), int(lengths.max())), pad_id, np.int32)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = np.frombuffer(flat, np.int32)
    return rows


class ItemTable(NamedTuple):
    """The catalogue's answers: the `item_` arrays of `TokenisedExamples`, which are the same for all splits."""

    item_id: np.ndarray
    item_answer: np.ndarray
    item_answer_length: np.ndarray


def tokenise_items(dataset: Dataset, tokenizer: Tokenizer, config: PromptConfig) -> ItemTable:
    """Writes and encodes every item's answer."""
    ordered, ids, lengths = array("q", sorted(dataset.items)), array("i"), array("i")
    for item_id in ordered:
        text = _describe(dataset.items[item_id], ("title",), config) if config.answer_title else ItemText(item_id)
        answer = tokenizer.encode_answer(render_answer(text, config))
        ids.extend(answer)
        lengths.append(len(answer))
    length = np.frombuffer(lengths, np.int32)
    return ItemTable(np.frombuffer(ordered, np.int64), _pad_rows(ids, length, tokenizer.pad_id), length)


def _find_known_rows(item_id: np.ndarray, wanted: np.ndarray, what: str) -> np.ndarray:
    rows = find_rows(item_id, wanted)
    if (rows < 0).any():
        raise DataError(f"{what}: expected items of the catalogue ({len(item_id)} items), got the unknown item {wanted[rows < 0][0]}")
    return rows.astype(np.int32)


def _remember_texts(dataset: Dataset, fields: Sequence[ItemField], config: PromptConfig) -> Callable[[int], ItemText]:
    """Item id to what prompts say of it; raises DataError for an unknown item."""

    @functools.lru_cache(_KEPT)
    def find(item_id: int) -> ItemText:
        item = dataset.items.get(item_id)
        if item is None:
            raise DataError(f"{dataset.name}: expected items of the catalogue, got the unknown item {item_id}")
        return _describe(item, fields, config)

    return find


class _PromptWriter:
    """Renders and encodes prompts."""

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, config: PromptConfig):
        self._tokenizer, self._config = tokenizer, config
        self._find_chosen = _remember_texts(dataset, config.history_fields, config)
        self._find_candidate = _remember_texts(dataset, config.candidate_fields, config)

    def write(self, window: Window, candidates: Sequence[int], reasoning: str | None) -> tuple[list[int], list[int], int]:
        """Ids, positions of history items, and how many of the oldest history items had to go."""
        config = self._config
        history, shown = tuple(map(self._find_chosen, window.history)), tuple(map(self._find_candidate, candidates))

        def encode(dropped: int) -> tuple[list[int], list[int], int]:
            try:
                segments = render_prompt(PromptInput(history[dropped:], shown, reasoning), config)
            except PromptError as error:
                raise DataError(f"user {window.user}, item {window.position} of its sequence: {error}") from None
            return (*self._tokenizer.encode_prompt(segments), dropped)

        def fits(written: tuple[list[int], list[int], int]) -> bool:
            return len(written[0]) <= config.max_prompt_tokens

        if fits(whole := encode(0)):
            return whole
        shortest = encode(max(0, len(history) - 1))
        if not fits(shortest):
            raise DataError(
                f"user {window.user}: expected a prompt of at most {config.max_prompt_tokens} tokens, got {len(shortest[0])} with a single "
                "history item; raise prompt.max_prompt_tokens, or show fewer fields or candidates"
            )
        too_few = 0
        while shortest[2] - too_few > 1:  # the fewest dropped that fit: prompts shorten with every item
            middle = encode((too_few + shortest[2]) // 2)
            too_few, shortest = (too_few, middle) if fits(middle) else (middle[2], shortest)
        return shortest


def tokenise_windows(
    windows: Sequence[Window],
    candidate_set: CandidateSet,
    dataset: Dataset,
    tokenizer: Tokenizer,
    config: PromptConfig,
    *,
    part: Part,
    reasoning: Mapping[int, str] | None = None,
    items: ItemTable | None = None,
) -> TokenisedExamples:
    """Writes and encodes every window's prompt and answer.

    A prompt over `config.max_prompt_tokens` loses its oldest history first, one item at a time, and says so in `dropped_history`; its
    question and candidates are never cut.

    Args:
      windows: N windows of `dataset`, at least one.
      candidate_set: candidates [N, K], each row with the window's target in it once.
      dataset: the catalogue.
      tokenizer: with a token for every item, where items are tokens.
      config: what prompts say.
      part: the split these windows are.
      reasoning: user to trace, shown in prompts for reference; for training prompts only.
      items: `tokenise_items` of the same data set, tokenizer and settings, where there are several splits; None: it is made here.

    Raises:
      DataError: no windows, an empty history, an unknown item, candidates of other windows, or a prompt that does not fit with a single
        history item.
      ValueError: reasoning for a split other than train.
    """
    if reasoning and part != "train":
        raise ValueError(f"reasoning: expected none for part '{part}': traces belong in training prompts only, got {len(reasoning)}")
    if not windows:
        raise DataError(f"{dataset.name}: expected at least one {part} window, got none")
    if len(windows) != len(candidate_set.candidates):
        raise DataError(
            f"{dataset.name}: expected a row of candidates for each of {len(windows)} windows, got {len(candidate_set.candidates)}"
        )
    item_id, item_answer, item_answer_length = items or tokenise_items(dataset, tokenizer, config)
    candidates = _find_known_rows(item_id, candidate_set.candidates, "candidates")
    target = _find_known_rows(item_id, np.fromiter((window.target for window in windows), np.int64, len(windows)), "targets")
    wrong = (candidates == target[:, None]).sum(axis=1) != 1
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(f"candidates row {row}: expected the target of user {windows[row].user}, item {windows[row].target}, exactly once")

    description = describe_provenance(windows, candidate_set, dataset, tokenizer, config, part=part, reasoning=reasoning)
    chain = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).digest()
    writer = _PromptWriter(dataset, tokenizer, config)
    flat, lengths, provenance = array("i"), array("i"), array("Q")
    marked_rows, marked_columns = array("q"), array("q")
    dropped_history = 0
    listed: Sequence[Sequence[int]] = candidate_set.candidates.tolist()
    for row, window in enumerate(track(windows, description=f"tokenise {part}", unit="prompt")):
        trace = None if reasoning is None else reasoning.get(window.user)
        ids, positions, dropped = writer.write(window, listed[row], trace)
        dropped_history += dropped
        flat.extend(ids)
        lengths.append(len(ids))
        marked_rows.extend([row] * len(positions))
        marked_columns.extend(positions)
        content = array("q", (window.user, window.position, window.target, *listed[row], *ids))
        digest = hashlib.blake2b(content.tobytes(), digest_size=8, key=chain).digest()
        provenance.append(int.from_bytes(digest, "little"))
    prompt_length = np.frombuffer(lengths, np.int32).copy()
    prompt = _pad_rows(flat, prompt_length, tokenizer.pad_id)
    history_mask = np.zeros(prompt.shape, np.uint8)
    history_mask[np.frombuffer(marked_rows, np.int64), np.frombuffer(marked_columns, np.int64)] = 1
    answer_length = item_answer_length[target]
    return TokenisedExamples(
        prompt=prompt,
        prompt_length=prompt_length,
        history_mask=history_mask,
        answer=item_answer[target, : int(answer_length.max())],
        answer_length=answer_length,
        candidates=candidates,
        target=target,
        user=np.fromiter((window.user for window in windows), np.int64, len(windows)),
        provenance=np.frombuffer(provenance, np.uint64).copy(),
        item_id=item_id,
        item_answer=item_answer,
        item_answer_length=item_answer_length,
        pad_id=tokenizer.pad_id,
        dropped_history=dropped_history,
    )


def audit_prompts(examples: TokenisedExamples, dataset: Dataset, tokenizer: Tokenizer, config: PromptConfig, *, part: Part) -> int:
    """Reads every prompt back from its ids and fails if one tells its target.

    A target's id may stand in the candidate list, once, and nowhere else; its title may not be named in a reasoning trace. The titles of
    the *history's* own items are not searched: "Toy Story 2" holds "Toy Story" and gives nothing away that the item's id does not.

    Args:
      examples: what was written (read it back from its shards, so that the audit sees what training will).
      dataset: the catalogue.
      tokenizer: the one `examples` was made with.
      config: what prompts say.
      part: the split; reasoning outside train is a leak.

    Returns:
      How many prompts were read.

    Raises:
      LeakError: a prompt tells its target, or holds what its split must not.
      PromptError: a prompt is not readable as one written with `config`.
    """
    item_id = examples.item_id
    candidates, targets = item_id[examples.candidates].tolist(), item_id[examples.target].tolist()
    for row, target in enumerate(track(targets, description=f"leak audit {part}", unit="prompt")):
        where = f"{part} prompt {row} of user {examples.user[row]}"
        ids = examples.prompt[row, : examples.prompt_length[row]].tolist()
        parts = split_prompt(tokenizer.decode(ids, keep_stops=True), config)
        if target in parts.history:
            raise LeakError(f"{where}: its target, item {target}, stands in the history")
        shown = tuple(candidates[row]) if config.list_candidates else ()
        if parts.candidates != shown:
            raise LeakError(f"{where}: expected the candidates {shown}, got {parts.candidates}")
        if parts.reasoning is None:
            continue
        if part != "train":
            raise LeakError(f"{where}: holds reasoning, which belongs in training prompts only: {parts.reasoning[:80]!r}")
        if re.search(rf"ITEM\W*_?\W*{target}(?!\d)", parts.reasoning, re.IGNORECASE):
            raise LeakError(f"{where}: its target, item {target}, is named in the reasoning: {parts.reasoning[:80]!r}")
        title = dataset.items[target].title
        if mentions_title(parts.reasoning, title):
            raise LeakError(
                f"{where}: the title of its target, item {target} {title!r}, is named in the reasoning: {parts.reasoning[:80]!r}"
            )
    return len(targets)
