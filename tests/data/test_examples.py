"""Windows become the ids they should, lose only their oldest history, and never tell their target."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mllmrec_jax.data.examples as examples_module
from mllmrec_jax.config import PromptConfig, TokenizerConfig
from mllmrec_jax.data.candidates import CandidateSet, draw_candidates
from mllmrec_jax.data.examples import (
    LeakError,
    TokenisedExamples,
    audit_prompts,
    describe_provenance,
    list_training_texts,
    tokenise_items,
    tokenise_windows,
)
from mllmrec_jax.data.records import DataError, Dataset, History, Item, make_dataset
from mllmrec_jax.data.splits import Window
from mllmrec_jax.data.tokenizer import Tokenizer, load_tokenizer
from mllmrec_jax.prompts import parse_answer, sanitise_text, split_prompt

TITLES = [
    "Heat (1995)",
    "<|im_end|>",
    "[ITEM_7] planted",
    "</think>\nnext",
    "\u202e\x00\ud800",
    "Toy Story",
    "Toy Story 2",
    "It",
    "",
    "candidates",
]
FULL, COMPACT = PromptConfig(), PromptConfig(style="compact")
BARE = PromptConfig(style="compact", history_fields=(), candidate_fields=(), answer_title=False)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    items = [Item(3 * row + 1, TITLES[row % len(TITLES)], ("Drama",), f"caption {row}") for row in range(40)]
    generator = np.random.default_rng(0)
    histories = [History(100 + user, tuple(3 * int(row) + 1 for row in generator.permutation(40)[:12])) for user in range(30)]
    return make_dataset("tiny", items, histories)


@pytest.fixture(scope="module")
def windows(dataset: Dataset) -> list[Window]:
    return [
        Window(history.user, history.items[max(0, place - 8) : place], history.items[place], place)
        for history in dataset.histories
        for place in (1, 5, 11)
    ]


@pytest.fixture(scope="module")
def candidate_set(dataset: Dataset, windows: list[Window]) -> CandidateSet:
    return draw_candidates(windows, dataset, negatives=4, sampling="uniform", seed=0)


@pytest.fixture(scope="module")
def make_tokenizer(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.mktemp("bpe")

    def make(config: PromptConfig, *, item_tokens: bool = True) -> Tokenizer:
        texts = list_training_texts(dataset, config, item_tokens=item_tokens)
        return load_tokenizer(TokenizerConfig(vocab_size=400, item_tokens=item_tokens), item_ids=dataset.items, texts=texts, cache=cache)

    return make


CONFIGS = [FULL, COMPACT, BARE, dataclasses.replace(FULL, list_candidates=False, candidate_fields=("title", "genres", "caption"))]


@pytest.mark.parametrize("item_tokens", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=["full", "compact", "bare", "unlisted"])
def test_arrays_say_what_the_windows_say(
    dataset: Dataset, windows: list[Window], candidate_set: CandidateSet, make_tokenizer: Any, config: PromptConfig, item_tokens: bool
) -> None:
    tokenizer = make_tokenizer(config, item_tokens=item_tokens)
    examples = tokenise_windows(windows, candidate_set, dataset, tokenizer, config, part="valid")
    assert examples.item_id.tolist() == sorted(dataset.items) and examples.dropped_history == 0
    assert examples.prompt.shape[1] == examples.prompt_length.max() and examples.answer.shape[1] == examples.answer_length.max()
    for row, window in enumerate(windows):
        ids, length = examples.prompt[row], examples.prompt_length[row]
        assert (ids[length:] == tokenizer.pad_id).all() and not examples.history_mask[row, length:].any()
        parts = split_prompt(tokenizer.decode(ids[:length], keep_stops=True), config)
        assert parts.history == window.history and parts.reasoning is None
        assert parts.candidates == (tuple(candidate_set.candidates[row].tolist()) if config.list_candidates else ())
        marked = ids[examples.history_mask[row] == 1]
        assert marked.size == (len(window.history) if item_tokens else 0)
        assert [tokenizer.decode([id_]) for id_ in marked] == [f"[ITEM_{item}]" for item in window.history][: marked.size]
        assert examples.item_id[examples.candidates[row]].tolist() == candidate_set.candidates[row].tolist()
        assert examples.item_id[examples.target[row]] == window.target and examples.user[row] == window.user
        answer = examples.answer[row, : examples.answer_length[row]]
        assert answer[-1] == tokenizer.stop_ids[0]
        assert (examples.item_answer[examples.target[row], : examples.answer_length[row]] == answer).all()
        parsed = parse_answer(tokenizer.decode(answer))
        assert parsed is not None and parsed.item_id == window.target
        assert parsed.title == (sanitise_text(dataset.items[window.target].title) if config.answer_title else "")
    assert audit_prompts(examples, dataset, tokenizer, config, part="valid") == len(windows)
    for name, dtype in {
        "prompt": "i4",
        "history_mask": "u1",
        "provenance": "u8",
        "user": "i8",
        "target": "i4",
        "answer_length": "i4",
    }.items():
        assert getattr(examples, name).dtype == np.dtype(dtype)


def test_long_prompts_lose_their_oldest_history_and_nothing_else(
    dataset: Dataset, windows: list[Window], candidate_set: CandidateSet, make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer(FULL)
    whole = tokenise_windows(windows, candidate_set, dataset, tokenizer, FULL, part="test")
    limit = int(whole.prompt_length.max()) - 25
    config = dataclasses.replace(FULL, max_prompt_tokens=limit)
    cut = tokenise_windows(windows, candidate_set, dataset, tokenizer, config, part="test")
    dropped = 0
    for row, window in enumerate(windows):
        parts = split_prompt(tokenizer.decode(cut.prompt[row, : cut.prompt_length[row]], keep_stops=True), config)
        kept = len(parts.history)
        assert kept >= 1 and parts.history == window.history[len(window.history) - kept :]
        assert parts.candidates == tuple(candidate_set.candidates[row].tolist())
        assert cut.prompt_length[row] <= limit
        if kept < len(window.history):  # one more would not have fitted
            longer = dataclasses.replace(window, history=window.history[len(window.history) - kept - 1 :])
            one = CandidateSet(candidate_set.candidates[row : row + 1], "")
            alone = tokenise_windows([longer], one, dataset, tokenizer, FULL, part="test")
            assert alone.prompt_length[0] > limit
        else:
            assert cut.prompt_length[row] == whole.prompt_length[row]
        dropped += len(window.history) - kept
    assert cut.dropped_history == dropped > 0
    with pytest.raises(DataError, match=r"at most 20 tokens, got \d+ with a single history item"):
        tokenise_windows(windows, candidate_set, dataset, tokenizer, dataclasses.replace(FULL, max_prompt_tokens=20), part="test")


def test_bad_windows_are_refused(dataset: Dataset, windows: list[Window], candidate_set: CandidateSet, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(BARE)

    def tokenise(some: list[Window], candidates: CandidateSet = candidate_set, **options: Any) -> None:
        given: dict[str, Any] = {"part": "test"} | options
        tokenise_windows(some, candidates, dataset, tokenizer, BARE, **given)

    first = CandidateSet(candidate_set.candidates[:1], "")
    with pytest.raises(DataError, match="at least one test window"):
        tokenise([])
    with pytest.raises(DataError, match="row of candidates for each of 1 windows, got 90"):
        tokenise(windows[:1])
    with pytest.raises(DataError, match=r"user 100, item 1 .*history: expected at least one item"):
        tokenise([dataclasses.replace(windows[0], history=())], first)
    with pytest.raises(DataError, match="unknown item 999"):
        tokenise([dataclasses.replace(windows[0], history=(999,))], first)
    with pytest.raises(DataError, match="unknown item 999"):
        tokenise(windows[:1], CandidateSet(np.where(first.candidates == windows[0].target, 999, first.candidates), ""))
    with pytest.raises(DataError, match=r"target of user 100, item \d+, exactly once"):
        tokenise(windows[:1], CandidateSet(candidate_set.candidates[3:4], ""))
    with pytest.raises(ValueError, match="training prompts only"):
        tokenise(windows, reasoning={100: "so"})


def test_provenance_follows_everything(dataset: Dataset, windows: list[Window], candidate_set: CandidateSet, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(COMPACT)

    def describe(**changes: Any) -> dict[str, Any]:
        given = {
            "windows": windows,
            "candidate_set": candidate_set,
            "dataset": dataset,
            "tokenizer": tokenizer,
            "config": COMPACT,
            "part": "train",
        }
        given |= changes
        positional = [given.pop(name) for name in ("windows", "candidate_set", "dataset", "tokenizer", "config")]
        return describe_provenance(*positional, **given)

    assert describe() == describe()
    shorter = [dataclasses.replace(window, history=window.history[-1:]) for window in windows]
    changed = [
        describe(windows=shorter),
        describe(candidate_set=draw_candidates(windows, dataset, negatives=4, sampling="uniform", seed=1)),
        describe(dataset=dataclasses.replace(dataset, content_hash="other")),
        describe(tokenizer=make_tokenizer(COMPACT, item_tokens=False)),
        describe(config=dataclasses.replace(COMPACT, noun="song")),
        describe(part="valid"),
        describe(reasoning={100: "so"}),
        describe(reasoning={100: "not so"}),
    ]
    assert len({str(description) for description in [describe(), *changed]}) == 1 + len(changed)

    hashes = tokenise_windows(windows, candidate_set, dataset, tokenizer, COMPACT, part="train").provenance
    assert len(set(hashes.tolist())) == len(windows)
    again = tokenise_windows(windows, candidate_set, dataset, tokenizer, COMPACT, part="train").provenance
    other = tokenise_windows(windows, candidate_set, dataset, tokenizer, COMPACT, part="test").provenance
    assert (hashes == again).all() and (hashes != other).all()


@pytest.mark.parametrize("config", [FULL, BARE])
def test_one_table_of_items_serves_every_split(
    config: PromptConfig, dataset: Dataset, windows: list[Window], candidate_set: CandidateSet, make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer(config)
    table = tokenise_items(dataset, tokenizer, config)
    for part in ("train", "test"):
        alone = tokenise_windows(windows, candidate_set, dataset, tokenizer, config, part=part)
        shared = tokenise_windows(windows, candidate_set, dataset, tokenizer, config, part=part, items=table)
        for field in dataclasses.fields(TokenisedExamples):
            np.testing.assert_array_equal(getattr(shared, field.name), getattr(alone, field.name))


def test_texts_that_are_not_kept_are_written_the_same(
    dataset: Dataset, windows: list[Window], candidate_set: CandidateSet, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(FULL)
    kept = tokenise_windows(windows, candidate_set, dataset, tokenizer, FULL, part="test")
    monkeypatch.setattr(examples_module, "_KEPT", 2)
    anew = tokenise_windows(windows, candidate_set, dataset, tokenizer, FULL, part="test")
    np.testing.assert_array_equal(anew.prompt, kept.prompt)
    np.testing.assert_array_equal(anew.provenance, kept.provenance)


@pytest.fixture(scope="module")
def traced(
    dataset: Dataset, windows: list[Window], candidate_set: CandidateSet, make_tokenizer: Any
) -> tuple[Tokenizer, TokenisedExamples]:
    tokenizer = make_tokenizer(FULL)
    traces = {100: "they like </think> drama", 101: "they like [ITEM_1000] and comedies"}
    return tokenizer, tokenise_windows(windows, candidate_set, dataset, tokenizer, FULL, part="train", reasoning=traces)


def test_reasoning_is_written_for_its_user(traced: tuple[Tokenizer, TokenisedExamples], dataset: Dataset) -> None:
    tokenizer, examples = traced
    found = {}
    for row in range(len(examples.user)):
        parts = split_prompt(tokenizer.decode(examples.prompt[row, : examples.prompt_length[row]], keep_stops=True), FULL)
        found.setdefault(int(examples.user[row]), set()).add(parts.reasoning)
    assert found[100] == {"they like \u2039/think> drama"} and found[101] == {"they like (ITEM_1000] and comedies"} and found[102] == {None}
    assert audit_prompts(examples, dataset, tokenizer, FULL, part="train") == len(examples.user)


def test_audit_finds_leaks(
    dataset: Dataset, windows: list[Window], candidate_set: CandidateSet, traced: tuple[Tokenizer, TokenisedExamples]
) -> None:
    tokenizer, examples = traced
    with pytest.raises(LeakError, match=r"test prompt 0 of user 100: holds reasoning"):
        audit_prompts(examples, dataset, tokenizer, FULL, part="test")

    telling = dataclasses.replace(windows[0], history=(windows[0].target,))
    one = CandidateSet(candidate_set.candidates[:1], "")
    leaked = tokenise_windows([telling], one, dataset, tokenizer, FULL, part="test")
    with pytest.raises(LeakError, match="stands in the history"):
        audit_prompts(leaked, dataset, tokenizer, FULL, part="test")

    row = next(row for row, window in enumerate(windows) if dataset.items[window.target].title == "Heat (1995)")
    target, user = windows[row].target, windows[row].user
    for trace, fault in [("next comes Heat!", "the title"), (f"so [ITEM_{target}]", "named"), (f"maybe item {target}", "named")]:
        rows = CandidateSet(candidate_set.candidates[row : row + 1], "")
        leaked = tokenise_windows([windows[row]], rows, dataset, tokenizer, FULL, part="train", reasoning={user: trace})
        with pytest.raises(LeakError, match=fault):
            audit_prompts(leaked, dataset, tokenizer, FULL, part="train")

    swapped = dataclasses.replace(examples, candidates=examples.candidates[:, ::-1])
    with pytest.raises(LeakError, match="expected the candidates"):
        audit_prompts(swapped, dataset, tokenizer, FULL, part="train")


def test_real_titles(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "ml-1m" / "movies.dat").read_text("latin-1").splitlines()[:400]
    items = [Item(int(line.split("::")[0]), line.split("::")[1]) for line in lines]
    ids = [item.id for item in items]
    dataset = make_dataset("real", items, [History(user, tuple(ids[user : user + 9])) for user in range(300)])
    windows = [Window(history.user, history.items[:8], history.items[8], 8) for history in dataset.histories]
    candidate_set = draw_candidates(windows, dataset, negatives=9, sampling="uniform", seed=0)
    texts = list_training_texts(dataset, FULL, item_tokens=True)
    tokenizer = load_tokenizer(TokenizerConfig(), item_ids=ids, texts=texts, cache=tmp_path)
    examples = tokenise_windows(windows, candidate_set, dataset, tokenizer, FULL, part="test")
    assert audit_prompts(examples, dataset, tokenizer, FULL, part="test") == 300
    answers = [
        parse_answer(tokenizer.decode(row[:length])) for row, length in zip(examples.item_answer, examples.item_answer_length, strict=True)
    ]
    assert [(answer.item_id, answer.title) for answer in answers if answer] == [(item.id, sanitise_text(item.title)) for item in items]


def test_documented_example(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "shard-format.md").read_text(encoding="utf-8")
    page = " ".join(page.split())
    items = [Item(number, f"t{number}") for number in (10, 20, 30, 40, 50)]
    dataset = make_dataset("documented", items, [History(7, (10, 20, 30)), History(8, (20, 50))])
    windows = [Window(7, (10, 20), 30, 2), Window(8, (20,), 50, 1)]
    candidate_set = CandidateSet(np.array([[30, 50, 40], [10, 30, 50]]), "c0")
    texts = list_training_texts(dataset, BARE, item_tokens=True)
    tokenizer = load_tokenizer(TokenizerConfig(vocab_size=320), item_ids=dataset.items, texts=texts, cache=tmp_path)
    examples = tokenise_windows(windows, candidate_set, dataset, tokenizer, BARE, part="train")
    for name in ("prompt", "history_mask", "answer", "candidates"):
        first, second = (" ".join(map(str, row)) for row in getattr(examples, name).tolist())
        assert re.search(rf" {name} {first} [^|`]*?{second} ", page), name
    for name in ("prompt_length", "target", "user", "item_id"):
        assert f" {name} {', '.join(map(str, getattr(examples, name).tolist()))} " in page, name
