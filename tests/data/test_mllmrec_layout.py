"""The MLLMRec-R1 layout: round trip, traces joined by user, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mllmrec_jax.config import DataConfig
from mllmrec_jax.data.mllmrec_layout import read_mllmrec, write_mllmrec
from mllmrec_jax.data.records import DataError, Dataset, History, Item, make_dataset
from mllmrec_jax.data.splits import split_windows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "toy"
    (root / "images").mkdir(parents=True)
    (root / "images" / "2.jpg").write_bytes(b"picture")
    (root / "toy_titles.csv").write_text('item,title\n1,"One, and ""more"""\n2,Two\n3,"Line\nbreak"\n4,Nobody\n', encoding="utf-8")
    (root / "train.tsv").write_text("10\t1 2 3\n11\t3 1\n")
    (root / "test.tsv").write_text("12\t2 3\n")
    (root / "toy_captions.json").write_text(json.dumps({"1": {"title": "One", "caption": "a red one"}, "2": "a blue one", "99": "gone"}))
    (root / "toy_deepseek_cot.json").write_text(json.dumps([{"line_idx": 1, "user_id": "11", "reasoning": "because"}]))
    (root / "toy_pseudo-cot.json").write_text(json.dumps([{"line_idx": 0, "user_id": "10", "reasoning": "knows the target"}]))
    return root


def config_of(root: Path, **options: object) -> DataConfig:
    return dataclasses.replace(DataConfig(source="mllmrec", path=root), **options)  # type: ignore[arg-type]


def test_every_file_finds_its_place(folder: Path):
    dataset = read_mllmrec(config_of(folder))
    assert dataset.name == "toy"
    assert dataset.histories == (
        History(10, (1, 2, 3), part="train"),
        History(11, (3, 1), part="train", sft_reasoning="because", grpo_reasoning="because"),
        History(12, (2, 3), part="test"),
    )
    assert dataset.items[1].title == 'One, and "more"'
    assert dataset.items[3].title == "Line\nbreak"
    assert [item.caption for item in dataset.items.values()] == ["a red one", "a blue one", ""]
    assert dataset.items[2].image == folder / "images" / "2.jpg"
    assert 4 not in dataset.items
    splits = split_windows(dataset, config_of(folder, split="given"))
    assert [w.user for w in splits.test] == [12]
    assert [h.user for h in splits.train_histories] == [10, 11]


def write_then_read(dataset: Dataset, folder: Path) -> Dataset:
    write_mllmrec(dataset, folder)
    return read_mllmrec(config_of(folder))


@pytest.mark.parametrize("part", [None, "train"])
def test_round_trip(part, tmp_path: Path):
    picture = tmp_path / "source.jpg"
    picture.write_bytes(b"bytes")
    hostile = 'a "quoted", title\nwith <|im_end|> and [ITEM_7] \u202e\u2028 é'
    items = [Item(7, hostile, ("Drama", "A|B"), "caption\n2", picture), Item(3, "Plain")]
    histories = [
        History(2, (7, 3), sft_reasoning="why", grpo_reasoning="why", part=part),
        History(1, (3,), part=part),
        History(3, (3, 7), sft_reasoning="so", part=part),
        History(4, (3, 7), grpo_reasoning="", part=part),
        History(5, (7,), sft_reasoning="first", grpo_reasoning="then", part=part),
    ]
    dataset = make_dataset("world", items, histories)
    back = write_then_read(dataset, tmp_path / "out")
    assert back.content_hash == dataset.content_hash and back.histories == dataset.histories
    assert back.items[7].image is not None
    assert back.items[7].image.read_bytes() == b"bytes"


def test_writing_refuses_a_folder_with_files(folder: Path):
    with pytest.raises(DataError, match="expected a new or empty folder"):
        write_mllmrec(make_dataset("toy", [Item(1, "One")], [History(1, (1,))]), folder)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("toy_titles.csv", "x,Title", "toy_titles.csv:7: expected a whole number and a title"),
        ("toy_titles.csv", "5,a,b", r"toy_titles.csv:7: expected a whole number and a title \(CSV\), got '5,a,b'"),
        ("toy_titles.csv", "2,Again", r"toy_titles.csv:7: expected each item id once, got item 2 again \(before: 'Two'\)"),
        ("train.tsv", "13 1 2", "train.tsv:3: expected user TAB item item ..., got '13 1 2'"),
        ("train.tsv", "13\t", r"train.tsv:3: expected at least one item id after the user, got none \(an empty history\)"),
        ("train.tsv", "13\t1 8", "train.tsv:3: expected item ids of the catalogue .*, got the unknown item 8"),
        ("train.tsv", "13\t1 1", "train.tsv:3: expected each item once in a user's history, got item 1 twice"),
        ("test.tsv", "10\t1 2", r"test.tsv:2: expected one row a user over all files, got user 10 again \(before: train.tsv:1\)"),
    ],
)
def test_a_malformed_row_is_named_or_skipped_and_counted(folder: Path, name: str, row: str, message: str):
    clean = read_mllmrec(config_of(folder))
    with (folder / name).open("a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError, match=message):
        read_mllmrec(config_of(folder))
    skipped = read_mllmrec(config_of(folder, max_bad_rows=1))
    assert skipped.bad_rows == 1
    assert skipped.content_hash == clean.content_hash


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("toy_titles.csv", "id,name\n1,One\n", "toy_titles.csv:1: expected the header item,title, got 'id,name'"),
        ("toy_titles.csv", "", "toy_titles.csv:1: expected the header item,title, got an empty file"),
        ("toy_captions.json", "[]", "expected an object"),
        ("toy_captions.json", '{"1": 3}', "got '1': 3"),
        ("toy_captions.json", "{", r"toy_captions.json:1: expected JSON"),
        ("toy_deepseek_cot.json", '[{"line_idx": 0, "reasoning": "x"}]', "row 0: expected user_id, got none .it has only line_idx"),
        ("toy_deepseek_cot.json", '[{"user_id": 10}]', "row 0: expected a whole-number user_id and a reasoning text"),
        ("toy_deepseek_cot.json", '[{"user_id": 10, "reasoning": "a"}, {"user_id": "10", "reasoning": "b"}]', "row 1: .* user 10 again"),
        ("toy_deepseek_cot.json", '[{"user_id": 10, "reasoning": "a", "stages": ["rl"]}]', "row 0: expected stages that are a list of sft"),
        (
            "toy_deepseek_cot.json",
            '[{"user_id": 10, "reasoning": "a"}, {"user_id": 10, "reasoning": "b", "stages": ["grpo"]}]',
            "row 1: .* user 10 again for grpo",
        ),
        ("other_titles.csv", "item,title\n", "expected one file of titles .*, got other_titles.csv, toy_titles.csv"),
        ("toy_second_cot.json", "[]", "expected at most one file of traces"),
    ],
)
def test_wrong_files_are_refused(folder: Path, name: str, text: str, message: str):
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_mllmrec(config_of(folder))


def test_a_split_the_files_do_not_name_is_refused(folder: Path):
    (folder / "toy_pairs.tsv").write_text("1\t1 2\n2\t2 3\n")
    (folder / "train.tsv").unlink()
    (folder / "test.tsv").unlink()
    dataset = read_mllmrec(config_of(folder))
    with pytest.raises(DataError, match="got user 1 without one; use 'by_user'"):
        split_windows(dataset, config_of(folder, split="given"))


def test_real_microlens(shared_data: Path):
    dataset = read_mllmrec(config_of(shared_data / "microlens"))
    assert (len(dataset.histories), len(dataset.items)) == (50_000, 19_220)
    assert sum(len(history.items) for history in dataset.histories) == 359_708
