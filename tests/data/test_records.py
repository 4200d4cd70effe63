"""Records: what `make_dataset` refuses, and what the content hash covers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mllmrec_jax.data.records import BadRows, DataError, History, Item, keep_chosen, make_dataset, parse_id, read_rows

ITEMS = [Item(1, "One"), Item(2, "Two"), Item(3, "Three")]


@pytest.mark.parametrize(
    ("items", "histories", "message"),
    [
        ([*ITEMS, Item(2, "Again")], [History(1, (1, 2))], "got item 2 twice"),
        (ITEMS, [], "expected users with interactions, got none"),
        (ITEMS, [History(1, (1, 2)), History(1, (2, 3))], "user 1: expected each user once"),
        (ITEMS, [History(1, ())], "user 1: expected at least one item, got an empty history"),
        (ITEMS, [History(1, (1, 2, 1))], "got a repeated item"),
        (ITEMS, [History(1, (1, 9))], "got the unknown item 9"),
        (ITEMS, [History(1, (1, 2), times=(5,))], "got 1 times"),
        (ITEMS, [History(1, (1, 2), times=(5, 4))], "got times that go back"),
    ],
)
def test_contradictions_are_named(items: list[Item], histories: list[History], message: str):
    with pytest.raises(DataError, match=message):
        make_dataset("toy", items, histories)


def test_the_hash_covers_every_text_and_interaction_but_not_pictures():
    base = make_dataset("toy", ITEMS, [History(1, (1, 2))])
    same = make_dataset("other name", [dataclasses.replace(item, image=Path("x.jpg")) for item in ITEMS], [History(1, (1, 2))])
    assert base.content_hash == same.content_hash
    changes = [
        ([Item(1, "One!"), *ITEMS[1:]], [History(1, (1, 2))]),
        ([Item(1, "One", ("Genre",)), *ITEMS[1:]], [History(1, (1, 2))]),
        ([Item(1, "One", caption="red"), *ITEMS[1:]], [History(1, (1, 2))]),
        (ITEMS, [History(1, (2, 1))]),
        (ITEMS, [History(2, (1, 2))]),
        (ITEMS, [History(1, (1, 2), sft_reasoning="because")]),
        (ITEMS, [History(1, (1, 2), grpo_reasoning="because")]),
        (ITEMS, [History(1, (1, 2), sft_reasoning="because", grpo_reasoning="because")]),
        (ITEMS, [History(1, (1, 2), part="test")]),
    ]
    hashes = {make_dataset("toy", items, histories).content_hash for items, histories in changes}
    assert len(hashes | {base.content_hash}) == len(changes) + 1


def test_unchosen_items_leave_the_catalogue_in_order():
    assert [item.id for item in keep_chosen({item.id: item for item in ITEMS}, [History(1, (3, 1))])] == [1, 3]


def test_bad_rows_are_counted_up_to_the_limit():
    bad = BadRows(2)
    bad.reject(Path("f"), 3, expected="x", got="y")
    bad.reject(Path("f"), 4, expected="x", got="y")
    with pytest.raises(DataError, match=r"f:9: expected x, got y \(3 malformed rows so far, max_bad_rows = 2\)"):
        bad.reject(Path("f"), 9, expected="x", got="y")
    assert bad.count == 3


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), (" 12 ", 12), ("-1", None), ("1.0", None), ("", None), ("٣", None), ("9" * 19, None)]
)
def test_ids_are_plain_whole_numbers(text: str, value: int | None):
    assert parse_id(text) == value


def test_rows_break_at_newlines_only(tmp_path: Path):
    path = tmp_path / "rows"
    path.write_bytes("a\u2028b\r\n\n\x0bc\x85d".encode())
    assert list(read_rows(path, encoding="utf-8")) == [(1, "a\u2028b"), (3, "\x0bc\x85d")]


def test_unreadable_text_names_file_and_line(tmp_path: Path):
    path = tmp_path / "rows"
    path.write_bytes(b"fine\nfine\n\xff\n")
    with pytest.raises(DataError, match=r"rows:3: expected utf-8 text, got the byte 0xff"):
        list(read_rows(path, encoding="utf-8"))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(read_rows(tmp_path / "absent", encoding="utf-8"))
